"""A camera that measures: noise, both inputs, training in two stages, and the same images after convert and load."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.mirror_patterns import MirrorPatterns
from lightning_modules.modules import SolverModule
from lightning_modules.solvers.single_pixel_camera import SinglePixelCamera
from lightning_modules.solvers.support_lista import SupportLISTA
from lightning_modules.walsh_patterns import WalshPatterns


def camera(operator=None, stages=2):
    operator = operator or MirrorPatterns(WalshPatterns(8, 12))
    return SinglePixelCamera(SupportLISTA(operator, stages=stages, channels=0, stride=4, threshold=(0.2, 0.04)))


def scenes(count=4, noise=0.01, measurements=12):
    """Scenes of smooth images (count, 1, 24, 32), and these."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(count, 1, 24, 32, generator=generator).cumsum(2).cumsum(3)
    x = (steps - steps.amin((2, 3), True)) / (steps.amax((2, 3), True) - steps.amin((2, 3), True))
    exposures = noise * torch.randn(count, measurements, 3, 4, generator=generator)
    return torch.cat([F.pixel_unshuffle(x, 8), exposures], dim=1), x


def test_measurements_are_those_of_the_patterns_plus_the_noise():
    network = camera()
    scene, x = scenes(noise=0.1)
    torch.testing.assert_close(network.measure(scene), network.patterns.A(x) + scene[:, 64:])


def test_measurements_take_the_place_of_the_scene():
    network = camera()
    scene, _ = scenes()
    assert torch.equal(network(scene), network(network.measure(scene)))
    assert network(scene).shape == (4, 1, 24, 32)


@pytest.mark.parametrize("operator", [WalshPatterns(8, 12), BlockPatterns(8, 12)])
def test_known_patterns_train_the_decoder_alone(operator):
    assert {name for name, _ in camera(operator).named_parameters()} == {
        f"decoder.{name}" for name in ("log_thresholds", "gradient_step_sizes", "pilot_weights")
    }


def trained(tmp_path, epochs=30):
    pl.seed_everything(0, verbose=False)
    scene, x = scenes(8)
    module = SolverModule(camera(), learning_rate=0.1, scalar_learning_rate=0.01, scale_learning_rate=0.0)
    before = module.solver.patterns.matrix().detach().sign()
    qat = pb.TwoStageQAT({"solver.decoder.operator.weight": None}, scheme="native", scale_stage_start=0.7)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[qat],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(scene, x), batch_size=4))
    return module.solver, before


def test_two_stage_training_learns_patterns_that_a_device_shows(tmp_path):
    network, before = trained(tmp_path)
    after = network.patterns.matrix()
    assert after.abs().unique().tolist() == [1 / 8]
    assert 0 < (after.sign() != before).float().mean() < 0.5
    start = camera(WalshPatterns(8, 12))
    start.decoder.load_state_dict(network.decoder.state_dict(), strict=False)
    scene, x = scenes(8)
    with torch.no_grad():
        assert (network(scene) - x).square().mean() < (start(scene) - x).square().mean()


def test_convert_save_and_load_give_the_same_images(tmp_path):
    network, _ = trained(tmp_path, epochs=2)
    scene, _ = scenes()
    inputs = {"kind": "blocks", "size": 12, "deviation": 1.0}
    loaded = pb.load(pb.save(pb.convert(network), tmp_path / "camera.safetensors", inputs))
    with torch.no_grad():
        torch.testing.assert_close(loaded(scene), network(scene))
    assert torch.equal(loaded.patterns.matrix(), network.patterns.matrix())


def test_unfit_arguments_and_inputs_are_refused():
    with pytest.raises(ValueError, match="operator is a NoneType: a camera measures with patterns"):
        SinglePixelCamera(SupportLISTA(channels=0))
    with pytest.raises(ValueError, match=r"\(2, 13, 3, 4\).* 76 channels, .* 12 exposures, or with 12"):
        camera()(torch.zeros(2, 13, 3, 4))
    with pytest.raises(ValueError, match=r"\(2, 12\)"):
        camera()(torch.zeros(2, 12))
