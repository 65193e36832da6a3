"""The kernel for aarch64, built by a cross compiler and run by an emulator; all of its cases: tests/emulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "emulation"


def run(code):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{EMULATION}"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def tools():
    if missing := run("import aarch64; print(*aarch64.MISSING)").strip():
        pytest.skip(f"needs {missing}")


def test_products_of_the_portable_path_are_those_in_float64():
    count, error = run("import aarch64; print(*aarch64.main(24))").split()
    assert int(count) == 72
    assert float(error) <= 1.0


def test_the_shared_object_builds_without_torch(tmp_path):
    run(f"import aarch64; aarch64.build_library({str(tmp_path)!r})")
    machine = (tmp_path / "_kernel.so").read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # AArch64, as ELF numbers machines
