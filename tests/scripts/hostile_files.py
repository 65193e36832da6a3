"""Packed files of at most 1 MB that claim more than they hold, and what reads them in bounded time and memory.

``python tests/scripts/hostile_files.py`` loads each of them into the model it is meant for, with 2 s of processor time
and 500 MB of memory, and prints a line for each.
"""

import json
import resource
import signal
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import pibinn_plugin as pb

SECONDS, MEGABYTES = 2.0, 500
MOST_CHARACTERS = 1100  # of an error: 1000 of its own, and what a test may allow for
STEP = 8  # bytes of signs of a dense 8 x 8 weight

Entry = tuple[str, list[int], bytes]  # dtype, shape, content


def linear(inputs: int = 8, outputs: int = 8) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def on_meta(inputs: int, outputs: int) -> nn.Module:
    with torch.device("meta"):
        return linear(inputs, outputs)


def safetensors_file(header: str, content: bytes = b"") -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content


def packed_file(layers: list, stored: list[bytes], tensors: dict[str, Entry], **changes: object) -> bytes:
    """A file with that header, whatever it says; ``changes`` replace fields of the metadata."""
    fields = {"version": 3, "structures": list(map(len, stored)), "layers": layers, **changes}
    joined = b"".join(stored)
    entries = {
        "pibinn.scale": ("F32", [1], struct.pack("<f", 0.5)),
        "pibinn.structures": ("U8", [len(joined)], joined),
        **tensors,
    }
    header: dict = {"__metadata__": {"pibinn": json.dumps(fields)}}
    content = b""
    for name, (dtype, shape, data) in entries.items():
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += data
    return safetensors_file(json.dumps(header), content)


def one_weight(shape: list, structure: bytes, nnz: int, **tensors: Entry) -> bytes:
    return packed_file([["weight", shape, 0]], [structure], {"weight": signs(nnz), **tensors})


