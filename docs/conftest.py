"""The code blocks of the pages are tests: Python runs, and commands are parsed with the configs that they name."""

import contextlib
import io
import os
import shlex
import tempfile
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

from lightning_modules.cli import main

REPOSITORY = Path(__file__).parents[1]
collect_ignore = ["conf.py", "pictures", "gallery"]  # the gallery runs when the pages are built


def parse_commands(example):
    for line in example.parsed.splitlines():
        command = shlex.split(line, comments=True)
        if command[:1] == ["pibinn"]:
            command = ["python", "-m", "lightning_modules", *command[1:]]
        if command[:3] == ["python", "-m", "lightning_modules"] and command[3] not in ("compare", "apply", "frames"):
            with (
                contextlib.chdir(REPOSITORY),
                contextlib.redirect_stdout(io.StringIO()),
                pytest.raises(SystemExit) as exit,
            ):
                main([*command[3:], "--print_config"])
            assert exit.value.code == 0, line


def enter_new_folder(namespace):
    namespace["_folder"] = os.getcwd()
    os.chdir(tempfile.mkdtemp())


def leave_folder(namespace):
    os.chdir(namespace["_folder"])


pytest_collect_file = Sybil(
    parsers=[SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", parse_commands)],
    patterns=["*.md"],
    setup=enter_new_folder,
    teardown=leave_folder,
).pytest()
