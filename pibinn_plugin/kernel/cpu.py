"""The backend for processors: a shared object, ``_kernel``, that implements the operators in C++.

It is optional: built from ``csrc/`` where there is a compiler, for any Python and torch. It takes signs as they are
stored and activations of 32 or 16 bits, and chooses among its paths at run time. The environment variable
``PIBINN_KERNEL`` (``torch``, ``portable``, ``avx2``, ``avx512``) forces one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pibinn_plugin.kernel.operators  # noqa: F401 - defines what the shared object implements
from pibinn_plugin.errors import PIBiNNError

LIBRARY = Path(__file__).with_name("_kernel.so")

_PATHS = ("torch", "portable", "avx2", "avx512")
_INTERFACE = 9  # of the shared object; raised with every change of its operators


def load() -> tuple[str, str]:
    """Load the shared object.

    Returns:
        the name of the path in use, and why it is ``torch`` where nobody asked for that.

    Raises:
        PIBiNNError: the environment variable names no path, or one that cannot be used here.
    """
    forced = os.environ.get("PIBINN_KERNEL", "")
    if forced not in ("", *_PATHS):
        raise PIBiNNError(f"PIBINN_KERNEL={forced!r}: expected torch, portable, avx2 or avx512")
    if forced == "torch":
        return "torch", ""
    name, reason = _load_library()
    if reason and forced:
        raise PIBiNNError(f"PIBINN_KERNEL={forced!r}, but the native kernel cannot be used: {reason}")
    return name, reason


def _load_library() -> tuple[str, str]:
    if not LIBRARY.exists():
        return "torch", f"it was not built: there is no {LIBRARY.name}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:  # built against a torch that is no longer there
        return "torch", str(error)
    if getattr(library, "pibinn_interface", lambda: None)() != _INTERFACE:
        return "torch", f"{LIBRARY.name} was built from other sources"
    library.pibinn_kernel.restype = ctypes.c_char_p
    name = library.pibinn_kernel().decode()
    if name.startswith("PIBINN_KERNEL"):
        raise PIBiNNError(name)
    return name, ""
