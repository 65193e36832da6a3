"""The C compiler that checks exported C, and what its object code takes of flash and RAM."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pibinn_plugin.errors import ExportError

CORTEX_M4 = "arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16"
_WARNINGS_ARE_OFF = ("-std=c99", "-w")


@dataclass(frozen=True)
class MemorySizes:
    """Bytes of the object code of a network: constants and code in flash, what changes in RAM, without the stack."""

    flash: int
    ram: int


def host_compiler() -> list[str]:
    """The compiler of this machine with its options: ``$CC``, or ``cc``.

    Raises:
        ExportError: there is none of that name.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise ExportError(
            f"format 'c' needs a C compiler to check the file, and {command[0]!r} was not found: install gcc, or name "
            f"a compiler for this machine in CC"
        )
    return command


def shared_library(source: Path, folder: Path) -> Path:
    """Compile a C file into a library that this machine can load. Raises `ExportError` where the compiler refuses."""
    library = folder / "network.so"
    options = ["-O2", "-shared", "-fPIC", "-x", "c", str(source), "-o", str(library), "-lm"]
    _run([*host_compiler(), *_WARNINGS_ARE_OFF, *options])
    return library


def memory_sizes(source: str | Path, compiler: str | None = None) -> MemorySizes:
    """Count what the code of a C file takes, by the compiler's own ``size``.

    Args:
        source: what ``export(..., format="c")`` wrote.
        compiler: a compiler and its options, such as `CORTEX_M4`; that of this machine unless given.

    Raises:
        ExportError: the compiler is not found, or refuses the file.
    """
    command = shlex.split(compiler) if compiler else host_compiler()
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "network.o"
        _run([*command, *_WARNINGS_ARE_OFF, "-Os", "-c", "-x", "c", str(source), "-o", str(compiled)])
        program = _run([*command, "-print-prog-name=size"]).strip() or "size"
        text, data, bss = map(int, _run([program, str(compiled)]).splitlines()[1].split()[:3])
    return MemorySizes(text + data, data + bss)


def memory_report(source: str | Path) -> str:
    """A line on what the code of a C file takes: on a Cortex-M4 where its compiler is installed, else on this machine.

    Raises:
        ExportError: no compiler is found, or it refuses the file.
    """
    is_cross = shutil.which(CORTEX_M4.split()[0]) is not None
    found = memory_sizes(source, CORTEX_M4 if is_cross else None)
    target = "a Cortex-M4" if is_cross else "this machine (install gcc-arm-none-eabi for a Cortex-M4)"
    return f"flash {found.flash:,} bytes, RAM {found.ram:,} bytes on {target}, without the C library and the stack"


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise ExportError(f"the C compiler {command[0]!r} was not found: install it, or name another") from error
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
        raise ExportError(f"{command[0]} failed: {reason:.300}") from error
