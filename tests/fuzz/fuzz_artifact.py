"""Coverage-guided fuzzing of what is read: whatever the bytes, it is loaded or refused, in bounded time and memory.

``pip install atheris``, then, with an empty folder CORPUS,
``PYTHONPATH=. python tests/fuzz/fuzz_artifact.py -max_total_time=600 -max_len=100000 CORPUS``.
A packed file is loaded into a float or a prepared model, and the structures of a state dict into a prepared one. An
error is `ArtifactError` or `StructureError` and short, a failed load of a file leaves the model as it was, and no input
takes more than 2 s of processor time or 500 MB of memory.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pibinn_plugin"]):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load, save
    from torch import nn

    import pibinn_plugin as pb
    from pibinn_plugin.storage import header

# A digest that always fits: almost no mutated file would come past the real one.
header.digest = lambda fields, tensors: "0" * 32

FOLDER = Path(tempfile.mkdtemp())
SECONDS, BYTES, CHARACTERS = 2.0, 500 * 2**20, 1000


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
HEADER_BYTES = int.from_bytes(SEED[:8], "little")
HEADER, CONTENT = json.loads(SEED[8 : 8 + HEADER_BYTES]), SEED[8 + HEADER_BYTES :]
VALUES = [
    *(0, -1, 2**31, 2**32, 2**40 - 1, 2**62, 2**63, 10**4000),
    *(True, None, 1.5, 8.0, float("nan"), float("inf"), "x", "x" * 5000, "0.weight"),
    *([], {}, [[]], [8, 8], [2] * 5000, [1] * 5000, list(range(5000))),
]


def changed(value: object, provider: atheris.FuzzedDataProvider) -> object:
    """A JSON value with something in it replaced by what nobody would write."""
    if provider.ConsumeIntInRange(0, 3) == 0 or not value or not isinstance(value, list | dict):
        return provider.PickValueInList(VALUES)
    result: object = list(value) if isinstance(value, list) else dict(value)
    key = provider.ConsumeIntInRange(0, len(value) - 1) if isinstance(value, list) else None
    key = provider.PickValueInList(sorted(value)) if key is None else key
    result[key] = changed(result[key], provider)
    return result


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
    choice = provider.ConsumeIntInRange(0, 7)
    if choice == 0:
        return provider.ConsumeBytes(provider.remaining_bytes())
    if choice == 1:
        return spliced(SEED, provider)
    if choice == 6:
        header = json.dumps(changed(HEADER, provider)).encode()
        return len(header).to_bytes(8, "little") + header + CONTENT
    tensors, metadata = dict(TENSORS), METADATA
    if choice == 7:
        metadata = json.dumps(changed(json.loads(METADATA), provider))
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


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Models:
    """A model of each kind, made anew once something was loaded into it."""

    def __init__(self) -> None:
        self.makers = {"float": build, "prepared": lambda: pb.prepare(build(), TARGETS)}
        self.models = {kind: make() for kind, make in self.makers.items()}
        self.before = {kind: state_of(model) for kind, model in self.models.items()}

    def load(self, kind: str, path: Path) -> None:
        model = self.models[kind]
        try:
            pb.load(path, into=model)
        except pb.ArtifactError as error:
            check_message(error)
            state = model.state_dict()
            assert state.keys() == self.before[kind].keys()
            assert all(torch.equal(value, self.before[kind][name]) for name, value in state.items())
        else:
            self.models[kind] = self.makers[kind]()
            self.before[kind] = state_of(self.models[kind])


MODELS = Models()
PREPARED = pb.prepare(build(), TARGETS)
STATE = PREPARED.state_dict()
STRUCTURE_KEYS = [key for key in STATE if key.endswith("_extra_state")]


def check_message(error: Exception) -> None:
    assert len(str(error)) <= CHARACTERS
    assert len(str(error).splitlines()) == 1


def try_state_dict(provider: atheris.FuzzedDataProvider) -> None:
    """The stored structure of one weight replaced."""
    key = provider.PickValueInList(STRUCTURE_KEYS)
    content = spliced(bytes(STATE[key].tolist()), provider) if provider.ConsumeBool() else provider.ConsumeBytes(50000)
    state = torch.tensor(list(content), dtype=torch.uint8)
    if provider.ConsumeBool() and len(state):
        state = state[:1].expand(provider.PickValueInList([2, 10**6, 2**40]))
    try:
        PREPARED.load_state_dict({**STATE, key: state})
    except pb.StructureError as error:
        check_message(error)


def limit_memory() -> None:
    """Once, behind everything that is imported at first use."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(status.split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, resource.RLIM_INFINITY))


def test_one_input(data: bytes) -> None:
    """One file or state dict: loaded, or the typed error and an untouched model, within the limits."""
    provider = atheris.FuzzedDataProvider(data)
    kind = provider.PickValueInList(["float", "prepared", "state dict"])
    path = FOLDER / "fuzzed.safetensors"
    if kind != "state dict":
        path.write_bytes(file_of(provider.ConsumeBytes(provider.remaining_bytes())))
    start = time.process_time()
    if kind == "state dict":
        try_state_dict(provider)
    else:
        MODELS.load(kind, path)
    assert time.process_time() - start <= SECONDS


if __name__ == "__main__":
    torch.set_num_threads(1)
    (FOLDER / "fuzzed.safetensors").write_bytes(SEED)
    MODELS.load("float", FOLDER / "fuzzed.safetensors")
    atheris.Setup(sys.argv, test_one_input)
    limit_memory()
    atheris.Fuzz()
