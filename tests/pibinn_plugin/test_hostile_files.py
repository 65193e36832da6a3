"""Files that claim more than they hold: refused in one short line, or loaded, in bounded time and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_files import HOSTILE, MOST_CHARACTERS, stored_mask
from torch import nn

from pibinn_plugin import BlockDiagonal, PIBiNNError, ScaleError, StructureError, convert, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes():
    """What became of each file in a process with the limits."""
    script = ROOT / "tests/scripts/hostile_files.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_is_loaded_or_refused_in_one_short_line_within_the_limits(name, outcomes):
    words = HOSTILE[name][2]
    result = outcomes[name]
    if words is None:
        assert result == "loaded"
    else:
        assert words in result
        assert result != "loaded"
        assert len(result) <= MOST_CHARACTERS
        assert len(result.splitlines()) == 1


@pytest.mark.parametrize("error", [PIBiNNError, StructureError])
def test_every_error_is_one_line_of_bounded_length(error):
    assert str(error("short, and kept as it is")) == "short, and kept as it is"
    message = str(error("first words\n" + "x" * 10**6 + "\r\nlast words"))
    assert len(message) <= 1000
    assert len(message.splitlines()) == 1
    assert message.startswith("first words")
    assert message.endswith("last words")
    assert str(error(message)) == message


def prepared(scheme="native"):
    return prepare(nn.Linear(8, 8, bias=False), {"weight": BlockDiagonal(2)}, scheme)


def structure_key(state):
    return next(key for key in state if key.endswith("_extra_state"))


ONE_TILE = stored_mask((8192, 8192), 1, (8192, 8192), bytes([0, 1, 0]))  # 22 bytes for 2^26 elements
HOSTILE_STATES = {
    "one byte, 2^40 times": torch.ones(1, dtype=torch.uint8).expand(2**40),
    "one float, 2^40 times": torch.ones(1).expand(2**40),
    "no structure": torch.tensor([1, 9, 9], dtype=torch.uint8),
    "no bytes": torch.zeros(0, dtype=torch.uint8),
    "a number": torch.tensor(3),
    "a matrix": torch.ones(2, 2),
    "no tensor": "x" * 10**6,
    "one tile of 2^26": torch.tensor([1, *ONE_TILE], dtype=torch.uint8),
    "neither quantized nor not": torch.tensor([2, *BlockDiagonal(2).to_bytes()], dtype=torch.uint8),
}


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
@pytest.mark.parametrize("name", HOSTILE_STATES)
def test_a_hostile_structure_in_a_state_dict_is_refused_in_one_short_line(name, scheme):
    model = prepared(scheme)
    state = model.state_dict()
    state[structure_key(state)] = HOSTILE_STATES[name]
    with pytest.raises(StructureError) as caught:
        model.load_state_dict(state)
    assert len(str(caught.value)) <= 1000


def test_a_packed_model_refuses_them_too():
    packed = convert(prepared())
    state = packed.state_dict()
    state[structure_key(state)] = HOSTILE_STATES["one byte, 2^40 times"]
    with pytest.raises(StructureError):
        packed.load_state_dict(state)


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_dict_with_a_scale_that_is_not_finite_is_refused(value, scheme):
    model = prepared(scheme)
    state = model.state_dict()
    (key,) = (key for key in state if key.endswith("scale.value") or key.endswith("scaling_impl.value"))
    state[key] = torch.tensor([value])
    with pytest.raises(ScaleError, match="finite"):
        model.load_state_dict(state)
