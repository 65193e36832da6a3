"""The AVX-512 path of the native kernel on an emulated processor: for machines without AVX-512.

``pip install bochscpu-python`` (Linux, glibc 2.38 or newer), then ``PYTHONPATH=. python tests/emulation/avx512.py``. It
prints the number of products and their largest error in units of the allowed one; `cases` says what they are.
"""

import subprocess
import tempfile
from pathlib import Path

from cases import REGIONS, SOURCES, report, run_cases
from processor import Processor

FREESTANDING = "-O3 -std=c++20 -ffreestanding -nostdlib -static -fno-pie -no-pie -fno-stack-protector -fno-exceptions"


def build(folder):
    """The program to emulate."""
    program = f"{folder}/driver"
    sources = [Path(__file__).with_name("driver.cpp"), SOURCES / "avx512.cpp"]
    options = [*FREESTANDING.split(), "-fno-builtin", "-fno-rtti", f"-I{SOURCES}", "-Wl,-e,in_blocks"]
    subprocess.run(["g++", *options, *sources, "-o", program], check=True)
    return program


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = run_cases(Processor(build(folder), REGIONS))
    report(*result)
