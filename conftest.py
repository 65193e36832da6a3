"""Names that every docstring example may use."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

# Too heavy for every environment, and a module that cannot be imported stops the collection of examples.
_OPTIONAL = {"executorch": "pibinn_plugin/export/executorch.py", "emx_onnx_cgen": "pibinn_plugin/export/c.py"}
collect_ignore = [path for package, path in _OPTIONAL.items() if importlib.util.find_spec(package) is None]
# It has no examples, and its tests choose how Triton is imported.
collect_ignore.append("pibinn_plugin/kernel/cuda.py")


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn, tmp_path=tmp_path)
