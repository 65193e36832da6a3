"""The parts of a C file as emx-onnx-cgen writes it: constants, a function a node, and one that calls them in turn."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pibinn_plugin.errors import ExportError

CONSTANT = re.compile(r"^const EMX_UNUSED (\w+) (\w+)((?:\[\d+\])+) = (\{.*?^\});\n", re.MULTILINE | re.DOTALL)
NODE = re.compile(r"^EMX_NODE_FN void (\w+)\((.*?)\) \{\n(.*?)^\}\n", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^void (\w+)\(([^)]*)\) \{\n(.*?)^\}\n", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"^    (\w+)\((.*)\);$", re.MULTILINE)
_PARAMETER = re.compile(r"(const )?(\w+) (\w+)((?:\[(?:restrict )?\d+\])+)$")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function, an array: ``const float input0[1][512]``."""

    is_constant: bool
    type: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """The function of a network: what it is called, its inputs and then its outputs."""

    name: str
    parameters: tuple[Parameter, ...]


def sizes(brackets: str) -> tuple[int, ...]:
    """The shape of an array.

    Example:
        >>> sizes("[restrict 1][512]")
        (1, 512)
    """
    return tuple(map(int, re.findall(r"\d+", brackets)))


def parameter(text: str) -> Parameter | None:
    """A parameter that is an array of numbers; None for any other.

    Example:
        >>> parameter("const float input0[1][512]")
        Parameter(is_constant=True, type='float', name='input0', shape=(1, 512))
    """
    found = _PARAMETER.fullmatch(text.strip())
    return found and Parameter(found[1] is not None, found[2], found[3], sizes(found[4]))


def entry_function(source: str) -> Function:
    """The function of the network. Raises `ExportError` where there is none, or one that takes other than arrays."""
    found = ENTRY.search(source)
    parameters = [parameter(text) for text in found[2].split(",")] if found else []
    if found is None or None in parameters:
        raise ExportError("the C file has no function of arrays of known size; expected what export wrote")
    return Function(found[1], tuple(each for each in parameters if each is not None))
