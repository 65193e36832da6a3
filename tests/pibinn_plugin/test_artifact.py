"""Packed files: what is saved is what is loaded, and a bad file is an error that leaves the model alone."""

import copy
import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from pibinn_plugin.nn import BlockDiagonalLinear
from pibinn_plugin.storage import atomic_file, packed_file
from pibinn_plugin.storage.header import digest
from pibinn_plugin.storage.layer_names import expand
from pibinn_plugin.structure import Banded, BlockDiagonal, Mask
from pibinn_plugin.weights import packed_weights

SCHEMES = ("native", "torchao", "brevitas")
TARGETS = {
    "solver.layers.*.weight": BlockDiagonal(2),
    "solver.compact.weight": None,
    "last.weight": Mask([[1, 0, 0, 1, 1, 1, 0, 1]] * 4),
}


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.solver = nn.Module()
        self.solver.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.solver.compact = BlockDiagonalLinear(8, 8, 4, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)
        self.register_buffer("gain", torch.rand(3))

    def forward(self, x):
        for layer in self.solver.layers:
            x = torch.tanh(layer(x)) * self.gain[0]
        return self.last(self.norm(self.solver.compact(x)))


def trained(scheme="native", seed=0):
    model = prepare(Network(seed), TARGETS, scheme)
    model(torch.randn(16, 8))  # statistics of the batch norm
    return model.eval()


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


INTO = {
    "float": lambda: Network(1),
    "meta": lambda: meta_network(),
    **{f"prepared {scheme}": lambda scheme=scheme: prepare(Network(1), TARGETS, scheme) for scheme in SCHEMES},
    "prepared meta": lambda: prepare(meta_network(), TARGETS),
}


def meta_network():
    with torch.device("meta"):
        return Network()


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


def state_of(model):
    """Everything that loading could have touched: tensors, types, identities."""
    return (
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()
         if isinstance(value, torch.Tensor)},
    )  # fmt: skip


def assert_refused(path, into, words, size=8):
    before, input = state_of(into), torch.ones(2, size)
    into.eval()
    output = into(input)
    with pytest.raises(ArtifactError, match=words):
        load(path, into)
    after = state_of(into)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for key, (identity, value) in before[1].items():
        if "_extra_state" not in key:
            assert after[1][key][0] == identity
        assert torch.equal(after[1][key][1], value)
    assert torch.equal(into(input), output)


