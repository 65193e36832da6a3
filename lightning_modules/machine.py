"""One sentence about the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["machine"]


def machine() -> str:
    """Processor, its vector instructions as torch sees them, cores, threads, and versions.

    Example:
        >>> machine().endswith(f"torch {torch.__version__}.")
        True
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return (
        f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"thread(s), no GPU used; Python {platform.python_version()}, torch {torch.__version__}."
    )
