"""The kernel for aarch64, built by a cross compiler and run by an emulator; all of its cases: tests/emulation."""

from pathlib import Path

import pytest
from fresh_process import run_code

EMULATION = str(Path(__file__).parents[1] / "emulation")


def run(code):
    return run_code(f"import sys; sys.path.insert(0, {EMULATION!r}); import aarch64; {code}").stdout


@pytest.fixture(scope="module", autouse=True)
def tools():
    if missing := run("print(*aarch64.MISSING)").strip():
        pytest.skip(f"needs {missing}")


def test_products_of_the_portable_path_are_those_in_float64():
    count, error = run("print(*aarch64.main(24))").split()
    assert int(count) == 72
    assert float(error) <= 1.0


def test_the_shared_object_builds_without_torch(tmp_path):
    run(f"aarch64.build_library({str(tmp_path)!r})")
    machine = (tmp_path / "_kernel.so").read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # AArch64, as ELF numbers machines
