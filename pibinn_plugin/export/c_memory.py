"""The intermediate values of generated C in static arrays that they share: each has its place while it is needed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pibinn_plugin.errors import ExportError
from pibinn_plugin.export.c_source import CALL, ENTRY, sizes

_DECLARATION = re.compile(r"^    (\w+) (\w+)((?:\[\d+\])+);$", re.MULTILINE)


@dataclass
class _Temporary:
    """An intermediate value: its elements, and the first and the last call that needs it."""

    type: str
    name: str
    shape: tuple[int, ...]
    first: int
    last: int
    offset: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.count

    @property
    def pointer(self) -> str:
        """The declaration of a pointer that is used as the array was."""
        inner = "".join(f"[{size}]" for size in self.shape[1:])
        declared, cast = (f"(*const {self.name}){inner}", f"(*){inner}") if inner else (f"*const {self.name}", "*")
        return f"    {self.type} {declared} = ({self.type} {cast})(memory_{self.type} + {self.offset});"


def share_memory(source: str) -> str:
    """Move the local arrays of the network's function to static memory, one array for each type of element.

    The generator gives each of them a place of its own on the stack, which is hundreds of times what is alive at once.
    One array for each type, because C lets no object be written as one type and read as another.

    Args:
        source: of a network, from emx-onnx-cgen.

    Raises:
        ExportError: the function is not a list of calls.
    """
    entry = ENTRY.search(source)
    if entry is None:
        raise ExportError("the C generator wrote no function of the network; its version is not one this is tested on")
    body = entry[3]
    if left := CALL.sub("", _DECLARATION.sub("", body)).strip():
        raise ExportError(f"the C generator wrote what is no call of a node: {left.splitlines()[0].strip()}")
    calls = [set(found[2].split(", ")) for found in CALL.finditer(body)]
    temporaries = [_temporary(found, calls) for found in _DECLARATION.finditer(body)]
    lengths = {}
    for kind in sorted({each.type for each in temporaries}):
        _place(alike := [each for each in temporaries if each.type == kind])
        lengths[kind] = max(each.end for each in alike)
    memory = "".join(f"static {kind} memory_{kind}[{length}];\n" for kind, length in lengths.items())
    pointers = "".join(f"{each.pointer}\n" for each in temporaries)
    function = entry[0].replace(body, pointers + _DECLARATION.sub("", body).lstrip("\n"))
    return source.replace(entry[0], memory + "\n" + function)


def _temporary(found: re.Match[str], calls: list[set[str]]) -> _Temporary:
    used = [number for number, arguments in enumerate(calls) if found[2] in arguments]
    return _Temporary(found[1], found[2], sizes(found[3]), min(used, default=0), max(used, default=0))


def _place(temporaries: list[_Temporary]) -> None:
    """Give each the lowest offset that is free while it is alive, the largest first."""
    placed: list[_Temporary] = []
    for each in sorted(temporaries, key=lambda each: -each.count):
        alive = [other for other in placed if other.first <= each.last and each.first <= other.last]
        candidates = [0, *sorted(other.end for other in alive)]
        each.offset = next(
            start
            for start in candidates
            if all(start + each.count <= other.offset or other.end <= start for other in alive)
        )
        placed.append(each)
