"""The native kernel: one shared object for every Python and every torch from 2.11 on, built without either.

It calls torch through its stable C functions, which its sources declare, and nothing of Python. So the wheel is of no
version of Python; a C++ compiler is all that the build needs. Without one the package is built without the kernel.
"""

import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

FOLDER = Path("pibinn_plugin/kernel/csrc")
SOURCES = ("ops", "dispatch", "portable", "avx2", "avx512")
WITHOUT = """
******************************************************************************************************
pibinn_plugin is built WITHOUT its native kernel: packed networks run in plain torch, several times slower.
It needs a C++20 compiler (g++ 11 or clang 14; Debian and Ubuntu: apt install g++). Install one, then
install this package again. What failed: {error}
******************************************************************************************************
"""


class BuildKernel(build_ext):
    """Builds ``_kernel.so`` against a stand-in for torch's library, whose name is all that the linker needs."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without a tag of Python's: nothing in it is."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Build it, or say loudly that it was not, and why."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            empty = folder / "torch_cpu.cpp"
            empty.write_text("")
            objects = self.compiler.compile([str(empty)], output_dir="/" if empty.is_absolute() else "")
            self.compiler.link_shared_object(
                objects, str(folder / "libtorch_cpu.so"), extra_postargs=["-Wl,-soname,libtorch_cpu.so"]
            )
            ext.library_dirs.append(str(folder))
            super().build_extension(ext)
        except (BaseError, CCompilerError, CompileError, LinkError) as error:
            print(WITHOUT.format(error=error), file=sys.stderr)


class Wheel(bdist_wheel):
    """A wheel for a platform and for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


KERNEL = Extension(
    "pibinn_plugin.kernel._kernel",
    sources=[str(FOLDER / f"{name}.cpp") for name in SOURCES],
    depends=[str(path) for path in sorted(FOLDER.iterdir())],
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
    # In this order: named, though the stand-in has nothing of what is called.
    extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--unresolved-symbols=ignore-all"],
    language="c++",
)

COMMANDS: dict[str, Any] = {"build_ext": BuildKernel, "bdist_wheel": Wheel}
setup(ext_modules=[KERNEL], cmdclass=COMMANDS)
