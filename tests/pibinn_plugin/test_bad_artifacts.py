"""Bad packed files: each is an error by name that leaves the model alone."""

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from artifact_network import INTO, TARGETS, Network, assert_refused, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pibinn_plugin import ArtifactError, convert, global_scale, load, prepare, save
from pibinn_plugin.storage import packed_file
from pibinn_plugin.storage.header import digest
from pibinn_plugin.storage.layer_names import expand
from pibinn_plugin.structure import BlockDiagonal


@pytest.fixture
def path(tmp_path):
    return save(convert(trained()), tmp_path / "net.safetensors")


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


def test_a_file_of_format_3_is_read(path):
    loaded, batch = load(as_format_3(path), into=Network(1)).eval(), torch.randn(5, 8)
    assert torch.equal(loaded(batch), convert(trained())(batch))


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
