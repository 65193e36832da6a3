"""An emulated processor with AVX-512, which runs the functions of a program that needs no operating system."""

import ctypes
import struct
import subprocess
from pathlib import Path

import bochscpu
import bochscpu.cpu
import bochscpu.memory

PAGE = bochscpu.memory.page_size()
TABLES = 0x10_0000  # where the page tables lie
HALT = b"\xf4"
GENERAL_PROTECTION = 13  # what a halt is for a program
ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8")


class Processor:
    """Runs functions of an ELF program in memory whose regions are followed by pages that are not there.

    Args:
        program: path of a static program at fixed addresses.
        regions: name of each region of memory to its size in bytes.
    """

    def __init__(self, program, regions):
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self._missing
        self.pages = {}
        content = Path(program).read_bytes()
        listing = subprocess.check_output(["nm", program], text=True)
        self.symbols = {name: int(address, 16) for address, _, name in map(str.split, listing.splitlines())}
        table, count = struct.unpack_from("<Q", content, 32)[0], struct.unpack_from("<H", content, 56)[0]
        for number in range(count):
            kind, _, offset, address, _, stored, size, _ = struct.unpack_from("<IIQQQQQQ", content, table + 56 * number)
            if kind == 1:  # to be loaded
                self._map(address, size)
                self.write(address, content[offset : offset + stored])
        self.ends = {}
        address = 0x1000_0000
        for name, size in {**regions, "stack": 1 << 18}.items():
            self._map(address, size)
            self.ends[name] = address + -(-size // PAGE) * PAGE
            address = self.ends[name] + PAGE
        self.page_tables = bochscpu.memory.PageMapLevel4Table()  # kept: it owns the tables
        for page in self.pages:
            self.page_tables.insert(page, page, 1)
        for host, page in self.page_tables.commit(TABLES):
            bochscpu.memory.page_insert(page, host)

    def place(self, region, content):
        """Write bytes to the end of a region; their address."""
        address = self.ends[region] - len(content)
        self.write(address, content)
        return address

    def write(self, address, content):
        """Write bytes."""
        for start, host, count in self._pieces(address, len(content)):
            ctypes.memmove(host, content[start : start + count], count)

    def read(self, address, count):
        """Read bytes."""
        return b"".join(ctypes.string_at(host, piece) for _, host, piece in self._pieces(address, count))

    def call(self, function, *arguments):
        """Run a function until it halts; what is in rax then."""
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr0 |= 1 << 1  # vector instructions,
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # their state,
        state.xcr0 = 0xE7  # and that of AVX-512
        state.cr3, state.mxcsr, state.rflags = TABLES, 0x1F80, 2
        state.cs = _segment(0x33, 0x22FB)
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(state, name, _segment(0x2B, 0xCF3))
        state.rip, state.rsp = self.symbols[function], self.ends["stack"] - 8  # as after a call
        for register, value in zip(ARGUMENTS, arguments, strict=False):
            setattr(state, register, value)
        self.session.cpu.state = state
        hook, exceptions = bochscpu.Hook(), []

        def stop(session, processor, vector, code):
            exceptions.append(vector)
            session.stop()

        hook.exception = stop
        self.session.run([hook])
        address = self.session.cpu.rip
        if exceptions != [GENERAL_PROTECTION] or self.read(address - 1, 1) != HALT:
            raise RuntimeError(f"{function} stopped at {address:#x} with exceptions {exceptions}")
        return self.session.cpu.rax

    def _map(self, address, size):
        for page in range(address // PAGE * PAGE, address + size, PAGE):
            if page not in self.pages:
                self.pages[page] = bochscpu.memory.allocate_host_page()
                bochscpu.memory.page_insert(page, self.pages[page])

    def _pieces(self, address, count):
        """Start, address on this machine and length of the part on each page."""
        start = 0
        while start < count:
            page, offset = divmod(address + start, PAGE)
            piece = min(PAGE - offset, count - start)
            yield start, self.pages[page * PAGE] + offset, piece
            start += piece

    @staticmethod
    def _missing(address):
        raise RuntimeError(f"no memory at {address:#x}")


def _segment(selector, attributes):
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.attr = True, selector, attributes
    segment.base, segment.limit = 0, 0xFFFF_FFFF
    return segment
