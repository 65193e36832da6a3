"""Packed files: what is saved is what is loaded, and a bad file is an error that leaves the model alone."""

import copy
import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from artifact_network import INTO, SCHEMES, TARGETS, Network, assert_refused, trained
from full_disk import full_disk
from torch import nn

from pibinn_plugin import (
    ArtifactError,
    PIBiNNError,
    ScaleError,
    convert,
    global_scale,
    load,
    prepare,
    save,
    summary,
)
from pibinn_plugin.storage import atomic_file
from pibinn_plugin.structure import Banded, BlockDiagonal
from pibinn_plugin.weights import packed_weights


@pytest.fixture(scope="module")
def packed():
    return convert(trained())


@pytest.fixture
def path(packed, tmp_path):
    return save(packed, tmp_path / "net.safetensors")


@pytest.fixture
def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def weight_bits(model):
    return {weight.name: weight.tensor for weight in packed_weights(model)}


@pytest.mark.parametrize("into", INTO)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_model_is_the_saved_one(scheme, into, tmp_path, batch):
    original = convert(trained(scheme))
    save(original, tmp_path / "net.safetensors")
    model = INTO[into]()
    loaded = load(tmp_path / "net.safetensors", into=model)
    assert loaded is model
    loaded.eval()
    assert weight_bits(loaded).keys() == weight_bits(original).keys()
    assert all(torch.equal(bits, weight_bits(original)[name]) for name, bits in weight_bits(loaded).items())
    assert torch.equal(loaded(batch), original(batch))
    assert torch.equal(global_scale(loaded).value, global_scale(original).value)
    again = save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "net.safetensors").read_bytes()


@pytest.mark.parametrize("into", [lambda: nn.Linear(8, 4), lambda: prepare(nn.Linear(8, 4), {"weight": None})])
def test_bare_root_layer(into, tmp_path, batch):
    packed = convert(prepare(nn.Linear(8, 4), {"weight": None}))
    loaded = load(save(packed, tmp_path / "net.safetensors"), into=into())
    torch.testing.assert_close(loaded(batch), packed(batch))
    assert torch.equal(loaded.weight, packed.weight)


def test_raw_parameters(tmp_path):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ParameterList(torch.randn(4, 4) for _ in range(2))

    packed = convert(prepare(Raw(), {"steps.*": BlockDiagonal(2)}))
    loaded = load(save(packed, tmp_path / "net.safetensors"), into=Raw())
    assert all(torch.equal(one, other) for one, other in zip(loaded.steps, packed.steps, strict=True))


def test_tied_float_parameters_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        return model

    packed = convert(prepare(tied(), {"0.weight": None}))
    path = save(packed, tmp_path / "net.safetensors")
    with torch.device("meta"):
        on_meta = tied()
    for into in (tied(), on_meta):
        loaded = load(path, into=into)
        assert loaded[1].weight is loaded[2].weight
        assert loaded[1].weight.requires_grad
        assert torch.equal(loaded[1].weight, packed[1].weight)
    untied = convert(prepare(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), {"0.weight": None}))
    assert_refused(save(untied, path), tied(), r"2\.weight.*one tensor in the model", size=4)


