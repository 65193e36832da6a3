"""Starts from pairs and from operators: in models of every scheme, from the callback, from YAML, on resume."""

import contextlib
import copy
import io

import pytest
import torch
from fit_two_stage import assert_equal, fit
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_stage import SmallModule

import pibinn_plugin as pb
from lightning_modules.operators import SignBlocks
from pibinn_plugin.initialization import SignsFromOperator, SignsFromPairs, signs_from_operator, start_float_weights
from pibinn_plugin.nn import BlockDiagonalLinear
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.workflow import quantized_weights

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("Be aware that when using `ckpt_path`", "LightningCLI's args parameter", "The dirpath has changed")
]

OPERATOR = torch.block_diag(*SignBlocks(2, 4, 4, seed=3).blocks)  # 8 x 8


def batches(count=6, size=10, seed=0):
    x = torch.randn(count * size, 8, generator=torch.Generator().manual_seed(seed))
    return list(zip((x @ OPERATOR.T).split(size), x.split(size), strict=True))


def layers():
    torch.manual_seed(1)
    return nn.ModuleDict({"compact": BlockDiagonalLinear(8, 8, 2), "masked": nn.Linear(8, 8)})


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pairs_set_compact_and_masked_latents_in_every_scheme(scheme):
    model = pb.prepare(layers(), {"compact.weight": None, "masked.weight": pb.BlockDiagonal(2)}, scheme)
    SignsFromPairs()(model, batches())
    x = torch.randn(5, 8)
    for layer in model.values():
        if hasattr(layer, "bias"):
            torch.testing.assert_close(layer(x), x @ OPERATOR.T + layer.bias)
    packed = pb.convert(model)
    torch.testing.assert_close(packed["compact"](x), x @ OPERATOR.T + packed["compact"].bias)


def test_a_pattern_chooses_weights_and_keys_choose_entries():
    model = pb.prepare(layers(), {"*.weight": pb.BlockDiagonal(2)})
    before = {weight.name: weight.latent.clone() for weight in quantized_weights(model)}
    SignsFromPairs("unknowns", "measured", weights="mask*")(
        model, [{"unknowns": x, "measured": y} for y, x in batches()]
    )
    after = {weight.name: weight.latent for weight in quantized_weights(model)}
    assert torch.equal(after["compact.weight"], before["compact.weight"])
    torch.testing.assert_close(model["masked"].weight, OPERATOR)


def test_no_more_pairs_are_read_than_asked_for():
    class Counting(list):
        read = 0

        def __iter__(self):
            for each in super().__iter__():
                self.read += 1
                yield each

    def start(data, max_pairs):
        model = pb.prepare(layers(), {"*.weight": pb.BlockDiagonal(2)})
        SignsFromPairs(max_pairs=max_pairs)(model, data)
        return model["masked"].weight, pb.global_scale(model)()

    noisy = Counting((y + torch.randn_like(y), x) for y, x in batches())
    first = start(noisy, 15)
    assert noisy.read == 2
    (y0, x0), (y1, x1) = noisy[:2]
    assert_equal(first, start([(y0, x0), (y1[:5], x1[:5])], None))


def test_a_known_scale_is_kept():
    model = pb.prepare(layers(), {"*.weight": pb.BlockDiagonal(2)})
    scale = OPERATOR.abs().max().item()
    SignsFromPairs(scale=scale)(model, [(y + 0.1 * torch.randn_like(y), x) for y, x in batches()])
    assert pb.global_scale(model)().item() == pytest.approx(scale)
    torch.testing.assert_close(model["masked"].weight, OPERATOR)
    start_float_weights(
        twin := layers(), {"m*.weight": pb.BlockDiagonal(2)}, SignsFromPairs().pairs(batches()), scale=0.1
    )
    assert twin["masked"].weight.abs().max().item() == pytest.approx(0.1)


