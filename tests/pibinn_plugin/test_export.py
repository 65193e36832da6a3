"""The exports that need no Brevitas: onnx, pt2, aoti, executorch."""

import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from exported_networks import FEW_NETWORKS, NETWORKS, SCHEMES, RawParameter, random_mask, weak_network
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.comparison import outputs_of
from pibinn_plugin.export import program
from pibinn_plugin.export.sizes import export_sizes
from pibinn_plugin.nn import CompactLinear

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

_RUN_WITHOUT_PLUGIN = """
import sys
sys.modules["pibinn_plugin"] = None  # importing it is an error
import torch
inputs, expected = torch.load(sys.argv[1])
if sys.argv[3] == "pt2":
    network = torch.export.load(sys.argv[2]).module()
else:
    import torch._inductor
    network = torch._inductor.aoti_load_package(sys.argv[2])
torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=1e-5)
"""


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path))
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def run_without_plugin(path, model, x, tmp_path, format):
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "batch.pt")
    command = [sys.executable, "-c", _RUN_WITHOUT_PLUGIN, str(tmp_path / "batch.pt"), str(path), format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FEW_NETWORKS)
def test_onnx_of_weak_latents_is_the_network(name, tmp_path):
    model, x = weak_network(name)
    path = pb.export(model, tmp_path / "net.onnx", (x,))
    for batch in (1, 3, 6):  # dynamic
        y = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(run_onnx(path, y), outputs_of(model(y)), rtol=1e-4, atol=1e-6)
    file = onnx.load(path)
    assert {opset.domain for opset in file.opset_import} == {""} and not file.functions
    assert file.opset_import[0].version >= 18
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NETWORKS)
def test_pt2_of_weak_latents_is_the_network(name, tmp_path):
    model, x = weak_network(name)
    path = pb.export(model, tmp_path / "net.pt2", (x,), format="pt2")
    loaded = torch.export.load(path).module()
    for batch in (2, 5):
        y = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(loaded(y), model(y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("name", ["permuted", "convolutions", "coupled_ista", "hidden_lista"])
def test_schemes_give_the_same_file(name, scheme, tmp_path):
    pytest.importorskip(scheme)
    (tmp_path / scheme).mkdir()
    model, x = weak_network(name, scheme)
    path = pb.export(pb.convert(model), tmp_path / scheme / "net.pt2", (x,), "pt2")
    native = pb.export(weak_network(name)[0], tmp_path / "net.pt2", (x,), "pt2")
    assert path.read_bytes() == native.read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_onnx_from_other_schemes(scheme, tmp_path):
    pytest.importorskip(scheme)
    model, x = weak_network("coupled_ista", scheme)
    path = pb.export(model, tmp_path / "net.onnx", (x,))
    torch.testing.assert_close(run_onnx(path, x), outputs_of(model(x)), rtol=1e-4, atol=1e-6)


def test_weights_packed_by_torchao_itself_are_exported(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    from pibinn_plugin.schemes.torchao import PIBiNNWeightOnlyConfig

    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(3, 32)
    quantize_(model, PIBiNNWeightOnlyConfig(pb.BlockDiagonal(4)))
    path = pb.export(model, tmp_path / "net.onnx", (x,))
    torch.testing.assert_close(run_onnx(path, x), outputs_of(model(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", [None, pb.Banded(1, 2)])
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_raw_parameters_and_hooked_layers(structure, format, tmp_path):
    model = nn.Sequential(RawParameter(), nn.Linear(16, 8))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    pb.prepare(model, {"0.weight": structure, "1.weight": None})
    pb.export(model, tmp_path / "net.pt2", (torch.randn(2, 32),), format)


def test_several_inputs_and_outputs(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(6, 4)

        def forward(self, x, rows):
            return {"sum": self.first(x) + self.second(rows.float()), "first": self.first(x)}

    model = pb.prepare(TwoInputs(), {"first.weight": None, "second.weight": pb.Banded(1, 3)})
    pb.export(model, tmp_path / "net.onnx", (torch.randn(4, 8), torch.randint(5, (4, 6))))


def test_the_model_stays_as_it_was(tmp_path):
    model, x = weak_network("band")
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pb.export(model, tmp_path / "net.pt2", (x,), "pt2")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def onnx_allowance(count):
    return 2_000 + 2_500 * count


def pt2_allowance(count):
    return 3_500 + 1_500 * count


@pytest.mark.parametrize(
    "structure",
    [None, pb.Banded(20, 9), random_mask(256, 256, density=0.03)],
    ids=["dense", "band", "sparse_rows"],
)
def test_files_stay_at_one_bit_a_weight(structure, tmp_path):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    model = pb.convert(pb.prepare(model, {"*.weight": structure}))
    described = [layer.structure.metadata_bits // 8 for layer in pb.summary(model).layers if layer.structure]
    counted = pb.summary(model).total_bytes - pb.summary(model).structure_bytes + sum(described)
    for format, allowance in (("onnx", onnx_allowance), ("pt2", pt2_allowance)):
        size = pb.export(model, tmp_path / "net", (torch.randn(2, 256),), format).stat().st_size
        assert size <= 1.05 * counted + allowance(3)


def test_small_layers_are_not_unpacked_by_the_optimizer(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2)))
    file = onnx.load(pb.export(pb.prepare(model, {"*.weight": None}), tmp_path / "net.onnx", (torch.randn(2, 8),)))
    floats = [tensor for tensor in file.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert sum(onnx.numpy_helper.to_array(tensor).size for tensor in floats) <= 2  # λ and -λ


def test_size_report():
    model = pb.prepare(nn.Sequential(nn.Linear(512, 512)), {"0.weight": None})
    sizes = {size.format: size for size in export_sizes(model, (torch.randn(2, 512),), ["onnx", "pt2"])}
    assert list(sizes) == ["packed", "onnx", "pt2"]
    assert all(size.ratio > 20 and size.float_bytes > 4 * 512 * 512 for size in sizes.values())
    assert sizes["packed"].bytes < sizes["onnx"].bytes < sizes["pt2"].bytes < 1.2 * sizes["packed"].bytes


@pytest.mark.parametrize(("name", "format"), [("masked_band", "onnx"), ("uneven_permuted", "pt2")])
def test_a_file_that_computes_something_else_is_refused(name, format, tmp_path, monkeypatch):
    """Mutation: the signs in another order than the graph unpacks them."""
    monkeypatch.setattr(program, "row_major_bits", lambda packed: packed.bits.flip(0))
    model, x = weak_network(name)
    path = tmp_path / "net.pt2"
    path.write_text("what was there before")
    with pytest.raises(pb.ExportError, match="differs from the network by"):
        pb.export(model, path, (x,), format)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "what was there before"
    monkeypatch.undo()
    pb.export(model, path, (x,), format)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 1_000


@pytest.mark.parametrize(
    ("args", "format", "message"),
    [
        ((torch.randn(2, 32),), "tflite", "unknown format 'tflite'"),
        (torch.randn(2, 32), "pt2", "tuple of tensors"),
        ((torch.tensor(1.0),), "pt2", "batch dimension"),
        ((torch.randn(2, 32), torch.randn(3, 32)), "pt2", "one batch size"),
        ((torch.randn(0, 32),), "pt2", "above 0"),
        ((torch.randn(2, 31),), "pt2", "cannot be exported"),
    ],
)
def test_refused_arguments(args, format, message, tmp_path):
    model, _ = weak_network("dense")
    with pytest.raises(pb.ExportError, match=message):
        pb.export(model, tmp_path / "net", args, format)
    assert not list(tmp_path.iterdir())


def test_refused_models(tmp_path):
    with pytest.raises(pb.PIBiNNError, match="no one-bit weight"):
        pb.export(nn.Linear(2, 2), tmp_path / "net.onnx", (torch.randn(1, 2),))


def test_a_missing_framework_is_named(tmp_path, monkeypatch):
    model, x = weak_network("dense")
    monkeypatch.delitem(sys.modules, "pibinn_plugin.export.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime: pip install pibinn-plugin\[export\]"):
        pb.export(model, tmp_path / "net.onnx", (x,))


def test_pt2_runs_without_the_plugin(tmp_path):
    model, x = weak_network("sparse_rows")
    path = pb.export(model, tmp_path / "net.pt2", (x,), "pt2")
    run_without_plugin(path, model, torch.randn(5, 32), tmp_path, "pt2")


def folded_bytes(path):
    """Of what an AOTInductor package makes of its constants when it is loaded."""
    with zipfile.ZipFile(path) as package:
        source = next(name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        constants = r'constants_info_\[\d+\]\.name = "(\w+)";.*?data_size = (\d+);'
        found = re.findall(constants, package.read(source).decode(), re.DOTALL)
    return [int(size) for name, size in found if name.startswith("_FOLDED_CONST")]


@pytest.mark.slow
def test_aoti_unpacks_weights_when_it_is_loaded_and_runs_without_the_plugin(tmp_path):
    """One network, since compilers take their time: weights of every rule, and blocks and filters without one."""
    masks = [
        pb.Mask(torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) < density) for density in (0.02, 0.4)
    ]
    uneven = pb.BlockDiagonal(rows=(8, 40), columns=(30, 18))
    structures = [None, pb.Banded(2, 3), *masks, uneven, pb.BlockDiagonal(4)]
    layers = [nn.Linear(48, 48) for _ in structures]
    layers += [CompactLinear(48, 48, pb.BlockDiagonal(2)), CompactLinear(48, 48, pb.Banded(2, 3))]
    model = nn.Sequential(*layers, nn.Unflatten(1, (4, 12)), nn.Conv1d(4, 4, 4))
    targets = {f"{k}.weight": structure for k, structure in enumerate(structures)}
    targets |= {"6.weight": None, "7.weight": None, "9.weight": None}
    model = pb.convert(pb.prepare(model, targets, "torchao"))
    path = pb.export(model, tmp_path / "net.pt2", (torch.randn(1, 48),), "aoti")
    dense = 4 * 48 * 48
    assert sorted(folded_bytes(path)) == sorted([*[dense] * 6, dense // 4, dense // 2, 4 * 4 * 4 * 4])
    run_without_plugin(path, model, torch.randn(5, 48), tmp_path, "aoti")


def test_aoti_without_a_compiler(tmp_path):
    model, x = weak_network("dense")
    # The config's own patch: monkeypatch would take the entry away when it undoes its change.
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(pb.ExportError, match="compiler"),
    ):
        pb.export(model, tmp_path / "net.pt2", (x,), "aoti")
    with pytest.raises(pb.ExportError, match="packages are named"):
        pb.export(model, tmp_path / "net.so", (x,), "aoti")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["masked_blocks", "sparse_rows", "tiles", "coupled_ista", "hidden_lista"])
def test_executorch_of_weak_latents_is_the_network(name, tmp_path):
    pytest.importorskip("executorch")
    model, x = weak_network(name)
    pb.export(model, tmp_path / "net.pte", (x,), "executorch")


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_is_exported_is_the_network_in_evaluation_and_the_model_stays_as_it_was(is_packed, tmp_path):
    model = pb.prepare(nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5)), {"0.weight": None})
    model, x = (pb.convert(model) if is_packed else model).train(), torch.randn(4, 16)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(trained.values())
    loaded = torch.export.load(pb.export(model, tmp_path / "net.pt2", (x,), "pt2")).module()
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    torch.testing.assert_close(loaded(x), model.eval()(x))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_batch_of_one_is_no_constant(format, tmp_path):
    model, x = weak_network("dense")
    path = pb.export(model, tmp_path / "net.pt2", (x[:1],), format)
    run = torch.export.load(path).module() if format == "pt2" else lambda y: run_onnx(path, y)[0]
    y = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(run(y), outputs_of(model(y))[0], rtol=1e-4, atol=1e-6)


def test_a_writer_cannot_change_what_its_file_is_compared_with(tmp_path, monkeypatch):
    from pibinn_plugin.export import pt2

    write = pt2.write

    def write_another(packed, inputs, path):
        for parameter in packed.parameters():
            if parameter.is_floating_point():
                parameter.data.mul_(3)
        write(packed, inputs, path)

    monkeypatch.setattr(pt2, "write", write_another)
    model, x = weak_network("dense")
    with pytest.raises(pb.ExportError, match="differs from the network by"):
        pb.export(pb.convert(model), tmp_path / "net.pt2", (x,), "pt2")


def test_layers_of_several_precisions_share_one_scale(tmp_path):
    class TwoPrecisions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4).double()

        def forward(self, x):
            return self.second(self.first(x).double())

    model, x = pb.prepare(TwoPrecisions(), {"*.weight": None}), torch.randn(3, 8)
    loaded = torch.export.load(pb.export(model, tmp_path / "net.pt2", (x,), "pt2")).module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    assert loaded(x).dtype == torch.float64
