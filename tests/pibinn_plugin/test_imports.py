"""Importing the plugin is cheap, silent, and brings no framework with it."""

import subprocess
import sys

import pytest

FRAMEWORKS = ("torchao", "brevitas", "pytorch_lightning", "lightning", "rich", "safetensors", "torchmetrics", "numpy")
CORE = (
    "structure",
    "bits",
    "quantizer",
    "packing",
    "packed",
    "functional",
    "nn",
    "weights",
    "targets",
    "workflow",
    "errors",
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def new_modules(statement):
    """Top-level packages that a statement adds to those of ``import torch``."""
    lines = run(
        "import sys, torch, typing_extensions\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    return set(lines.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import pibinn_plugin", "import pibinn_plugin.storage.summary", "import pibinn_plugin.schemes.native"]
)
def test_import_brings_torch_only(statement):
    added = new_modules(statement)
    assert not added & set(FRAMEWORKS)
    assert added - set(sys.stdlib_module_names) <= {"pibinn_plugin", "torch", "typing_extensions"}


def test_core_modules_bring_torch_only():
    added = new_modules("import " + ", ".join(f"pibinn_plugin.{name}" for name in CORE))
    assert added - set(sys.stdlib_module_names) <= {"pibinn_plugin", "torch", "typing_extensions"}


@pytest.mark.parametrize(("framework", "other"), [("torchao", "brevitas"), ("brevitas", "torchao")])
def test_trap_scheme_imports_its_own_framework_only(framework, other):
    added = new_modules(f"import pibinn_plugin.schemes.{framework}")
    assert framework in added
    assert other not in added


def test_import_and_workflow_print_nothing():
    result = run(
        "import torch, pibinn_plugin as pb\n"
        "model = pb.prepare(torch.nn.Linear(4, 4), {'weight': None})\n"
        "pb.convert(pb.freeze_signs(model))"
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_public_names_exist():
    result = run(
        "import pibinn_plugin as pb\nfor name in pb.__all__:\n    getattr(pb, name)\nprint(hasattr(pb, 'nope'))"
    )
    assert result.stdout == "False\n"
