"""Names that every docstring example may use."""

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn, tmp_path=tmp_path)
