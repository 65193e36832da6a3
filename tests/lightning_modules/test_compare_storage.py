"""Packed files of baselines: packing, sizes on disk, and networks that are read back."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pibinn_plugin as pb
from lightning_modules.compare.callback import BASELINES, attach_baseline
from lightning_modules.compare.storage import load_baseline, pack_trits, save_baseline, stored_size, unpack_trits
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA
from pibinn_plugin.errors import ArtifactError
from pibinn_plugin.nn import BandedLinear

ALL = list(BASELINES)
COMPACT = {"layers.*.weight": None}


@given(codes=st.lists(st.integers(-1, 1), min_size=1, max_size=50), base=st.sampled_from([3, 4]))
def test_trits_come_back_from_bytes_of_five_or_four(codes, base):
    tensor = torch.tensor(codes, dtype=torch.float32)
    packed = pack_trits(tensor, base)
    assert packed.numel() == -(-len(codes) // {3: 5, 4: 4}[base])
    assert unpack_trits(packed, len(codes), base).tolist() == codes
    # An independent reading of the bytes, in Python's integers.
    count, radix = {3: (5, 3), 4: (4, 4)}[base]
    assert [packed.tolist()[i // count] // radix ** (i % count) % radix - 1 for i in range(len(codes))] == codes


def known_solver():
    return CoupledISTA(SignBlocks(2, 8, 16), layers=3)


def trained(solver, targets, quantizer):
    """A solver with every parameter moved, as training moves them."""
    attach_baseline(solver, targets, quantizer)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in solver.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return solver


class Mixed(nn.Module):
    """A masked linear layer, a band, a grouped convolution, a bias: every way a weight may be stored."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.masked = nn.Linear(12, 6)
        self.band = BandedLinear(6, 6, 1, 2)
        self.convolution = nn.Conv1d(2, 4, 3, groups=2)
        self.register_buffer("offset", torch.randn(4, 1))

    def forward(self, x):
        return self.convolution(self.band(self.masked(x)).unflatten(1, (2, 3))) + self.offset


MIXED = {"masked.weight": pb.BlockDiagonal(3), "band.weight": None, "convolution.weight": None}


@pytest.mark.parametrize("quantizer", ALL)
def test_the_network_that_is_read_gives_the_same_outputs(tmp_path, quantizer):
    solver = trained(known_solver(), COMPACT, quantizer)
    loaded = load_baseline(save_baseline(solver, quantizer, tmp_path / "net.safetensors"), known_solver())
    y = torch.randn(5, 16)
    assert torch.equal(loaded(y), solver(y))
    assert not torch.equal(loaded(y), known_solver()(y))
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("quantizer", [name for name in ALL if name != "parq"])
def test_masks_bands_and_convolutions_come_back(tmp_path, quantizer):
    model = trained(Mixed(), MIXED, quantizer)
    loaded = load_baseline(save_baseline(model, quantizer, tmp_path / "net.safetensors"), Mixed())
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        ("fp32_dense", 3 * 32 * 16 * 32 + 8),
        ("fp32", 3 * 256 * 32 + 48),
        ("fp16", 3 * 256 * 16 + 48),
        ("int8", 3 * (256 * 8 + 32) + 48),
        ("ternary_twn", 3 * (8 * 52 + 32) + 48),  # 256 trits in 52 bytes
        ("ternary_b158", 3 * (8 * 52 + 32) + 48),
        ("channel_wise", 3 * (256 + 32 * 32) + 48),  # two blocks of 16 rows
        ("layer_wise", 3 * (256 + 32) + 48),
        ("parq", 3 * (256 + 32) + 48),
        ("zero_bit", 0),
    ],
)
def test_sizes_are_those_of_the_file(tmp_path, quantizer, bits):
    solver = trained(known_solver(), COMPACT, quantizer)
    path = save_baseline(solver, quantizer, tmp_path / "net.safetensors")
    size = stored_size(path)
    assert size.weight_bits == bits  # codes, scales, and once 6 bytes of BlockDiagonal (1 of Dense)
    assert size.file_bytes == path.stat().st_size == size.file_bits // 8
    floats = 8 * 2 * 3 * 4  # three step sizes and three thresholds
    header = 8 * (8 + int.from_bytes(path.read_bytes()[:8], "little"))
    assert size.file_bits == size.weight_bits + floats + header