def test_trap_model_packed_by_torchao_is_saved_as_plain_tensors(tmp_path, batch):
    """torchao's own support is a prototype with allow-lists, and ``save_file`` of a tensor subclass fails."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    from pibinn_plugin.schemes.torchao import PIBiNNWeightOnlyConfig

    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), {"*.weight": BlockDiagonal(2)}, "torchao")
    by_workflow = save(convert(model), tmp_path / "workflow.safetensors")
    quantize_(model, QATConfig(PIBiNNWeightOnlyConfig(), step="convert"))
    by_torchao = save(model, tmp_path / "torchao.safetensors")
    assert by_torchao.read_bytes() == by_workflow.read_bytes()
    loaded = load(by_torchao, into=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    torch.testing.assert_close(loaded(batch), model(batch))


def test_two_scales_of_torchao_tensors_are_refused(tmp_path):
    from torchao.quantization import quantize_

    from pibinn_plugin.schemes.torchao import PIBiNNWeightOnlyConfig

    layers = [nn.Linear(8, 8), nn.Linear(8, 4)]
    for layer in layers:
        quantize_(layer, PIBiNNWeightOnlyConfig())
    with pytest.raises(ScaleError, match="2 global scales"):
        save(nn.Sequential(*layers), tmp_path / "net.safetensors")


def test_stock_safetensors_reads_the_file(packed, path):
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["pibinn"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header["version"] == 4
    assert header["structures"] == [len(BlockDiagonal(2).to_bytes()), 6, len(TARGETS["last.weight"].to_bytes())]
    assert header["layers"] == [
        ["solver.layers.{0..2}.weight", [8, 8], 0, 32],
        ["solver.compact.weight", [8, 8], 1, 16],
        ["last.weight", [4, 8], 2, 20],
    ]
    assert torch.equal(tensors["pibinn.signs"], torch.cat(list(weight_bits(packed).values())))
    assert torch.equal(tensors["pibinn.scale"], global_scale(packed)().detach())
    assert torch.equal(tensors["gain"], packed.gain)
    assert torch.equal(safetensors.torch.load_file(path)["norm.running_mean"], packed.norm.running_mean)


def test_file_without_its_header_is_the_sum_of_the_summary(packed, path):
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header_bytes == summary(packed).total_bytes
    assert summary(packed).total_bytes == summary(trained()).total_bytes  # the promise before packing


def test_layers_that_are_alike_take_no_bytes_of_the_header(tmp_path):
    targets = {"solver.layers.*.linear.weight": BlockDiagonal(16)}
    model = nn.Module()
    model.solver = nn.Module()
    model.solver.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(64, 64, bias=False)}) for _ in range(30))
    path = save(convert(prepare(model, targets)), tmp_path / "net.safetensors")
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert header_bytes <= 512


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_failing_save_keeps_the_old_file(failing, path, packed, monkeypatch):
    before = path.read_bytes()
    changed = copy.deepcopy(packed)
    global_scale(changed).set(9.0)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if failing == "replace":
        monkeypatch.setattr(atomic_file.os, "replace", fail)
    with (
        full_disk(100 if failing == "write" else -1),
        pytest.raises(OSError, match=r"no space|File too large.*net.saf"),
    ):
        save(changed, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    monkeypatch.undo()
    save(changed, path)
    assert path.read_bytes() != before


def test_saved_file_has_ordinary_permissions(path):
    other = path.with_suffix(".other")
    other.write_bytes(b"")
    assert path.stat().st_mode == other.stat().st_mode


def test_what_is_not_packed_is_refused(tmp_path):
    for model in (Network(), prepare(Network(), TARGETS)):
        with pytest.raises(PIBiNNError, match="convert it first"):
            save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1e-60, 0.1, 0.5])
def test_the_scale_of_a_double_model_is_stored_exactly(value, tmp_path):
    """In float32 1e-60 would be 0, and 0.1 another weight than the trained one."""
    model = prepare(nn.Linear(4, 4).double(), {"weight": None})
    global_scale(model).set(value)
    path = save(convert(model), tmp_path / "net.safetensors")
    loaded = load(path, into=nn.Linear(4, 4).double())
    assert torch.equal(loaded.weight, model.weight)
    assert summary(loaded).scale_bytes == (4 if value == 0.5 else 8)
    if value != 0.5:
        with pytest.raises(ArtifactError, match="float32"):
            load(path, into=nn.Linear(4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path, batch):
    def make():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)

    model = prepare(make(), {"0.weight": BlockDiagonal(2), "1.weight": Banded(1, 1)})
    global_scale(model).set(0.375)
    packed = convert(model)
    loaded = load(save(packed, tmp_path / "net.safetensors"), into=make())
    assert loaded[0].weight.dtype == dtype
    assert torch.equal(loaded(batch.to(dtype)), packed(batch.to(dtype)))


def test_a_file_of_format_2_is_read():
    """Written by the release before format 3: λ in float32, the shared activation under both of its names."""
    activation = nn.PReLU(3)
    model = nn.ModuleDict({"first": nn.Linear(8, 6), "second": nn.Linear(6, 6), "conv": nn.Conv1d(2, 4, 3, bias=False)})
    model.update({"act": activation, "again": activation})
    load(Path(__file__).parents[1] / "data" / "format_2.safetensors", into=model)
    assert global_scale(model)().item() == 0.20046453177928925
    sums = [
        (weight.double() * torch.arange(1, weight.numel() + 1).reshape(weight.shape)).sum().item()
        for weight in (model["first"].weight, model["second"].weight, model["conv"].weight)
    ]
    assert sums == pytest.approx([-1.2027871906757355, -1.4032517224550247, 21.24924036860466])
    assert model["again"] is activation


def test_a_symbolic_link_stays_one(packed, tmp_path):
    (tmp_path / "folder").mkdir()
    target = save(packed, tmp_path / "folder" / "net.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    before = target.read_bytes()
    changed = copy.deepcopy(packed)
    global_scale(changed).set(9.0)
    save(changed, link)
    assert link.is_symlink()
    assert target.read_bytes() != before


def test_complex_buffers_are_stored_and_quantized_ones_refused(tmp_path):
    class Network(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("spectrum", buffer)

    spectrum = torch.randn(4, dtype=torch.complex64)
    packed = convert(prepare(Network(spectrum), {"layer.weight": None}))
    loaded = load(save(packed, tmp_path / "net"), into=Network(torch.zeros_like(spectrum)))
    assert torch.equal(loaded.spectrum, spectrum)
    sparse = convert(prepare(Network(torch.eye(3).to_sparse()), {"layer.weight": None}))
    with pytest.raises(ArtifactError, match=r"'spectrum' is stored as torch\.sparse_coo"):
        save(sparse, tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("is_meta", [True, False])
def test_biases_on_meta_and_in_strides_are_loaded(is_meta, tmp_path):
    layer = nn.Linear(16, 8)
    layer.bias = nn.Parameter(torch.randn(16)[::2])
    packed = convert(prepare(layer, {"weight": None}))
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x))
    path = save(packed, tmp_path / "net")
    with torch.device("meta" if is_meta else "cpu"):
        fresh = nn.Linear(16, 8)
    fresh.bias.requires_grad_(False)
    loaded = load(path, into=fresh)
    assert not loaded.bias.requires_grad
    torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("into", INTO)
def test_what_was_not_trained_stays_so(into, path):
    """A frozen head, or a λ that is known."""
    model = INTO[into]()
    frozen = ["norm.weight", "last.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if "prepared" in into:
        global_scale(model).value.requires_grad_(False)
    load(path, into=model)
    assert all(not model.get_parameter(name).requires_grad for name in frozen)
    assert model.norm.bias.requires_grad
    assert global_scale(model).value.requires_grad == ("prepared" not in into)
