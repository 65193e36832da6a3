"""Exported C: compiled by the host's compiler and run, and run on an emulated Cortex-M4."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from config_networks import INPUTS, config_network
from exported_networks import FEW_NETWORKS, weak_network
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.comparison import outputs_of
from pibinn_plugin.export import c_memory, c_signs
from pibinn_plugin.export.c_compiler import CORTEX_M4, memory_sizes, shared_library
from pibinn_plugin.export.sizes import export_sizes

pytest.importorskip("emx_onnx_cgen")
pytest.importorskip("onnxscript")

from pibinn_plugin.export import c as c_format

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "tests" / "cortex_m4"
if shutil.which("cc") is None:
    pytest.skip("no C compiler", allow_module_level=True)


def constants_of(path):
    """The float constants of a C file and the bytes of its packed ones."""
    source = path.read_text()
    floats = re.findall(r"^static const float \w+(?:\[\d+\])+ = \{(.*?)^\};", source, re.MULTILINE | re.DOTALL)
    packed = re.findall(r"^static const uint8_t \w+\[(\d+)\]", source, re.MULTILINE)
    return [re.findall(r"[-+]?0x[0-9a-f.]+p[-+]\d+", text) for text in floats], sum(map(int, packed))


# The others are in the networks of the configurations, below.
@pytest.mark.parametrize("name", sorted(FEW_NETWORKS.keys() - {"coupled_ista", "hidden_lista"}))
def test_c_of_weak_latents_is_the_network(name, tmp_path):
    model, x = weak_network(name)
    path = pb.export(model, tmp_path / "net.c", (x[:2],), "c")
    y = torch.randn_like(x[:2])
    with torch.no_grad():
        torch.testing.assert_close(c_format.runner(path)((y,)), outputs_of(model(y)), rtol=1e-4, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]
    # No weight is left in floats: of every 64 constants or more, the magnitudes differ.
    floats, _ = constants_of(path)
    assert all(len(values) < 64 or len({value.lstrip("-") for value in values} - {"0x0p+0"}) > 1 for values in floats)


def test_an_integer_input_and_two_outputs(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(6, 4)

        def forward(self, x, rows):
            return self.first(x) + self.second(rows.float()), self.first(x)

    model = pb.prepare(TwoInputs(), {"first.weight": None, "second.weight": pb.Banded(1, 3)})
    pb.export(model, tmp_path / "two-inputs.c", (torch.randn(2, 8), torch.randint(5, (2, 6))), "c")


def test_code_that_reads_a_constant_in_another_way_keeps_its_floats():
    values = ", ".join(["0x1.8p+0f"] * 64)
    source = f"""\
const EMX_UNUSED float weight1_w[8][8] = {{
    {values}
}};
EMX_NODE_FN void node0_copy(const float input0[8][8], float output[64]) {{
    const float *flat = (const float *)input0;
    for (idx_t i = 0; i < 64; ++i) output[i] = flat[i];
}}
void net(float y[64]) {{
    node0_copy(weight1_w, y);
}}
"""
    packed = c_signs.pack_constants(source)
    assert "static const float weight1_w[8][8]" in packed and "uint8_t weight1_w" not in packed


@pytest.mark.parametrize("mutation", ["the bits in reverse", "one place for everything"])
def test_a_file_that_computes_something_else_is_refused(mutation, tmp_path, monkeypatch):
    if mutation == "the bits in reverse":
        pack = numpy.packbits
        monkeypatch.setattr(c_signs.numpy, "packbits", lambda flags, bitorder: pack(flags, bitorder="big"))
    else:
        monkeypatch.setattr(c_memory, "_place", lambda temporaries: None)
    model, x = weak_network("coupled_ista")
    with pytest.raises(pb.ExportError, match="differs from the network by"):
        pb.export(model, tmp_path / "net.c", (x,), "c")
    assert not list(tmp_path.iterdir())


def test_what_the_generator_is_not_known_to_write_is_refused():
    with pytest.raises(pb.ExportError, match="no call of a node"):
        c_memory.share_memory("void net(float y[1]) {\n    if (1) node0(y);\n}\n")
    with pytest.raises(pb.ExportError, match="no function"):
        c_memory.share_memory("")


def test_refusals_name_what_to_do(tmp_path, monkeypatch):
    model, x = weak_network("dense")
    monkeypatch.setenv("CC", "no-such-compiler -m32")
    with pytest.raises(pb.ExportError, match="'no-such-compiler' was not found: install gcc, or name a compiler"):
        pb.export(model, tmp_path / "net.c", (x,), "c")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(pb.ExportError, match="false failed"):
        shared_library(tmp_path / "net.c", tmp_path)
    with pytest.raises(pb.ExportError, match="source code"):
        export_sizes(model, (x,), ["c"])
    assert not list(tmp_path.iterdir())


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", INPUTS)
def test_networks_of_the_configurations_run_on_a_small_device(name, tmp_path):
    """As the page for embedded engineers says, on this machine and on an emulated Cortex-M4."""
    model, x = config_network(name)
    path = pb.export(model, tmp_path / "network.c", (x,), "c")
    signs = pb.summary(model).payload_bytes
    with torch.no_grad():
        expected = model(x).flatten().numpy()
    _, packed = constants_of(path)
    assert signs <= packed
    sizes = memory_sizes(path)
    assert sizes.ram < 32_000 and sizes.flash < signs + 16_000
    if name == "eeg_eog":
        (program,) = code_blocks("embedded.md", "c")
        (tmp_path / "main.c").write_text(program)
        command = ["cc", "-std=c99", "-Wall", "-Werror", "-O2", "main.c", "network.c", "-o", "main", "-lm"]
        subprocess.run(command, cwd=tmp_path, check=True)
        printed = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, check=True, text=True).stdout
        with torch.no_grad():
            y = model((torch.arange(512.0) % 7 - 3)[None])[0]
        torch.testing.assert_close(torch.tensor([*map(float, printed.split())]), y, rtol=1e-4, atol=1e-5)
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no emulated Cortex-M4: {tool} is not installed (Debian: gcc-arm-none-eabi, qemu-system-arm)")
    assert memory_sizes(path, CORTEX_M4).ram == sizes.ram
    (tmp_path / "sizes.h").write_text(f"#define INPUTS {x.numel()}\n#define OUTPUTS {expected.size}\n")
    (tmp_path / "input.bin").write_bytes(x.numpy().tobytes())
    sources = [str(BOARD / "startup.c"), str(BOARD / "main.c"), "network.c"]
    options = ["-std=c99", "-O2", "-w", "-I.", "--specs=rdimon.specs", "-T", str(BOARD / "mps2_an386.ld"), "-lm"]
    subprocess.run([*shlex.split(CORTEX_M4), *sources, *options, "-o", "network.elf"], cwd=tmp_path, check=True)
    emulator = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel", "network.elf"]
    subprocess.run(emulator, cwd=tmp_path, check=True, timeout=120, stdin=subprocess.DEVNULL)
    there = numpy.fromfile(tmp_path / "output.bin", numpy.float32)
    numpy.testing.assert_allclose(there, expected, rtol=1e-4, atol=1e-6 * numpy.abs(expected).max())