@pytest.mark.parametrize("quantizer", ["ternary_twn", "zero_bit"])
def test_equal_structures_are_stored_once_and_others_apart(tmp_path, quantizer):
    def model():
        torch.manual_seed(6)
        return nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(4)))

    masks = [pb.Mask(torch.rand(12, 12, generator=torch.Generator().manual_seed(seed)) < 0.2) for seed in range(2)]
    targets = {f"{layer}.weight": masks[layer % 2] for layer in range(4)}
    original = trained(model(), targets, quantizer)
    path = save_baseline(original, quantizer, tmp_path / "net.safetensors")
    with safe_open(path, "pt") as file:
        header, content = json.loads(file.metadata()["baseline"]), file.get_tensor("baseline.structures")
    assert bytes(content.tolist()) == masks[0].to_bytes() + masks[1].to_bytes()
    assert header["structures"] == [len(mask.to_bytes()) for mask in masks]
    assert header["layers"] == [["0.weight", 0], ["1.weight", 1], ["2.weight", 0], ["3.weight", 1]]
    loaded = load_baseline(path, model())
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(loaded, original, strict=True))


def test_two_bits_a_code(tmp_path):
    solver = trained(known_solver(), COMPACT, "ternary_b158")
    path = save_baseline(solver, "ternary_b158", tmp_path / "net.safetensors", trit_base=4)
    assert stored_size(path).weight_bits == 3 * (2 * 256 + 32) + 48
    y = torch.randn(5, 16)
    assert torch.equal(load_baseline(path, known_solver())(y), solver(y))


def test_a_global_file_is_counted_alike(tmp_path):
    packed = pb.convert(pb.prepare(known_solver(), COMPACT))
    size = stored_size(pb.save(packed, tmp_path / "net.safetensors"))
    report = pb.summary(packed)
    assert size.weight_bits == 8 * (report.payload_bytes + report.structure_bytes + report.scale_bytes)


def test_a_network_that_diverged_is_not_stored(tmp_path):
    solver = trained(known_solver(), COMPACT, "ternary_twn")
    with torch.no_grad():
        solver.layers[1].parametrizations.weight.original[0, 0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=r"layers\.1\.weight.*diverged"):
        save_baseline(solver, "ternary_twn", tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def rewritten(path, change):
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    header = json.loads(metadata["baseline"])
    change(tensors, header)
    save_file(tensors, path, metadata={"baseline": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.pop("baseline.codes"),
        lambda tensors, header: tensors.pop("thresholds"),
        lambda tensors, header: tensors.update(more=torch.zeros(1)),
        lambda tensors, header: tensors.update({"baseline.scales": torch.ones(4)}),
        lambda tensors, header: tensors.update({"baseline.scales": torch.ones(2)}),
        lambda tensors, header: header["layers"].pop(),
        lambda tensors, header: header.pop("structures"),
        lambda tensors, header: header["layers"][0].__setitem__(0, "layers.{0..1}.weight"),
        lambda tensors, header: header["layers"][0].__setitem__(1, -1),
        lambda tensors, header: header.update(structures=[5]),
        lambda tensors, header: header.update(structures=[-1, 7]),
        lambda tensors, header: header.update(quantizer="binary"),
        lambda tensors, header: header.pop("base"),
        lambda tensors, header: tensors.update({"baseline.codes": torch.zeros(7, dtype=torch.uint8)}),
        lambda tensors, header: tensors.update(thresholds=torch.zeros(5)),
    ],
)
def test_a_file_of_another_network_is_refused(tmp_path, change):
    path = save_baseline(
        trained(known_solver(), COMPACT, "ternary_twn"), "ternary_twn", tmp_path / "net.safetensors"
    )  # fmt: skip
    rewritten(path, change)
    with pytest.raises(ArtifactError, match="does not belong to this solver"):
        load_baseline(path, known_solver())


def test_no_file_and_no_packed_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no packed file"):
        load_baseline(tmp_path / "net.safetensors", known_solver())
    (tmp_path / "net.safetensors").write_bytes(b"text")
    with pytest.raises(ArtifactError, match="not a packed file"):
        stored_size(tmp_path / "net.safetensors")


def test_the_trained_network_stays_as_it_was(tmp_path):
    solver = trained(known_solver(), COMPACT, "channel_wise")
    before = copy.deepcopy(solver.state_dict())
    save_baseline(solver, "channel_wise", tmp_path / "net.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in solver.state_dict().items())
