"""The baseline quantizers against independent references, their gradients, their starts, and training with them."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pibinn_plugin as pb
from lightning_modules.analysis.variants import weight_variants
from lightning_modules.compare.baselines import baseline_weights
from lightning_modules.compare.callback import BASELINES, BaselineQAT, attach_baseline
from lightning_modules.compare.dense_twin import RowError, densify
from lightning_modules.compare.parq import PARQ
from pibinn_plugin.initialization import SOLUTIONS, SignsFromPairs, start_float_weights
from pibinn_plugin.nn import BandedLinear, BlockDiagonalLinear

QUANTIZED = ["fp16", "int8", "ternary_twn", "ternary_b158", "channel_wise", "layer_wise"]
TARGETS = {"weight": None}


def reference(quantizer, dense, mask):
    """The definitions, written for one dense matrix in float64 with loops where a scale belongs to a row."""
    inside = np.abs(dense[mask])
    if quantizer == "fp16":
        return np.where(mask, dense.astype(np.float16), 0.0)
    if quantizer == "int8":
        scale = np.float32(inside.max()) / np.float32(127)
        return np.where(mask, np.round(np.float32(dense) / scale) * scale, 0.0)
    if quantizer == "ternary_twn":
        kept = mask & (np.abs(dense) > 0.7 * inside.mean())
        return np.where(kept, np.sign(dense) * np.abs(dense[kept]).mean(), 0.0)
    if quantizer == "ternary_b158":
        return np.where(mask, np.clip(np.round(dense / inside.mean()), -1, 1) * inside.mean(), 0.0)
    signs = np.where(dense >= 0, 1.0, -1.0)
    if quantizer == "layer_wise":
        return np.where(mask, signs * inside.mean(), 0.0)
    quantized = np.zeros_like(dense)
    for row in range(len(dense)):
        if mask[row].any():
            quantized[row, mask[row]] = signs[row, mask[row]] * np.abs(dense[row, mask[row]]).mean()
    return quantized


def dense_of(layer, compact):
    structure = getattr(layer, "structure", None)
    return compact if structure is None else structure.to_dense(compact, layer.dense_shape)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["dense", "masked", "blocks", "band"]),
    size=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    quantizer=st.sampled_from(QUANTIZED),
)
def test_quantizers_follow_their_definitions(kind, size, seed, quantizer):
    torch.manual_seed(seed)
    if kind == "blocks":
        layer, targets = BlockDiagonalLinear(3 * size, 3 * 2, 3), TARGETS
        mask = layer.structure.mask(layer.dense_shape)
    elif kind == "band":
        layer, targets = BandedLinear(size + 2, size + 2, 1, 0), TARGETS
        mask = layer.structure.mask(layer.dense_shape)
    else:
        layer = nn.Linear(2 * size, 6)
        structure = pb.BlockDiagonal(2) if kind == "masked" else pb.Dense()
        targets, mask = {"weight": structure}, structure.mask((6, 2 * size))
    with torch.no_grad():
        layer.weight *= 3
    latent = dense_of(layer, layer.weight.detach()).double().numpy()
    attach_baseline(layer, targets, quantizer)
    found = dense_of(layer, layer.weight.detach())
    np.testing.assert_allclose(found.numpy(), reference(quantizer, latent, mask.numpy()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("quantizer", "variant"),
    [
        ("ternary_twn", "ternary TWN"),
        ("ternary_b158", "ternary b1.58"),
        ("channel_wise", "one-bit channel-wise"),
        ("fp32", "float"),
    ],
)
def test_quantizers_are_those_of_the_geometry_table(quantizer, variant):
    layer = BlockDiagonalLinear(40, 24, 4)
    expected = weight_variants(layer.weight)[variant]
    attach_baseline(layer, TARGETS, quantizer)
    torch.testing.assert_close(layer.weight, expected)


def test_a_row_of_a_convolution_is_an_output_channel():
    layer = nn.Conv2d(3, 4, 5)
    expected = layer.weight.detach().abs().mean((1, 2, 3))
    attach_baseline(layer, TARGETS, "channel_wise")
    torch.testing.assert_close(layer.weight.abs().amax((1, 2, 3)), expected)
    torch.testing.assert_close(layer.weight.abs().amin((1, 2, 3)), expected)


def upstream_gradient(layer):
    upstream = torch.randn_like(layer.weight)
    (layer.weight * upstream).sum().backward()
    return upstream


@pytest.mark.parametrize("quantizer", ["fp16", "int8", "ternary_twn", "ternary_b158", "fp32"])
def test_gradients_of_rounded_weights_pass_unchanged_inside_the_structure(quantizer):
    layer, structure = nn.Linear(8, 6), pb.BlockDiagonal(2)
    attach_baseline(layer, {"weight": structure}, quantizer)
    upstream = upstream_gradient(layer)
    latent = layer.parametrizations.weight.original
    assert torch.equal(latent.grad, upstream * structure.mask((6, 8)))


def test_gradients_of_scaled_signs_go_through_sign_and_scale():
    layer = nn.Linear(8, 6)
    attach_baseline(layer, TARGETS, "channel_wise")
    latent, front = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    with torch.no_grad():
        front.scales += torch.rand(6)  # learned ones are no means
    upstream = upstream_gradient(layer)
    torch.testing.assert_close(latent.grad, front.scales.detach().unsqueeze(1) * upstream)
    torch.testing.assert_close(front.scales.grad, (upstream * latent.detach().sign()).sum(1))


@pytest.mark.parametrize("quantizer", ["channel_wise", "layer_wise"])
def test_scales_are_learned_from_the_means_at_which_quantization_begins(quantizer):
    module = train([BaselineQAT(LAYER, quantizer, 2)])
    at_the_switch = module.seen[8].abs()
    before = module.seen[7].abs()  # a float weight; one step of Adam lies between
    mean = before.mean(-1, keepdim=True) if quantizer == "channel_wise" else before.mean()
    torch.testing.assert_close(at_the_switch, mean.expand_as(before), atol=0.011, rtol=0)
    [(_, latent, front)] = baseline_weights(module)
    assert not torch.allclose(front.scales, front.least_squares_scales(front.structural(latent.detach())))


def test_the_dense_twin_starts_with_equal_outputs():
    model = nn.ModuleList([BlockDiagonalLinear(8, 4, 2), nn.Conv1d(4, 6, 3, groups=2), nn.Linear(6, 6)])
    with torch.no_grad():
        model[2].weight *= pb.BlockDiagonal(3).mask((6, 6))
    inputs = [torch.randn(5, 8), torch.randn(2, 4, 7), torch.randn(5, 6)]
    before = [layer(input) for layer, input in zip(model, inputs, strict=True)]
    targets = densify(model, {"0.weight": None, "1.weight": None, "2.weight": pb.BlockDiagonal(3)})
    for layer, input, output in zip(model, inputs, before, strict=True):
        torch.testing.assert_close(layer(input), output)
    assert [tuple(layer.weight.shape) for layer in model] == [(4, 8), (6, 4, 3), (6, 6)]
    assert set(targets.values()) == {pb.Dense()}
    assert model[1].groups == 1


def test_rows_that_do_not_apply_say_why():
    with pytest.raises(RowError, match="dense as they are"):
        attach_baseline(nn.Linear(4, 4), TARGETS, "fp32_dense")
    with pytest.raises(RowError, match="masked"):
        attach_baseline(nn.Linear(4, 4), {"weight": pb.BlockDiagonal(2)}, "parq")
    with pytest.raises(MisconfigurationException, match="unknown quantizer 'ternary'"):
        attach_baseline(nn.Linear(4, 4), TARGETS, "ternary")


class Regression(pl.LightningModule):
    """Learns an operator from pairs; its one layer is the target."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = BlockDiagonalLinear(16, 8, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        y, x = batch
        self.seen.append(self.layer.weight.detach().clone())
        return nn.functional.mse_loss(self.gain * self.layer(x), y)

    def configure_optimizers(self):
        parameters = dict(self.named_parameters())
        weights = [parameter for name, parameter in parameters.items() if name.endswith(("weight", "original"))]
        others = [parameter for name, parameter in parameters.items() if not name.endswith(("weight", "original"))]
        return torch.optim.Adam([{"params": weights, "lr": 1e-2}, {"params": others, "lr": 1e-2}])


