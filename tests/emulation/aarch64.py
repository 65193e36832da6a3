"""The native kernel for aarch64, built by a cross compiler and run by qemu: its portable path, in vectors of NEON.

``apt install g++-aarch64-linux-gnu qemu-user``, then ``PYTHONPATH=. python tests/emulation/aarch64.py``; `cases` says
what is computed. `test_aarch64.py` runs some of it with the other tests.
"""

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from cases import REGIONS, SOURCES, report, run_cases

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


def build(folder):
    """The program to emulate; as the library is built, but in one piece."""
    program = f"{folder}/driver"
    sources = [Path(__file__).with_name("aarch64.cpp"), SOURCES / "portable.cpp"]
    options = ["-std=c++20", "-O3", "-Wno-psabi", "-static", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *options, *sources, "-o", program], check=True)
    return program


def build_library(folder):
    """The shared object, as setup.py builds it."""
    library = f"{folder}/_kernel.so"
    sources = [SOURCES / f"{name}.cpp" for name in ("ops", "dispatch", "portable", "avx2", "avx512")]
    options = ["-std=c++20", "-O3", "-Wno-psabi", "-fvisibility=hidden", "-fPIC", "-shared"]
    subprocess.run([COMPILER, *options, *sources, "-o", library], check=True)
    return library


class Process:
    """Runs functions of the driver in a process under qemu; with the methods of `processor.Processor`."""

    def __init__(self, program, regions):
        self.process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ends = {name: self._number(b"m", size) for name, size in regions.items()}

    def place(self, region, content):
        """Write bytes to the end of a region; their address."""
        address = self.ends[region] - len(content)
        self.write(address, content)
        return address

    def write(self, address, content):
        """Write bytes."""
        self._send(b"w", address, len(content), content=content)

    def read(self, address, count):
        """Read bytes."""
        self._send(b"r", address, count)
        return self._receive(count)

    def call(self, function, *arguments):
        """Run a function; what it returns."""
        return self._number({"in_blocks": b"b", "in_positions": b"p", "in_rows": b"s"}[function], *arguments)

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _number(self, command, *arguments):
        self._send(command, *arguments)
        return struct.unpack("<q", self._receive(8))[0]

    def _send(self, command, *arguments, content=b""):
        self.process.stdin.write(command + struct.pack(f"<{len(arguments)}q", *arguments) + content)
        self.process.stdin.flush()

    def _receive(self, count):
        content = self.process.stdout.read(count)
        if len(content) < count:
            raise RuntimeError(f"the emulated process ended with status {self.process.wait()}")
        return content


def main(count=400):
    """Run so many cases of each kind; how many products there were and their largest error."""
    with tempfile.TemporaryDirectory() as folder:
        process = Process(build(folder), REGIONS)
        result = run_cases(process, count)
        process.close()
    return result


if __name__ == "__main__":
    report(*main())