def parts_of(path):
    """The tensors and the JSON metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["pibinn"])  # noqa: SIM118


def as_format_3(path):
    """The file as the release before format 4 wrote it: a tensor for each weight, and no digest."""
    tensors, header = parts_of(path)
    entries = [(name, shape, number, nnz) for entry, shape, number, nnz in header["layers"] for name in expand(entry)]
    bits = tensors.pop("pibinn.signs").split([-(-nnz // 8) for *_, nnz in entries])
    tensors |= {name: each.clone() for (name, *_), each in zip(entries, bits, strict=True)}
    header = {"version": 3, "structures": header["structures"], "layers": [list(entry[:3]) for entry in entries]}
    safetensors.torch.save_file(tensors, path, {"pibinn": json.dumps(header)})
    return path


def rewritten(path, change):
    """The file with its tensors and JSON metadata changed, and the digest that belongs to the change."""
    tensors, header = parts_of(path)
    change(tensors, header)
    if header.pop("digest", None) is not None:
        header["digest"] = digest(header, tensors)
    safetensors.torch.save_file(tensors, path, {"pibinn": json.dumps(header)})
    return path


# Changes to a file of format 3.
BAD = {
    "nan scale": (lambda t, h: t.update({"pibinn.scale": torch.tensor([float("nan")])}), "scale is nan"),
    "zero scale": (lambda t, h: t.update({"pibinn.scale": torch.tensor([0.0])}), "scale is 0"),
    "negative scale": (lambda t, h: t.update({"pibinn.scale": torch.tensor([-1.0])}), "positive"),
    "infinite scale": (lambda t, h: t.update({"pibinn.scale": torch.tensor([float("inf")])}), "finite"),
    "half scale": (lambda t, h: t.update({"pibinn.scale": torch.ones(1).half()}), "one float32"),
    "scale of another dtype": (lambda t, h: t.update({"pibinn.scale": torch.tensor([1 / 3]).double() / 7}), "dtype"),
    "two scales": (lambda t, h: t.update({"pibinn.scale": torch.ones(2)}), "one float32"),
    "no scale": (lambda t, h: t.pop("pibinn.scale"), "pibinn.scale"),
    "no structures": (lambda t, h: t.pop("pibinn.structures"), "pibinn.structures"),
    "version 1": (lambda t, h: (h.update(version=1), h.pop("structures")), "version 1"),
    "version 5": (lambda t, h: h.update(version=5), "version 5"),
    "version 4 without its fields": (lambda t, h: h.update(version=4), "malformed"),
    "no version": (lambda t, h: h.pop("version"), "version"),
    "no layers": (lambda t, h: h.update(layers=[]), "no layer"),
    "layer twice": (lambda t, h: h.update(layers=h["layers"] + h["layers"][:1]), "twice"),
    "layers of another form": (lambda t, h: h.update(layers={"last.weight": 3}), "malformed"),
    "negative size": (lambda t, h: h["layers"][0].__setitem__(1, [-8, -8]), "malformed"),
    "fractional size": (lambda t, h: h["layers"][0].__setitem__(1, [8.0, 8]), "malformed"),
    "huge size": (lambda t, h: h["layers"][0].__setitem__(1, [2**38, 2**38]), "solver.layers.0.weight"),
    "missing weight": (lambda t, h: t.pop("last.weight"), "'last.weight' is missing"),
    "short weight": (lambda t, h: t.update({"last.weight": t["last.weight"][:-1]}), "last.weight"),
    "float weight": (lambda t, h: t.update({"last.weight": t["last.weight"].float()}), "last.weight"),
    "other shape": (lambda t, h: h["layers"][0].__setitem__(1, [4, 16]), "solver.layers.0.weight"),
    "other structure": (lambda t, h: t["pibinn.structures"].__setitem__(2, 4), "solver.layers.0.weight"),
    "no structure": (lambda t, h: t["pibinn.structures"].__setitem__(0, 99), "structure 0"),
    "structure length": (lambda t, h: h["structures"].__setitem__(0, 7), "structures take"),
    "huge structure length": (lambda t, h: h["structures"].__setitem__(0, 2**70), "structures take"),
    "no structure lengths": (lambda t, h: h.pop("structures"), "malformed"),
    "structure number": (lambda t, h: h["layers"][4].__setitem__(2, 3), "expected all of 0 to 2"),
    "missing float": (lambda t, h: t.pop("norm.running_var"), "norm.running_var"),
    "unknown float": (lambda t, h: t.update(extra=torch.ones(1)), "extra"),
    "float of another shape": (lambda t, h: t.update(gain=torch.ones(4)), "'gain' is torch.float32 of shape"),
    "float of another dtype": (lambda t, h: t.update(gain=torch.ones(3).double()), "'gain' is torch.float64"),
    "renamed layer": (
        lambda t, h: (
            h["layers"][0].__setitem__(0, "other.weight"),
            t.update({"other.weight": t["last.weight"].clone()}),
        ),
        "other.weight",
    ),
}


@pytest.mark.parametrize("into", ["float", "prepared native", "prepared brevitas"])
@pytest.mark.parametrize("defect", BAD)
def test_bad_file_is_refused_by_name_and_the_model_is_untouched(defect, into, path):
    change, words = BAD[defect]
    assert_refused(rewritten(as_format_3(path), change), INTO[into](), words)


def entry(number, position, value):
    return lambda t, h: h["layers"][number].__setitem__(position, value)


# Changes to a file of format 4, whose digest follows them.
BAD_4 = {
    "no signs": (lambda t, h: t.pop("pibinn.signs"), "'pibinn.signs' is missing"),
    "short signs": (lambda t, h: t.update({"pibinn.signs": t["pibinn.signs"][:-1]}), "not the 17 bytes"),
    "float signs": (lambda t, h: t.update({"pibinn.signs": t["pibinn.signs"].float()}), "not the 17 bytes"),
    "one sign fewer": (entry(2, 3, 19), "has 20 signs, and not the 19 stated"),
    "one byte fewer": (entry(2, 3, 16), "not the 16 bytes"),
    "negative signs": (entry(2, 3, -20), "malformed"),
    "signs as text": (entry(2, 3, "20"), "malformed"),
    "a range of other names": (entry(0, 0, "solver.layers.{1..3}.weight"), r"layers\.3\.weight"),
    "a range that ends early": (entry(0, 0, "solver.layers.{2..0}.weight"), "range of none"),
    "a range of 10^9": (entry(0, 0, "solver.layers.{0..999999999}.weight"), "more than 1048576 layers"),
    "a range over another": (entry(1, 0, "solver.layers.1.weight"), "twice"),
    "no number of signs": (lambda t, h: h["layers"][0].pop(), "malformed"),
    "an entry of nothing": (lambda t, h: h["layers"].append([]), "malformed"),
    "a name in an entry's place": (lambda t, h: h["layers"].append("last.weight"), "malformed"),
    "no digest": (lambda t, h: h.pop("digest"), "malformed"),
    "a recipe of text": (lambda t, h: h.update(solver="os.system"), "is no recipe"),
    "nested inputs": (lambda t, h: h.update(inputs={"kind": {}}), "expected names with numbers or text"),
    "an operator": (lambda t, h: h.update(operators={"physics.matrix": [1.0, 0.5, 0.5, 0.5]}), "the model lacks"),
    "half an operator": (lambda t, h: h.update(operators={"physics.matrix": [1.0]}), "no projections"),
    "an operator of nothing": (lambda t, h: h.update(operators=[1]), "malformed"),
    "nan scale": (lambda t, h: t.update({"pibinn.scale": torch.tensor([float("nan")])}), "scale is nan"),
    "missing float": (lambda t, h: t.pop("norm.running_var"), "norm.running_var"),
}


@pytest.mark.parametrize("defect", BAD_4)
def test_bad_file_of_format_4_is_refused_by_name_and_the_model_is_untouched(defect, path):
    change, words = BAD_4[defect]
    assert_refused(rewritten(path, change), Network(1), words)


@pytest.mark.parametrize("change", [
    lambda t, h: t["pibinn.signs"][3:4].bitwise_not_(),
    lambda t, h: t["norm.running_mean"].add_(1e-3),
    lambda t, h: t.update(gain=t["gain"].double()),
    lambda t, h: h.update(inputs={"sampling_rate": 512.0}),
    lambda t, h: h["layers"].reverse(),
])  # fmt: skip
def test_a_change_without_its_digest_is_damage(change, path):
    tensors, header = parts_of(path)
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, {"pibinn": json.dumps(header)})
    assert_refused(path, Network(1), "is damaged: its content is not what was written")


def test_a_hundred_inverted_bytes_are_damage(path):
    data = bytearray(path.read_bytes())
    for position in range(len(data) - 100, len(data)):
        data[position] ^= 255
    path.write_bytes(bytes(data))
    assert_refused(path, Network(1), "is damaged")


def test_a_file_of_format_3_is_read(path, packed, batch):
    loaded = load(as_format_3(path), into=Network(1)).eval()
    assert torch.equal(loaded(batch), packed(batch))


def test_file_without_our_metadata_or_no_file_at_all(tmp_path, path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert_refused(tmp_path / "plain.safetensors", Network(), "not written by pibinn_plugin")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert_refused(tmp_path / "empty.safetensors", Network(), "not a readable")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04N.")
    assert_refused(tmp_path / "pickle.pt", Network(), "not a readable")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors", Network())


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            packed_file.read(path)


def test_file_of_another_model_is_refused(path):
    assert_refused(path, nn.Sequential(nn.Linear(8, 8)), "does not belong")
    other = {**TARGETS, "solver.layers.*.weight": BlockDiagonal(4)}
    assert_refused(path, prepare(Network(), other), r"solver\.layers\.0\.weight.*blocks=2.*blocks=4")
    fewer = {"last.weight": TARGETS["last.weight"]}
    assert_refused(path, prepare(Network(), fewer), "prepared for")
    assert_refused(path, convert(prepare(Network(), other)), r"solver\.layers\.0\.weight.*blocks=2.*blocks=4")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_bytes_give_an_artifact_error_or_a_valid_model(path, data):
    """Nothing else: no crash, no other exception, no NaN weights."""
    original = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", original[:8])
    mutated = bytearray(original)
    region = data.draw(st.sampled_from([(0, 8), (8, 8 + header_bytes), (8 + header_bytes, len(original))]))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(region[0], region[1] - 1))] = data.draw(st.integers(0, 255))
    target = path.with_suffix(".mutated")
    target.write_bytes(bytes(mutated))
    model = Network()
    try:
        load(target, model)
    except ArtifactError:
        assert type(model.last) is nn.Linear
        return
    weights = [layer.weight for layer in (*model.solver.layers, model.last)]
    scale = global_scale(model)().item()
    assert 0 < scale < float("inf")
    assert all(set(weight.abs().unique().tolist()) <= {0.0, scale} for weight in weights)


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
