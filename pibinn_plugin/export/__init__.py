"""`export`: a packed network in the formats of other runtimes, each file checked against torch before it appears.

One module a format, with ``write`` (model, inputs and path to file) and ``runner`` (file to function); the framework of
a format is imported with its module, when it is used.
"""

from __future__ import annotations

import copy
import importlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pibinn_plugin.errors import ExportError, PIBiNNError
from pibinn_plugin.export.verify import Runner, verify
from pibinn_plugin.quantizer import GlobalScale
from pibinn_plugin.references import copy_of
from pibinn_plugin.unpack_signs import UnpackSigns
from pibinn_plugin.weights import (
    one_bit_weights,
    packed_weights,
    quantized_weights,
    register_scale,
    the_scale_value,
    uncompiled,
)
from pibinn_plugin.workflow import convert, evaluation, pack_in_place

__all__ = ["FORMATS", "export"]

FORMATS = ("onnx", "qonnx", "qcdq", "pt2", "aoti", "executorch", "c")

_EXTRAS = {"qonnx": "brevitas,export", "qcdq": "brevitas,export", "executorch": "executorch", "c": "export,c"}


def export(model: nn.Module, path: str | Path, args: Sequence[Tensor], format: str = "onnx") -> Path:
    """Write a one-bit network for another runtime; the file appears once it has been run and agrees with torch.

    The network is exported for inference on a CPU, whatever the mode and device of the model, which stays as it is.

    Args:
        model: what `convert` returned; or a prepared model, of which a packed copy is exported: the file is then
            compared with the prepared model itself.
        path: of the file; what was there stays until the new file is complete and checked.
        args: the inputs of the network, tensors whose first dimension is the batch.
        format: ``"onnx"`` (standard operators), ``"qonnx"`` or ``"qcdq"`` (Brevitas' formats), ``"pt2"``
            (``torch.export``), ``"aoti"`` (compiled by AOTInductor), ``"executorch"``, or ``"c"`` (one C99 file).

    Returns:
        The path.

    Raises:
        ExportError: an unknown format; a network that the format cannot hold; or a file whose outputs differ from the
            network's by more than 1e-4 of their largest magnitude, on ``args`` or on a second, random batch. There is
            no new file then.
        PIBiNNError: the model is neither packed nor prepared.
        ModuleNotFoundError: the format's framework is not installed.

    Example:
        >>> from pibinn_plugin import prepare
        >>> model = prepare(nn.Sequential(nn.Linear(16, 8)), {"0.weight": None})
        >>> export(model, f"{tmp_path}/net.pt2", args=(torch.randn(4, 16),), format="pt2").name
        'net.pt2'
    """
    framework = format_module(format)
    packed = packed_copy(model)
    inputs = checked_inputs(args)
    path = Path(path)
    # A folder and not another name: archives keep the name that they were written under.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unchecked = Path(folder) / path.name
        _write(framework, packed, inputs, unchecked, format)
        run = _runner(framework, unchecked, format)
        verify(run, _reference(model, packed), inputs, framework.DYNAMIC_BATCH)
        unchecked.replace(path)
    return path


def format_module(format: str) -> ModuleType:
    """The module that writes a format. Raises as `export` does."""
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    try:
        return importlib.import_module(f"pibinn_plugin.export.{format}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(format, "export")
        raise ModuleNotFoundError(
            f"format {format!r} needs {error.name}: pip install pibinn-plugin[{extra}]"
        ) from error


def packed_copy(model: nn.Module) -> nn.Module:
    """A packed copy in evaluation mode on the CPU, without gradients."""
    if quantized_weights(model):
        packed = convert(model)
    elif packed_weights(model):
        packed = copy_of(model)
    else:
        raise PIBiNNError("the model has no one-bit weight to export; prepare and train it first")
    packed = packed.cpu().eval().requires_grad_(False)
    for module in packed.modules():
        vars(module).pop("int8_activations", None)  # a choice of how the model runs here
    _unwrap_packed_tensors(packed)
    return packed


def _unwrap_packed_tensors(packed: nn.Module) -> None:
    """Turn weights that a framework packed as tensors of its own into the packed form, in place."""
    found = [weight for weight in one_bit_weights(packed) if not isinstance(weight.rule, UnpackSigns)]
    if not found:
        return
    scale = GlobalScale(the_scale_value(one_bit_weights(packed)), dtype=found[0].rule.scale.dtype)
    register_scale(packed, found[0].module, scale)
    for weight in found:
        pack_in_place(weight, weight.packed, scale)


def _reference(model: nn.Module, packed: nn.Module) -> Callable[..., Any]:
    """What the file is compared with: the trained model where it was given, else the packed copy."""
    root = uncompiled(model) if quantized_weights(model) else packed
    device = next(root.parameters()).device

    def run(*inputs: Tensor) -> Any:
        with evaluation(root), torch.no_grad():
            return root(*(x.to(device) for x in inputs))

    return run


def checked_inputs(args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs of a network, on the CPU. Raises `ExportError` for what is none."""
    if isinstance(args, Tensor) or not args or not all(isinstance(x, Tensor) and x.dim() > 0 for x in args):
        raise ExportError("args are the inputs of the network: expected a tuple of tensors with a batch dimension")
    if len({len(x) for x in args}) > 1 or not all(x.numel() for x in args):
        raise ExportError(f"the inputs have shapes {[tuple(x.shape) for x in args]}; expected one batch size, above 0")
    return tuple(x.detach().cpu() for x in args)


def _runner(framework: ModuleType, path: Path, format: str) -> Runner:
    try:
        return framework.runner(path)
    except Exception as error:  # each format's runtime has its own errors
        raise ExportError(f"what was written as {format!r} cannot be loaded again: {_one_line(error)}") from error


def _write(framework: ModuleType, packed: nn.Module, inputs: tuple[Tensor, ...], path: Path, format: str) -> None:
    try:
        framework.write(copy.deepcopy(packed), inputs, path)
    except (PIBiNNError, ModuleNotFoundError):
        raise
    except Exception as error:  # each framework has its own errors
        raise ExportError(f"the network cannot be exported as {format!r}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """What an exporter says, which may take pages in colours, as a part of one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(plain.split())[:300] or type(error).__name__
