"""Coverage-guided fuzzing of packed files: whatever the bytes, ``load`` succeeds or raises `ArtifactError`.

``pip install atheris``, then, with an empty folder CORPUS,
``python tests/fuzz/fuzz_artifact.py -max_total_time=600 CORPUS``.
Every input is tried on a float model, and a failed load must leave that model as it was.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pibinn_plugin"]):
    import torch
    from torch import nn

    import pibinn_plugin as pb

FOLDER = Path(tempfile.mkdtemp())


def build() -> nn.Module:
    """A small network with every kind of structure."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 4), nn.Linear(4, 4))


TARGETS = {
    "0.weight": pb.BlockDiagonal(2),
    "2.weight": pb.Banded(1, 2),
    "3.weight": pb.Mask(torch.arange(32).reshape(4, 8) % 3 == 0),
    "4.weight": pb.BlockDiagonal(rows=(1, 3), columns=(2, 2), row_order=(1, 0, 3, 2), column_order=(3, 1, 2, 0)),
}


def seed_file() -> bytes:
    """A valid packed file of that network."""
    path = pb.save(pb.convert(pb.prepare(build(), TARGETS)), FOLDER / "seed.safetensors")
    return path.read_bytes()


SEED = seed_file()
MODEL = build()
BEFORE = {name: value.clone() for name, value in MODEL.state_dict().items()}


def mutated(data: bytes) -> bytes:
    """Either the bytes as they are, or the valid file with pieces replaced, cut or inserted."""
    provider = atheris.FuzzedDataProvider(data)
    if provider.ConsumeBool():
        return provider.ConsumeBytes(provider.remaining_bytes())
    result = bytearray(SEED)
    for _ in range(provider.ConsumeIntInRange(1, 6)):
        start = provider.ConsumeIntInRange(0, len(result))
        stop = min(len(result), start + provider.ConsumeIntInRange(0, 16))
        result[start:stop] = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 16))
    return bytes(result)


def test_one_input(data: bytes) -> None:
    """One file: load it into a model of its own, or see the typed error and an untouched model."""
    path = FOLDER / "fuzzed.safetensors"
    path.write_bytes(mutated(data))
    global MODEL
    try:
        pb.load(path, into=MODEL)
    except pb.ArtifactError:
        state = MODEL.state_dict()
        assert state.keys() == BEFORE.keys()
        assert all(torch.equal(value, BEFORE[name]) for name, value in state.items())
    else:
        MODEL = build()


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
