"""A CUDA device trains, converts, saves and answers as the CPU does, and waits for no copy of an index."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import two_stage
import yaml
from config_networks import INPUTS, config_network
from every_layer import SCHEMES, TARGETS, Solver, solver, step
from fit_two_stage import C, S, W, fit
from two_stage import SmallModule

import pibinn_plugin as pb
from lightning_modules.cli import main
from pibinn_plugin.nn import CompactLinear
from pibinn_plugin.packed import keep_unpacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used:UserWarning"),
]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of sums in another order


@pytest.fixture(autouse=True)
def _exact_products():
    """Float32 products are of float32, convolutions too."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def on_device(value):
    return value.to("cuda") if isinstance(value, torch.Tensor) else copy.deepcopy(value).to("cuda")


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_that_of_the_cpu(scheme):
    model, batch = solver(scheme), torch.randn(5, 6)
    there = on_device(model)
    for ours, theirs in zip(step(there, on_device(batch)), step(model, batch), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in there.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], **ROUNDING, msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_preparing_there_is_preparing_here(scheme):
    here = solver(scheme)
    torch.manual_seed(0)
    there = pb.prepare(Solver().to("cuda"), TARGETS, scheme)
    assert all(tensor.is_cuda for tensor in (*there.parameters(), *there.buffers()))
    state = there.state_dict()
    for name, value in here.state_dict().items():
        torch.testing.assert_close(state[name].cpu(), value, msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("arguments", [{}, {"strategy": "ddp", "devices": 1}], ids=["one device", "ddp"])
def test_two_stages_in_a_trainer(scheme, arguments):
    module, twin = SmallModule(), SmallModule()
    diary = fit(module, two_stage.callback(scheme), accelerator="gpu", **arguments)
    expected = fit(twin, two_stage.callback(scheme), accelerator="cpu")
    assert diary.stages == [W] * 4 + [S] * 4 + [C] * 4
    assert diary.losses == pytest.approx(expected.losses, rel=1e-9)
    assert diary.scales == pytest.approx(expected.scales, rel=1e-9)
    if torch.distributed.is_initialized():
        assert torch.distributed.get_backend() == "nccl"
        torch.distributed.destroy_process_group()
    packed, x = pb.convert(module.cuda()), torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(packed(x.cuda()).cpu(), pb.convert(twin.cpu())(x))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_precisions(precision):
    class AnyPrecision(SmallModule):
        def __init__(self):
            super().__init__("sgd")
            self.float()

        def loss(self, batch):
            x, y = batch
            return F.mse_loss(self(x.to(self.gain.dtype)).float(), y.float())

    diary = fit(AnyPrecision(), two_stage.callback(), accelerator="gpu", precision=precision)
    assert diary.stages == [W] * 4 + [S] * 4 + [C] * 4
    assert all(loss == loss for loss in diary.losses)


def test_a_checkpoint_of_the_device_goes_on_there_and_here(tmp_path):
    whole = fit(SmallModule(), two_stage.callback(), accelerator="gpu", directory=tmp_path / "whole")
    resume = tmp_path / "whole" / "epoch=3.ckpt"
    again = fit(SmallModule(), two_stage.callback(), accelerator="gpu", resume=resume)
    assert again.losses == whole.losses[-len(again.losses) :]
    here = fit(SmallModule(), two_stage.callback(), accelerator="cpu", resume=resume)
    assert here.losses == pytest.approx(again.losses, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_go_from_device_to_device(scheme, tmp_path):
    model = solver(scheme).to("cuda")
    pb.save(pb.convert(model), tmp_path / "there.safetensors")
    pb.save(pb.convert(solver(scheme)), tmp_path / "here.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    x = torch.randn(4, 6)
    here = pb.load(tmp_path / "there.safetensors", into=Solver())
    there = pb.load(tmp_path / "there.safetensors", into=Solver().to("cuda"))
    with torch.no_grad():
        torch.testing.assert_close(there.to("cuda")(x.cuda()).cpu(), here(x), **ROUNDING)
        torch.testing.assert_close(there.to("cpu")(x), here(x))


@pytest.mark.parametrize("name", INPUTS)
def test_networks_of_the_configs(name):
    model, x = config_network(name)
    packed = pb.convert(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(x)
        for there in (on_device(model), on_device(packed), torch.compile(on_device(packed))):
            torch.testing.assert_close(there(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keeps", [True, False])
def test_capture_into_a_graph(keeps):
    model = solver("native")
    packed = pb.convert(model).to("cuda")
    keep_unpacked(packed, keeps)
    x = torch.randn(4, 6, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            packed(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = packed(x)
        x.copy_(torch.randn(4, 6))
        graph.replay()
        torch.testing.assert_close(output, packed(x))


# ------------------------------------------------------------------------------------------------------ without waiting


@pytest.fixture
def _no_waiting():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "structure",
    [pb.Dense(), pb.BlockDiagonal(2), pb.Banded(1, 1), pb.Mask(torch.eye(8).roll(1, 0) + torch.eye(8)),
     pb.BlockDiagonal(rows=(3, 5), columns=(5, 3)),
     pb.BlockDiagonal(2, row_order=(7, 6, 5, 4, 3, 2, 1, 0), column_order=(1, 0, 3, 2, 5, 4, 7, 6))],
    ids=lambda structure: type(structure).__name__,
)  # fmt: skip
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.usefixtures("_no_waiting")
def test_steps_wait_for_nothing(structure, compact):
    layer = CompactLinear(8, 8, structure) if compact else torch.nn.Linear(8, 8)
    model = pb.prepare(torch.nn.Sequential(layer).cuda(), {"0.weight": None if compact else structure})
    x = torch.randn(4, 8, device="cuda")
    packed = pb.convert(copy.deepcopy(model))
    for each in (model, packed):
        each(x).sum().backward()
        with torch.no_grad():
            each(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    model(x).sum().backward()
    with torch.no_grad():
        model(x), packed(x)


def test_every_config_trains_there(tmp_path, monkeypatch):
    folder = Path(__file__).parents[2]
    monkeypatch.chdir(folder)  # where the paths of data begin
    trained = []
    for path in sorted((folder / "configs").glob("*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]["init_args"].get("data_dir")
        if data is not None and not Path(data).exists():
            continue
        trainer = {"accelerator": "gpu", "limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1,
                   "check_val_every_n_epoch": 1, "default_root_dir": tmp_path / path.stem}  # fmt: skip
        options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
        monkeypatch.setattr(sys, "argv", ["pibinn", "fit", "--config", str(path), *options])
        main()
        assert (tmp_path / path.stem / "checkpoints" / "last.ckpt").exists()
        trained.append(path.stem)
    assert {"calibration", "sparse_recovery"} <= set(trained)