def test_two_ranks_start_where_one_does_with_the_pairs_of_both():
    """The all-reduce of two ranks, done here one after the other."""
    targets = {"masked.weight": pb.BlockDiagonal(2)}
    data = [(y + 0.5 * torch.randn_like(y), x) for y, x in batches()]
    alone = pb.prepare(layers(), targets)
    SignsFromPairs()(alone, data)
    sums = []
    SignsFromPairs()(pb.prepare(layers(), targets), data[1::2], lambda tensor: (sums.append(tensor), tensor)[1])
    rank = pb.prepare(layers(), targets)
    other = iter(sums)
    SignsFromPairs()(rank, data[0::2], lambda tensor: tensor + next(other))
    assert next(other, None) is None
    for found, expected in zip(quantized_weights(rank), quantized_weights(alone), strict=True):
        torch.testing.assert_close(found.latent, expected.latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("adjoint", "weight"), [(False, OPERATOR), (True, OPERATOR.T)])
@pytest.mark.parametrize("operator", [OPERATOR, SignBlocks(2, 4, 4, seed=3)])
def test_a_known_operator_is_the_start(operator, adjoint, weight):
    model = pb.prepare(layers(), {"*.weight": pb.BlockDiagonal(2)})
    SignsFromOperator(operator, adjoint)(model)
    torch.testing.assert_close(model["compact"].weight, pb.BlockDiagonal(2).to_compact(weight))
    torch.testing.assert_close(model["masked"].weight, weight)


def test_the_scale_of_an_operator_is_its_best_one_and_large_ones_are_probed_in_parts():
    matrix = torch.randn(3, 600)
    start = signs_from_operator(matrix, pb.Dense(), (3, 600))
    assert torch.equal(start.latent.sign(), matrix.sign())
    best = (matrix.sign() * matrix).sum() / matrix.numel()
    assert start.scale == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize("solution", ["ridge", "box", "one_bit"])
def test_float_weights_start_from_the_same_pairs(solution):
    model = layers()
    start_float_weights(model, {"*.weight": pb.BlockDiagonal(2)}, [(x, y) for y, x in batches()], solution)
    x = torch.randn(5, 8)
    for layer in model.values():
        # Ridge and box solutions shrink by one part in sixty, the number of pairs.
        torch.testing.assert_close(layer(x), x @ OPERATOR.T + layer.bias, rtol=0.05, atol=0.1)


def test_what_cannot_be_started_is_said():
    model = pb.prepare(layers(), {"compact.weight": None, "masked.weight": pb.Dense()})
    data = batches()
    for action, error, message in (
        (lambda: SignsFromPairs()(model, data), pb.TargetError, "must be alike.*BlockDiagonal.*masked.weight.*Dense"),
        (lambda: SignsFromPairs(weights="no*")(model, data), pb.TargetError, r"'no\*' names no weight"),
        (lambda: SignsFromPairs(weights="m*")(nn.Linear(2, 2), data), pb.TargetError, "names no weight"),
        (lambda: SignsFromPairs(2, 0, weights="m*")(model, data), pb.PIBiNNError, "the inputs of the pairs.* at 2"),
        (lambda: SignsFromPairs(1, "y", weights="m*")(model, data), pb.PIBiNNError, "outputs of the pairs.*tuple"),
        (lambda: SignsFromPairs(max_pairs=0), pb.PIBiNNError, "max_pairs=0"),
        (lambda: SignsFromPairs(weights="m*")(model, []), pb.PIBiNNError, "no pairs"),
        (lambda: SignsFromOperator(torch.ones(8, 9), weights="m*")(model), pb.StructureError, r"\(8, 9\).*needs"),
        (lambda: SignsFromOperator(torch.ones(8), weights="m*")(model), pb.StructureError, r"\(8,\)"),
        (lambda: SignsFromOperator(nn.Identity(), True, "m*")(model), pb.StructureError, "A_adjoint; got Identity"),
        (lambda: SignsFromOperator(torch.zeros(8, 8), weights="m*")(model), pb.ScaleError, "mean of"),
        (lambda: start_float_weights(layers(), {"m*t": None}, [(x, y) for y, x in data], "no"), pb.PIBiNNError, "'no'"),
    ):  # fmt: skip
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=message):
            action()
        assert_equal(dict(model.state_dict()), dict(before))


# ---------------------------------------------------------------------------------------------------------- callback


class PairsModule(SmallModule):
    """Its one layer maps the unknowns of a batch to the measurements."""

    def __init__(self, workers=0, shuffle=True):
        super().__init__()
        self.workers, self.shuffle = workers, shuffle
        self.layers = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.float64))

    def loss(self, batch):
        y, x = batch
        return nn.functional.mse_loss(self(x), y)

    def loader(self, seed):
        y, x = (torch.cat(each).double() for each in zip(*batches(seed=seed), strict=True))
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        return DataLoader(TensorDataset(y + 0.3 * noise, x), batch_size=20)

    def train_dataloader(self):
        options = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(self.loader(1).dataset, batch_size=20, shuffle=self.shuffle, **options)