class Pairs(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 16, generator=generator)
        operator = torch.block_diag(*torch.randn(4, 2, 4, generator=generator).sign())
        self.operator = operator
        self.pairs = TensorDataset(x @ operator.T + 0.1 * torch.randn(64, 8, generator=generator), x)

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=16)


def train(callbacks, epochs=4, ckpt_path=None, data=None, **options):
    module = Regression()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, **{"enable_checkpointing": False} | quiet | options
    )  # fmt: skip
    trainer.fit(module, datamodule=data or Pairs(), ckpt_path=ckpt_path)
    return module


LAYER = {"layer.weight": None}


@pytest.mark.parametrize("quantizer", [*QUANTIZED, "fp32", "fp32_dense"])
def test_training_moves_latents_and_ends_quantized(quantizer):
    module = train([BaselineQAT(LAYER, quantizer)])
    assert not torch.equal(module.layer.parametrizations.weight.original, Regression().layer.weight)
    assert not torch.equal(module.seen[0], module.seen[-1])
    magnitudes = len(module.layer.weight.detach().abs().unique())
    ternary, floats = (1, 2), (10, 32)
    fewest, most = {
        "fp32": floats,
        "fp16": floats,
        "int8": floats,
        "fp32_dense": (10, 128),
        "channel_wise": (8, 8),
        "layer_wise": (1, 1),
    }.get(quantizer, ternary)
    assert fewest <= magnitudes <= most


