"""The analysis package as a whole: its page, its imports, and that everything in it has a caller."""

import ast
import importlib
import inspect
import re
from pathlib import Path

from fresh_process import run_code

import lightning_modules.analysis

PAGE = Path(__file__).parents[3] / "docs" / "analysis.md"
PACKAGE = Path(lightning_modules.analysis.__file__).parent


def test_the_page_names_functions_that_are_there_and_every_module():
    page = PAGE.read_text()
    table = [line for line in page[page.index("## Which question") :].splitlines() if re.match(r"\| .*` \|$", line)]
    named = set()
    for line in table:
        functions, modules = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[2:4])
        found = [importlib.import_module(f"lightning_modules.analysis.{module}") for module in modules]
        for function in functions:
            assert any(function in module.__all__ for module in found), function
        named |= set(modules)
    assert named == {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "network", "examples"}


def test_every_function_has_a_caller_beside_its_tests():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.parent.rglob("*.py")]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for path in PACKAGE.glob("*.py"):
        module = importlib.import_module(f"lightning_modules.analysis.{path.stem}")
        functions = {name for name in getattr(module, "__all__", ()) if inspect.isfunction(getattr(module, name))}
        assert functions <= used, path.name


def test_importing_the_plugin_leaves_it_out():
    assert run_code("import sys, pibinn_plugin; print('lightning_modules' in sys.modules)").stdout == "False\n"