class Counted(SignsFromPairs):
    calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        super().__call__(*arguments)


def callback(scheme="native", initialization=None, **starts):
    starts = {"scale_stage_start": 2, **starts}
    return pb.TwoStageQAT({"layers.0.weight": pb.BlockDiagonal(2)}, scheme, initialization=initialization, **starts)


def started(module):
    (weight,) = quantized_weights(module)
    return torch.where(weight.latent >= 0, 1.0, -1.0)[weight.quantizer.structure.mask((8, 8))]


SIGNS = OPERATOR[OPERATOR != 0].sign().double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_starts_at_the_signs_of_its_pairs(scheme):
    frozen = PairsModule()
    fit(frozen, callback(scheme, SignsFromPairs(), scale_stage_start=0), max_epochs=1)
    assert torch.equal(started(frozen).double(), SIGNS)
    random = PairsModule()
    fit(random, callback(scheme, scale_stage_start=0), max_epochs=1)
    assert not torch.equal(started(random).double(), SIGNS)


def test_a_warm_up_starts_there_too():
    diary = fit(PairsModule(), callback("native", SignsFromPairs(), sign_stage_start=1), max_epochs=2)
    assert diary.losses[0] < 0.3  # the noise and what is not yet fitted; random weights have more than 1


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_pairs_leaves_the_batches_of_the_training_as_they_were(workers):
    read = []

    def reads(model, batches, sum_over_ranks):
        read.extend(batches)

    expected = fit(PairsModule(shuffle=False), callback(), max_epochs=2)
    diary = fit(PairsModule(workers, shuffle=False), callback("native", reads), max_epochs=2)
    assert len(read) == 3
    assert diary.losses == expected.losses


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_done_once_and_not_on_resume(tmp_path, scheme):
    initialization = Counted()
    whole = fit(PairsModule(), callback(scheme, initialization), directory=tmp_path, max_epochs=4)
    assert initialization.calls == 1
    for epoch in (0, 2):
        resumed = fit(
            PairsModule(), callback(scheme, initialization), resume=tmp_path / f"epoch={epoch}.ckpt", max_epochs=4
        )
        assert resumed.stages == whole.stages[3 * (epoch + 1) :]
    assert initialization.calls == 1
    again = fit(PairsModule(), callback(scheme, initialization), max_epochs=4)
    assert initialization.calls == 2
    assert again.losses == whole.losses
    assert_equal(again.states, whole.states)


def test_pairs_that_are_left_out_of_training_are_not_read():
    class Batches:
        def __call__(self, model, batches, sum_over_ranks):
            self.sizes = [len(y) for y, _ in batches]

    initialization = Batches()
    fit(PairsModule(), callback("native", initialization), max_epochs=1, limit_train_batches=2)
    assert initialization.sizes == [20, 20]


CONFIG = """
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
  callbacks:
    - class_path: pibinn_plugin.TwoStageQAT
      init_args:
        targets:
          layers.0.weight: {class_path: pibinn_plugin.BlockDiagonal, init_args: {blocks: 2}}
        scale_stage_start: 0
        initialization: INITIALIZATION
"""
PAIRS = "{class_path: pibinn_plugin.initialization.SignsFromPairs, init_args: {inputs: 1, outputs: 0, max_pairs: 40}}"
KNOWN = """
          class_path: pibinn_plugin.initialization.SignsFromOperator
          init_args:
            operator:
              class_path: lightning_modules.operators.SignBlocks
              init_args: {blocks: 2, rows: 4, columns: 4, seed: 3}
"""


@pytest.mark.parametrize("initialization", [PAIRS, KNOWN], ids=["pairs", "operator"])
def test_yaml_names_it(tmp_path, initialization):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("INITIALIZATION", initialization))
    with contextlib.redirect_stderr(io.StringIO()):
        cli = LightningCLI(PairsModule, args=["--config", str(path)], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model)
    assert torch.equal(started(cli.model).double(), SIGNS)
