"""Two ranks train what one rank trains on the joined batch, through both stage switches, and resume bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_on_two_ranks
from two_stage import EPOCHS, TARGETS, SmallModule

import pibinn_plugin as pb

REPOSITORY = Path(__file__).parents[2]
# In float64 the order of the sums over samples makes differences of 1e-16.
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_ranks")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train_on_two_ranks.__file__, str(directory)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-8000:]
    return directory


def load(runs, run, rank=0):
    return torch.load(runs / f"{run}-{rank}.pt", weights_only=True)


def greatest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max() for name in first)


def latents(state):
    found = {name: value for name, value in state.items() if name.endswith("original")}
    assert len(found) == len(TARGETS)
    return found


@pytest.mark.parametrize(
    ("run", "alone"),
    [
        ("ddp", "one"),
        ("ddp_bucket_views", "one"),
        ("ddp_unused", "one"),
        ("ddp_accumulating", "one_accumulating"),
        ("fsdp", "one"),
        ("fsdp_root", "one"),
    ],
)
def test_two_ranks_train_what_one_trains(runs, run, alone):
    first, second, expected = load(runs, run, 0), load(runs, run, 1), load(runs, alone)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(expected["metrics"], abs=ROUNDING)
    assert {"val/loss", "qat/scale", "qat/flipped", "qat/stage"} == first["metrics"].keys()
    for epoch in range(EPOCHS):
        assert greatest_difference(first["states"][epoch], second["states"][epoch]) == 0
        assert greatest_difference(first["states"][epoch], expected["states"][epoch]) < ROUNDING


@pytest.mark.parametrize("run", ["ddp", "ddp_bucket_views", "fsdp", "fsdp_root"])
def test_every_stage_trains_its_own_parameters(runs, run):
    states = load(runs, run)["states"]
    for epoch in range(1, EPOCHS):
        before, after = states[epoch - 1], states[epoch]
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert {"gain", "layers.0.bias", "layers.2.bias", "pibinn_scale.value"} <= moved
        assert moved.issuperset(latents(after)) == (epoch < 4)
        assert moved.isdisjoint(latents(after)) == (epoch >= 4)


@pytest.mark.parametrize(
    ("run", "epochs"),
    [("ddp", range(5)), ("fsdp", [1, 3, 4]), ("fsdp_root", [1, 4]), ("fsdp_torchao", [3]), ("fsdp_brevitas", [3])],
)
def test_resuming_repeats_in_every_stage(runs, run, epochs):
    for rank in range(2):
        whole = load(runs, run, rank)
        for epoch in epochs:
            resumed = load(runs, f"{run}_resumed_{epoch}", rank)
            assert resumed["states"].keys() == set(range(epoch + 1, EPOCHS))
            for later, state in resumed["states"].items():
                assert greatest_difference(state, whole["states"][later]) == 0
            assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
            assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize("epoch", [1, 3, 4])
@pytest.mark.parametrize(("run", "whole"), [("ddp_from_one", "one"), ("one_from_ddp", "ddp")])
def test_resuming_on_another_number_of_ranks(runs, run, whole, epoch):
    resumed, expected = load(runs, f"{run}_{epoch}"), load(runs, whole)
    for later in range(epoch + 1, EPOCHS):
        assert greatest_difference(resumed["states"][later], expected["states"][later]) < ROUNDING
    assert resumed["metrics"] == pytest.approx(expected["metrics"], abs=ROUNDING)


def test_forked_ranks_train_a_prepared_module_and_refuse_another(runs):
    messages = torch.load(runs / "fork_messages.pt", weights_only=True)
    assert "MisconfigurationException: this strategy trains copies of the module" in messages["not_prepared"]
    assert "before fit" in messages["not_prepared"]
    assert messages["is_prepared"] == "False"
    trained = torch.load(runs / "forked.pt", weights_only=True)
    assert greatest_difference(trained, load(runs, "ddp")["states"][EPOCHS - 1]) < ROUNDING


def test_schemes_agree_when_sharded(runs):
    native, torchao, brevitas = (load(runs, run) for run in ("fsdp", "fsdp_torchao", "fsdp_brevitas"))
    assert native["losses"] == torchao["losses"] == brevitas["losses"]
    assert native["metrics"] == torchao["metrics"] == brevitas["metrics"]


def test_a_consolidated_checkpoint_converts_without_the_ranks(runs):
    checkpoint = torch.load(runs / "fsdp" / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    module = SmallModule()
    pb.prepare(module, TARGETS)
    module.load_state_dict(checkpoint["state_dict"])
    packed = pb.convert(module)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(packed(x), module(x))
    assert pb.global_scale(packed)().item() == pytest.approx(load(runs, "one")["metrics"]["qat/scale"], abs=ROUNDING)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("convert", "PIBiNNError: the model is sharded over ranks"),
        ("convert_validated", "PIBiNNError: the model is sharded over ranks"),
        ("root_not_sharded", "MisconfigurationException: ['pibinn_scale'] are not sharded"),
        ("brevitas_consolidated", "MisconfigurationException: Lightning could not load a consolidated checkpoint"),
        ("tensor_parallel", "MisconfigurationException: tensor_parallel_size=2"),
        ("structure", "MisconfigurationException: the checkpoint holds 'layers.0.weight' with the structure"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(runs, case, message):
    for rank in range(2):
        assert load(runs, "fsdp_messages", rank)[case].startswith(message)