def test_zero_bit_trains_scalars_only():
    module = train([BaselineQAT(LAYER, "zero_bit", initialization=SignsFromPairs())])
    assert torch.equal(module.layer.weight, Regression().layer.weight)
    assert module.gain.item() != 1.0


def test_the_oracle_knows_the_operator_and_keeps_it():
    module = train([BaselineQAT(LAYER, "oracle", initialization=SignsFromPairs())])
    dense = module.layer.structure.to_dense(module.layer.weight.detach(), module.layer.dense_shape)
    assert torch.equal(dense, Pairs().operator)
    assert module.gain.item() != 1.0


def test_data_without_an_operator_of_the_weight_have_no_oracle():
    class OtherPairs(Pairs):
        def __init__(self):
            super().__init__()
            self.operator = torch.eye(3)

    with pytest.raises(RowError, match="is not the operator of OtherPairs"):
        train([BaselineQAT(LAYER, "oracle", initialization=SignsFromPairs())], data=OtherPairs())
    with pytest.raises(RowError, match="no unknown operator"):
        train([BaselineQAT(LAYER, "oracle")])


def test_zero_bit_may_have_no_targets_and_no_other_row_may():
    assert train([BaselineQAT({}, "zero_bit")]).gain.item() != 1.0
    with pytest.raises(pb.TargetError, match="no targets"):
        attach_baseline(Regression(), {}, "fp32")


@pytest.mark.parametrize("start", [2, 0.5])
def test_the_float_warm_up_ends_where_that_of_two_stage_qat_ends(start):
    module = train([BaselineQAT(LAYER, "layer_wise", start)])
    one_value = [len(weight.abs().unique()) == 1 for weight in module.seen]
    assert one_value == [False] * 8 + [True] * 8


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_a_baseline_starts_from_the_pairs(solution):
    twin = Regression()
    start_float_weights(twin, LAYER, [Pairs().pairs.tensors[::-1]], solution)
    module = train([BaselineQAT(LAYER, "fp32", initialization=SignsFromPairs(), solution=solution)], epochs=1)
    torch.testing.assert_close(module.seen[0], twin.layer.weight.detach())
    assert not torch.allclose(module.seen[0], Regression().layer.weight)


def test_a_baseline_knows_what_one_bit_weights_know():
    """No more pairs, the same scale, and pairs read as a subclass reads them."""

    class Swapped(SignsFromPairs):
        def read(self, batch):
            return tuple(reversed(super().read(batch)))

    twin = Regression()
    y, x = Pairs().pairs.tensors
    start_float_weights(twin, LAYER, [(x[:24], y[:24])], "box", scale=0.4)
    for initialization in (SignsFromPairs(max_pairs=24, scale=0.4), Swapped(0, 1, max_pairs=24, scale=0.4)):
        module = train([BaselineQAT(LAYER, "fp32", initialization=initialization)], epochs=1)
        torch.testing.assert_close(module.seen[0], twin.layer.weight.detach())
    assert module.seen[0].abs().max() <= 0.4


def test_a_resumed_run_equals_the_undisturbed_one(tmp_path):
    def callbacks():
        return [BaselineQAT(LAYER, "ternary_twn", 1, SignsFromPairs(), "ridge")]

    whole = train(callbacks())
    checkpoint = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    train([*callbacks(), checkpoint], epochs=2, enable_checkpointing=True)
    resumed = train(callbacks(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.gain, whole.gain)
    with pytest.raises(MisconfigurationException, match="quantizer 'ternary_twn'; got 'ternary_b158'"):
        train([BaselineQAT(LAYER, "ternary_b158", 1)], ckpt_path=tmp_path / "half.ckpt")


def test_parq_takes_gradients_at_quantized_weights_and_ends_with_two_values():
    pytest.importorskip("torchao")
    module = train([BaselineQAT(LAYER, "parq"), PARQ()], epochs=8)
    # Annealing ends after 24 of 32 steps: from the next forward on, weights have one magnitude.
    for weight in module.seen[25:]:
        torch.testing.assert_close(weight.abs(), weight.abs().mean().expand_as(weight))
    assert module.seen[1].abs().unique().numel() > 1
    [(_, latent, quantizer)] = baseline_weights(module)
    torch.testing.assert_close(module.layer.weight, latent)
    assert isinstance(quantizer, BASELINES["parq"])
    start = Regression().layer.weight
    assert (latent.sign() != start.sign()).any()


def test_parq_without_a_parameter_group_of_its_own_is_left_out():
    pytest.importorskip("torchao")

    class OneGroup(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = pl.Trainer(
        max_epochs=1, callbacks=[BaselineQAT(LAYER, "parq"), PARQ()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.raises(RowError, match="groups of their own"):
        trainer.fit(OneGroup(), datamodule=Pairs())