def signs(nnz: int) -> Entry:
    return "U8", [-(-nnz // 8)], bytes(-(-nnz // 8))


def stored_mask(shape: tuple[int, ...], encoding: int, tile: tuple[int, int], body: bytes) -> bytes:
    """The stored form of a mask, written by hand."""
    header = struct.pack(f"<BB{len(shape)}I", 3, len(shape), *shape)
    return header + struct.pack("<BII", encoding, *tile) + body


def stored_blocks(rows: list[int], columns: list[int]) -> bytes:
    count = len(rows)
    return struct.pack(f"<BBI{count + 1}I{count + 1}I", 1, 1, count, count, *rows, count, *columns)


def one_tile(size: int) -> bytes:
    return stored_mask((size, size), 1, (size, size), bytes([0, 1, 0]))


def many_masks(count: int) -> bytes:
    masks = [stored_mask((8, 8), 1, (1, 1), bytes([0, *[1] * 8, number % 8])) for number in range(count)]
    layers = [[f"{number}", [8, 8], number] for number in range(count)]
    return packed_file(layers, masks, {f"{number}": signs(1) for number in range(count)})


def with_repeated(text: str, replacement: str) -> bytes:
    """A valid file in whose header a piece of text is another one."""
    data = one_weight([8, 8], b"\0", 64)
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode()
    assert header.count(text) == 1
    return safetensors_file(header.replace(text, replacement).rstrip(), data[8 + length :])


def metadata_alone(text: str) -> bytes:
    return safetensors_file(json.dumps({"__metadata__": {"pibinn": text}}))


def dense_8(**tensors: Entry) -> bytes:
    return one_weight([8, 8], b"\0", 64, **tensors)


WEIGHT = '"weight": {"dtype": "U8", "shape": [8], "data_offsets": [5, 13]}'

# name: the file, the model it is loaded into, and words of the error; None where it is what it says.
HostileFile = tuple[Callable[[], bytes], Callable[[], nn.Module], str | None]
HOSTILE: dict[str, HostileFile] = {
    "one tile of 2^26": (lambda: one_weight([8192, 8192], one_tile(8192), 64), lambda: on_meta(8192, 8192), "8388608"),
    "one tile of 2^31": (lambda: one_weight([8, 8], stored_mask((2**31,), 1, (1, 2**31), bytes([0, 1, 0])), 64), linear,
                         "does not fit"),
    "dense 2^60": (lambda: one_weight([2**30, 2**30], b"\0", 64), linear, "inconsistent"),
    "one tile, all its bits": (lambda: one_weight([2000, 2000], one_tile(2000), 4_000_000), lambda: linear(2000, 2000),
                               None),
    "few blocks of a huge weight": (
        lambda: one_weight([2**16, 2**16], pb.BlockDiagonal(2**13).to_bytes(), 2**19), lambda: on_meta(2**16, 2**16),
        None),
    "a band of 2^18 diagonals": (
        lambda: one_weight([2**18, 1], pb.Banded(2**18 - 1, 0).to_bytes(), 2**18), lambda: on_meta(1, 2**18), None),
    "60000 blocks of nothing": (
        lambda: one_weight([8, 8], stored_blocks([0] * 60000 + [8], [0] * 60000 + [8]), 64), linear,
        "neither rows nor columns"),
    "60000 empty blocks": (
        lambda: one_weight([8, 60008], stored_blocks([0] * 60000 + [8], [1] * 60000 + [8]), 64),
        lambda: on_meta(60008, 8), None),
    "a thousand masks": (lambda: many_masks(1000), linear, "the model has no"),
    "9000 layers": (
        lambda: packed_file([[f"{n}", [8], 0] for n in range(9000)], [b"\0"], {f"{n}": signs(8) for n in range(9000)}),
        linear, "the model has no"),
    "30000 layers without bits": (
        lambda: packed_file([[f"{n}", [8], 0] for n in range(30000)], [b"\0"], {}), linear, "is missing"),
    "30000 structure numbers": (
        lambda: packed_file([[f"{n}", [8], n] for n in range(30000)], [b"\0"], {}), linear, "number their structures"),
    "15000 empty tensors": (
        lambda: dense_8(**{f"{n}": ("F32", [0], b"") for n in range(15000)}), linear, "the model has no"),
    "shape of 20000 dimensions": (lambda: one_weight([2] * 20000, b"\0", 64), linear, "20000 dimensions"),
    "shape of 300000 dimensions": (lambda: one_weight([1] * 300000, b"\0", 1), linear, "300000 dimensions"),
    "tensor of 300000 dimensions": (
        lambda: dense_8(bias=("F32", [1] * 300000, bytes(4))), lambda: nn.Linear(8, 8), "of shape (1, 1"),
    "tensor of 2^124 elements": (lambda: dense_8(bias=("F32", [2**62, 2**62], b"")), linear, "not a readable"),
    "empty tensor of 2^62 rows": (
        lambda: dense_8(bias=("F32", [2**62, 0], b"")), lambda: nn.Linear(8, 8), "4611686018427387904"),
    "tensor of -8 elements": (lambda: dense_8(bias=("F32", [-8], bytes(32))), linear, "not a readable"),
    "shape of -8": (lambda: one_weight([-8, -8], b"\0", 64), linear, "not a size"),
    "shape of 8.0": (lambda: one_weight([8.0, 8], b"\0", 64), linear, "not a size"),
    "shape of text": (lambda: one_weight(["8", 8], b"\0", 64), linear, "not a size"),
    "shape of true": (lambda: one_weight([True, 64], b"\0", 64), linear, "not a size"),
    "long text as a size": (lambda: one_weight(["8" * 300000], b"\0", 64), linear, "not a size"),
    "long text as a name": (
        lambda: packed_file([["x" * 400000, [8, 8], 0]], [b"\0"], {"x" * 400000: signs(64)}), linear,
        "the model has no"),
    "long text as a version": (lambda: packed_file([], [], {}, version="x\n" * 200000), linear, "format version"),
    "version 3.0": (lambda: packed_file([], [], {}, version=3.0), linear, "format version"),
    "two lengths of 4299 digits": (
        lambda: packed_file([["weight", [8, 8], 0]], [b"\0"], {"weight": signs(64)}, structures=[10**4299 - 1] * 12),
        linear, "stated"),
    "a length of 900000 digits": (
        lambda: metadata_alone('{"version": 3, "structures": [' + "9" * 900000 + '], "layers": []}'), linear,
        "malformed"),
    "a length of NaN": (lambda: metadata_alone('{"version": 3, "structures": [NaN], "layers": [["a", [8], 0]]}'),
                        linear, "pibinn.scale"),
    "a length of 1e999": (lambda: metadata_alone('{"version": 3, "structures": [1e999], "layers": [["a", [8], 0]]}'),
                          linear, "pibinn.scale"),
    "deep metadata": (lambda: metadata_alone("[" * 400000), linear, "malformed"),
    "deep header": (lambda: safetensors_file('{"a":' * 150000), linear, "not a readable"),
    "a header beyond the file": (lambda: struct.pack("<Q", 90_000_000) + b"{}", linear, "not a readable"),
    "a header of 2^63 bytes": (lambda: struct.pack("<Q", 2**63) + b"{}", linear, "not a readable"),
    "overlapping offsets": (lambda: with_repeated("[5, 13]", "[4, 12]"), linear, "not a readable"),
    "offsets beyond the file": (lambda: with_repeated("[5, 13]", "[5, 14]"), linear, "not a readable"),
    "a tensor twice": (lambda: with_repeated(WEIGHT, f"{WEIGHT}, {WEIGHT}"), linear, "'weight' is given twice"),
    "a version twice": (lambda: with_repeated('{\\"version\\": 3', '{\\"version\\": 9, \\"version\\": 3'), linear,
                        "'version' is given twice"),
    "scale of NaN": (lambda: dense_8(**{"pibinn.scale": ("F32", [1], struct.pack("<f", float("nan")))}), linear,
                     "scale is nan"),
    "scale of infinity": (lambda: dense_8(**{"pibinn.scale": ("F64", [1], struct.pack("<d", float("inf")))}), linear,
                          "scale is inf"),
    "bits of complex numbers": (lambda: dense_8(weight=("C64", [1], bytes(8))), linear, "complex64"),
}  # fmt: skip


class OutOfTime(BaseException):
    """More processor time than a file may take."""


def limit_memory(megabytes: int) -> None:
    """Let this process have so much more memory than it has now."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(status.split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, resource.RLIM_INFINITY))


def outcome(data: bytes, model: nn.Module, folder: Path) -> str:
    """``loaded``, or the error; raises what is neither, such as `OutOfTime`."""
    path = folder / "hostile.safetensors"
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        pb.load(path, into=model)
    except pb.ArtifactError as error:
        return str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "loaded"


def stop(*_: object) -> None:
    raise OutOfTime


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    with tempfile.TemporaryDirectory() as folder:
        outcome(dense_8(), linear(), Path(folder))  # what is imported at first use is no part of a file
        limit_memory(MEGABYTES)
        for name, (data, model, _) in HOSTILE.items():
            content, into = data(), model()
            assert len(content) <= 1_000_000, name
            try:
                result = outcome(content, into, Path(folder))
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            print(json.dumps([name, result]), flush=True)


if __name__ == "__main__":
    main()
