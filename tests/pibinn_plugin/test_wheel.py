"""The wheel, built in isolation: one for every Python, with the kernel in it. It takes minutes: PIBINN_WHEEL=1."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pibinn_plugin.kernel import cpu

ROOT = Path(__file__).parents[2]
# manylinux_2_28 is what has no newer symbols than these: of glibc, and of the C++ library of its compiler.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}

asked_for = pytest.mark.skipif("PIBINN_WHEEL" not in os.environ, reason="takes minutes: set PIBINN_WHEEL=1")


@pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the native kernel was not built")
@pytest.mark.skipif(sys.platform != "linux", reason="of ELF files")
def test_the_shared_object_needs_no_newer_system_than_its_wheel_says_and_nothing_of_python():
    content = cpu.LIBRARY.read_bytes()
    for name, version in re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)(?=\0)", content):
        assert tuple(map(int, version.split(b"."))) <= NEWEST[name.decode()], (name, version)
    assert b"libtorch_cpu.so\0" in content
    assert b"Py_" not in content and b"PyObject" not in content


@asked_for
@pytest.mark.slow
def test_a_wheel_that_is_built_in_isolation_has_the_kernel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=tree, check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("pibinn_plugin-") and "-py3-none-" in wheel.name and "any" not in wheel.name
    assert "pibinn_plugin/kernel/_kernel.so" in zipfile.ZipFile(wheel).namelist()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True
    )
    code = "from pibinn_plugin.functional import kernel; import pibinn_plugin; print(pibinn_plugin.__file__, kernel())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PIBINN_KERNEL": "portable"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/", check=True
    )
    assert run.stdout.split() == [str(tmp_path / "installed" / "pibinn_plugin" / "__init__.py"), "portable"]


@asked_for
@pytest.mark.slow
def test_a_build_without_a_compiler_says_so_and_how_to_get_the_kernel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=tree, check=True)
    environment = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    arguments = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)]
    build = subprocess.run(arguments, cwd=source, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert (
        "WITHOUT its native kernel" in build.stdout + build.stderr and "apt install g++" in build.stdout + build.stderr
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
