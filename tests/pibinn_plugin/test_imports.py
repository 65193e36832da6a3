"""Importing the plugin is cheap, silent, and brings no framework with it."""

import sys

import pytest
from fresh_process import run_code

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


def new_modules(statement):
    """Top-level packages that a statement adds to those of ``import torch``."""
    lines = run_code(
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
    result = run_code(
        "import torch, pibinn_plugin as pb\n"
        "model = pb.prepare(torch.nn.Linear(4, 4), {'weight': None})\n"
        "pb.convert(pb.freeze_signs(model))"
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_public_names_exist():
    result = run_code(
        "import pibinn_plugin as pb\nfor name in pb.__all__:\n    getattr(pb, name)\nprint(hasattr(pb, 'nope'))"
    )
    assert result.stdout == "False\n"


def without(framework, statement):
    """The error of a statement where a framework is not installed."""
    code = f"import sys\nsys.modules[{framework!r}] = None\n{statement}"
    return run_code(code, check=False).stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("framework", "extra", "statement"),
    [
        ("pytorch_lightning", "lightning", "import pibinn_plugin; pibinn_plugin.TwoStageQAT"),
        ("lightning_utilities", "lightning", "import pibinn_plugin; pibinn_plugin.TwoStageQAT"),
        ("jsonargparse", "lightning", "import runpy; runpy.run_module('lightning_modules', run_name='__main__')"),
        ("torchao", "torchao", "import pibinn_plugin.schemes as s; s.scheme_of('torchao')"),
        ("brevitas", "brevitas", "import pibinn_plugin.schemes as s; s.scheme_of('brevitas')"),
        (
            "onnx",
            "export",
            "import torch, pibinn_plugin as pb; l = torch.nn.Linear(2, 2); "
            "pb.export(pb.convert(pb.prepare(l, {'weight': None})), '/tmp/none.onnx', (torch.ones(1, 2),), 'onnx')",
        ),
    ],
)
def test_what_lacks_an_extra_says_which(framework, extra, statement):
    error = without(framework, statement)
    assert framework in error and f"pip install pibinn-plugin[{extra}]" in error
