"""C++ beside a benchmark, compiled for it."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path


def compiled_library(source: str, *flags: str) -> ctypes.CDLL:
    """The shared library of a C++ file of this folder; needs a compiler."""
    compiler = shutil.which("g++") or "c++"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/library.so"
        command = [compiler, "-O3", "-shared", "-fPIC", *flags, str(Path(__file__).with_name(source)), "-o", library]
        subprocess.run(command, check=True)
        return ctypes.CDLL(library)
