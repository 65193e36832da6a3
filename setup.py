"""The native kernel: built where there is a compiler, and torch to build against; left out elsewhere."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = ("ops", "dispatch", "portable", "avx2", "avx512")


def extensions() -> list[Extension]:
    """The shared object of the kernel, against the stable ABI of the torch that is installed."""
    try:
        import torch
    except ModuleNotFoundError:  # an isolated build: torch is not among its requirements, it would be a second copy
        return []
    root, folder = Path(torch.__file__).parent, Path("pibinn_plugin/kernel/csrc")
    return [
        Extension(
            "pibinn_plugin.kernel._kernel",
            sources=[str(folder / f"{name}.cpp") for name in SOURCES],
            depends=[str(path) for path in sorted(folder.iterdir())],
            include_dirs=[str(root / "include")],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000ULL")],  # torch 2.11, the oldest supported
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
