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
    from safetensors import safe_open
    from safetensors.torch import load, save
    from torch import nn

    import pibinn_plugin as pb

FOLDER = Path(tempfile.mkdtemp())


def build() -> nn.Module:
    """A small network with every kind of structure, one of them twice."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    )


PERMUTED = pb.BlockDiagonal(rows=(1, 3), columns=(2, 2), row_order=(1, 0, 3, 2), column_order=(3, 1, 2, 0))
TARGETS = {
    "0.weight": pb.BlockDiagonal(2),
    "2.weight": pb.Banded(1, 2),
    "3.weight": pb.Mask(torch.arange(32).reshape(4, 8) % 3 == 0),
    "4.weight": PERMUTED,
    "5.weight": PERMUTED,
}


def seed_file() -> bytes:
    """A valid packed file of that network."""
    path = pb.save(pb.convert(pb.prepare(build(), TARGETS)), FOLDER / "seed.safetensors")
    return path.read_bytes()


SEED = seed_file()
TENSORS = load(SEED)
with safe_open(FOLDER / "seed.safetensors", "pt") as seed:
    METADATA = seed.metadata()["pibinn"]
MODEL = build()
BEFORE = {name: value.clone() for name, value in MODEL.state_dict().items()}


def spliced(data: bytes, provider: atheris.FuzzedDataProvider) -> bytes:
    """The bytes with pieces replaced, cut or inserted."""
    result = bytearray(data)
    for _ in range(provider.ConsumeIntInRange(1, 6)):
        start = provider.ConsumeIntInRange(0, len(result))
        stop = min(len(result), start + provider.ConsumeIntInRange(0, 16))
        result[start:stop] = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 16))
    return bytes(result)


def file_of(data: bytes) -> bytes:
    """Any bytes, a valid file spliced, or a valid safetensors file with spliced contents."""
    provider = atheris.FuzzedDataProvider(data)
    choice = provider.ConsumeIntInRange(0, 5)
    if choice == 0:
        return provider.ConsumeBytes(provider.remaining_bytes())
    if choice == 1:
        return spliced(SEED, provider)
    tensors, metadata = dict(TENSORS), METADATA
    if choice in (2, 3):
        metadata = spliced(METADATA.encode(), provider).decode(errors="replace")
    if choice in (3, 4):
        content = spliced(bytes(tensors["pibinn.structures"].tolist()), provider)
        tensors["pibinn.structures"] = torch.tensor(list(content), dtype=torch.uint8)
    if choice == 5:
        name = provider.PickValueInList(sorted(tensors))
        content = spliced(tensors[name].numpy().tobytes(), provider)
        size = tensors[name].element_size()
        flat = torch.frombuffer(
            bytearray(content[: len(content) // size * size] or bytes(size)), dtype=tensors[name].dtype
        )
        tensors[name] = flat if provider.ConsumeBool() else flat[: tensors[name].numel()]
    return save(tensors, metadata={"pibinn": metadata})


def test_one_input(data: bytes) -> None:
    """One file: load it into a model of its own, or see the typed error and an untouched model."""
    path = FOLDER / "fuzzed.safetensors"
    path.write_bytes(file_of(data))
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
