"""Constant arrays of generated C as bits: those whose elements are -a, 0 and a, as all one-bit weights are.

The function that reads such an array gets the bits and reads a sign where it read a float: nothing is unpacked into
RAM. A sign operator of the physics has the same two values and is stored in the same way.
"""

from __future__ import annotations

import math
import re

import numpy

from pibinn_plugin.export.c_source import CALL, CONSTANT, ENTRY, NODE, parameter, sizes

_FEWEST_ELEMENTS = 64  # below, an array of floats is no loss

# The bits of the signs, set where an element is positive; for arrays with zeros, the bits of what is nonzero follow.
_READ = """\
static inline float pibinn_sign(const uint8_t *bits, idx_t index, float magnitude) {
    return (bits[index >> 3] >> (index & 7)) & 1 ? magnitude : -magnitude;
}
static inline float pibinn_masked_sign(const uint8_t *bits, idx_t mask, idx_t index, float magnitude) {
    return (bits[mask + (index >> 3)] >> (index & 7)) & 1 ? pibinn_sign(bits, index, magnitude) : 0.0f;
}

"""


def pack_constants(source: str) -> str:
    """Store two- and three-valued float arrays as bits, make every constant static, and drop those that none reads.

    Args:
        source: of a network, from emx-onnx-cgen.

    Returns:
        A source that computes the same, bit for bit.
    """
    nodes = {found[1]: found[0] for found in NODE.finditer(source)}
    original = dict(nodes)
    entry = ENTRY.search(source)
    calls = [(found[1], found[2].split(", ")) for found in CALL.finditer(entry[3] if entry else "")]
    constants = {}
    for found in CONSTANT.finditer(source):
        readers = [(function, arguments.index(found[2])) for function, arguments in calls if found[2] in arguments]
        constants[found[0]] = _constant(found, readers, nodes) if readers else ""
    source = re.sub(r"^extern const .*;\n", "", source, flags=re.MULTILINE)
    first = next(iter(constants), None)
    for text, replacement in constants.items():
        source = source.replace(text, (_READ if text is first else "") + replacement, 1)
    for name, text in nodes.items():
        source = source.replace(original[name], text, 1)
    return source


def _constant(found: re.Match[str], readers: list[tuple[str, int]], nodes: dict[str, str]) -> str:
    """The definition of a constant; where it becomes bits, the functions that read it are rewritten in ``nodes``."""
    as_it_is = found[0].replace("const EMX_UNUSED", "static const", 1)
    shape = sizes(found[3])
    if found[1] != "float" or math.prod(shape) < _FEWEST_ELEMENTS:
        return as_it_is
    values = _values(found[4])
    magnitudes = numpy.unique(numpy.abs(values[values != 0]))
    if len(values) != math.prod(shape) or len(magnitudes) != 1 or not numpy.isfinite(magnitudes[0]):
        return as_it_is
    bits = numpy.packbits(values > 0, bitorder="little")
    mask = len(bits) if (values == 0).any() else None
    if mask is not None:
        bits = numpy.concatenate([bits, numpy.packbits(values != 0, bitorder="little")])
    rewritten: dict[str, str] = {}
    for function, position in readers:
        text = rewritten.get(function, nodes[function])
        if (reading := _reading_bits(text, position, shape, len(bits), mask, float(magnitudes[0]))) is None:
            return as_it_is
        rewritten[function] = reading
    nodes |= rewritten
    lines = ("    " + ", ".join(map(str, bits[start : start + 24])) for start in range(0, len(bits), 24))
    return f"static const uint8_t {found[2]}[{len(bits)}] = {{\n" + ",\n".join(lines) + "\n};\n"


def _values(braces: str) -> numpy.ndarray:
    numbers = re.findall(r"[-+]?0x[0-9a-f.]+p[-+]?\d+|[-+]?\d+\.\d*|NAN|INFINITY", braces)
    return numpy.array([float.fromhex(number) if "x" in number else float(number) for number in numbers])


def _reading_bits(
    text: str, position: int, shape: tuple[int, ...], count: int, mask: int | None, magnitude: float
) -> str | None:
    """The function of a node with the array at a position read as bits; None where it reads it in some other way."""
    node = NODE.match(text)
    assert node is not None
    parameters = node[2].split(", ")
    given = parameter(parameters[position])
    if given is None or math.prod(given.shape) != math.prod(shape):
        return None
    number = f"{magnitude.hex()}f"

    def read(found: re.Match[str]) -> str:
        indices = re.findall(r"\[([^\[\]]+)\]", found[0])
        index = f"({indices[0]})"
        for size, each in zip(given.shape[1:], indices[1:], strict=True):
            index = f"({index} * {size} + ({each}))"
        arguments = f"{given.name}, {index}, {number}" if mask is None else f"{given.name}, {mask}, {index}, {number}"
        return f"pibinn_{'sign' if mask is None else 'masked_sign'}({arguments})"

    element = re.compile(rf"\b{given.name}(?:\[[^\[\]]+\]){{{len(given.shape)}}}")
    if re.search(rf"\b{given.name}\b", element.sub("", node[3])):
        return None
    parameters[position] = f"const uint8_t {given.name}[{count}]"
    return f"EMX_NODE_FN void {node[1]}({', '.join(parameters)}) {{\n{element.sub(read, node[3])}}}\n"
