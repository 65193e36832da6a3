"""A packed file that knows what it is: how its solver is built, and what its operator was."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from lightning_modules import operators
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.solvers.admm import UnrolledADMM
from lightning_modules.solvers.calibrated_amp import CalibratedAMP
from lightning_modules.solvers.convolutional_lista import ConvolutionalLISTA
from lightning_modules.solvers.coupled_ista import CoupledISTA
from lightning_modules.solvers.hidden_lista import HiddenLISTA
from lightning_modules.solvers.learned_amp import LearnedAMP
from lightning_modules.solvers.lista import LISTA
from lightning_modules.solvers.support_lista import SupportLISTA
from pibinn_plugin.storage.operator_probes import check_operators, probes_of
from pibinn_plugin.storage.packed_file import read
from pibinn_plugin.storage.recipe import build, recipe_of
from pibinn_plugin.weights import packed_weights

ROOT = Path(__file__).parents[2]
SOLVERS = {
    "admm": lambda: UnrolledADMM(operators.SignBlocks(2, 4, 8), layers=2),
    "calibrated": lambda: CalibratedAMP(8, 16, pb.BlockDiagonal(2), layers=2),
    "calibrated mask": lambda: CalibratedAMP(4, 6, pb.Mask(torch.eye(4, 6) + 1 > 1), layers=2),
    "convolutional": lambda: ConvolutionalLISTA(channels=9, layers=2, kernel_size=3),
    "coupled": lambda: CoupledISTA(operators.GaussianBlocks(2, 4, 8, seed=3), layers=2),
    "coupled sparse": lambda: CoupledISTA(operators.SparseSigns(8, 16, 2), layers=2),
    "coupled hadamard": lambda: CoupledISTA(operators.SubsampledHadamard(8, 16, seed=5), layers=2),
    "hidden": lambda: HiddenLISTA(channels=8, layers=2, stride=4, frequencies=4, groups=2),
    "learned": lambda: LearnedAMP(operators.SignBlocks(2, 4, 8), layers=2, correction="both"),
    "lista": lambda: LISTA(operators.SubsampledDCT(8, 16), layers=2),
    "support": lambda: SupportLISTA(stages=1, layers=1, channels=4, threshold=(0.2, 0.1)),
    "support patterns": lambda: SupportLISTA(BlockPatterns(8, 16), stages=1, layers=1, channels=4),
}


def packed(solver):
    """With signs that no other instance starts at."""
    pb.prepare(solver.eval(), {"*weight": None})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            if name.endswith("original"):
                parameter.uniform_(-1, 1, generator=generator)
    return pb.convert(solver)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_of_ours_is_loaded_from_its_file_alone(name, tmp_path):
    original = packed(SOLVERS[name]())
    path = pb.save(original, tmp_path / "net.safetensors", inputs={"kind": "test"})
    loaded = pb.load(path)
    assert type(loaded) is type(original) and not loaded.training
    state, expected = loaded.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert read(path).inputs == {"kind": "test"}
    again = pb.save(loaded, tmp_path / "again.safetensors", inputs={"kind": "test"})
    assert again.read_bytes() == path.read_bytes()


OTHER_OPERATORS = {
    "another seed": operators.SignBlocks(2, 4, 8, seed=1),
    "another scale": operators.BlockOperator(1.001 * operators.SignBlocks(2, 4, 8, seed=0).blocks),
    "one other sign": operators.BlockOperator(
        operators.SignBlocks(2, 4, 8).blocks * (1 - 2 * (torch.arange(64).reshape(2, 4, 8) == 9).float())
    ),
}


@pytest.mark.parametrize("name", OTHER_OPERATORS)
def test_a_solver_with_another_operator_is_refused_and_stays_as_it_was(name, tmp_path):
    path = pb.save(packed(CoupledISTA(operators.SignBlocks(2, 4, 8), layers=2)), tmp_path / "net.safetensors")
    other = CoupledISTA(OTHER_OPERATORS[name], layers=2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(pb.ArtifactError, match=r"the operator 'operator\.blocks' of the model is not that of the file"):
        pb.load(path, into=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert not packed_weights(other)


def test_rounding_of_another_machine_is_the_same_operator():
    solver = CoupledISTA(operators.GaussianBlocks(8, 32, 64), layers=1)
    probes = probes_of(solver)
    solver.operator.blocks *= 1 + 1e-6 * torch.randn_like(solver.operator.blocks)
    check_operators(solver, probes)


def test_an_operator_that_is_no_module_is_known_too(tmp_path):
    class Physics:
        def __init__(self, seed):
            self.matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            self.shape = (8, 16)

        def A(self, x):
            return x @ self.matrix.T

        def A_adjoint(self, y):
            return y @ self.matrix

    path = pb.save(packed(CoupledISTA(Physics(0), layers=1)), tmp_path / "net.safetensors")
    pb.load(path, into=CoupledISTA(Physics(0), layers=1))
    with pytest.raises(pb.ArtifactError, match=r"'operator\.matrix'"):
        pb.load(path, into=CoupledISTA(Physics(1), layers=1))
    with pytest.raises(pb.ArtifactError, match="does not say how its model is built"):
        pb.load(path)  # a Physics has no JSON form


def foreign_file(tmp_path, monkeypatch):
    """A module that is not ours, and a file of a solver of it."""
    (tmp_path / "my_solvers.py").write_text(
        "import pathlib\nimport torch\nimport pibinn_plugin as pb\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "@pb.records_arguments\nclass Mine(torch.nn.Linear):\n    pass\n"
        "class Plain(torch.nn.Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_solvers

    path = pb.save(packed(my_solvers.Mine(8, 4)), tmp_path / "net.safetensors")
    monkeypatch.delitem(sys.modules, "my_solvers")
    (tmp_path / "imported").unlink()
    return path


def test_a_foreign_class_is_built_where_its_module_is_allowed_and_not_even_imported_elsewhere(tmp_path, monkeypatch):
    path = foreign_file(tmp_path, monkeypatch)
    for allow in ((), ("my",), ("my_solvers.deeper",), ("solvers",)):
        with pytest.raises(pb.ArtifactError, match=r"'my_solvers\.Mine', of a module that is not allowed"):
            pb.load(path, allow=allow)
    assert not (tmp_path / "imported").exists()
    assert type(pb.load(path, allow=["my_solvers"])).__name__.endswith("Mine")
    assert (tmp_path / "imported").exists()


RECIPES = {
    "os.system": "not allowed",
    "builtins.eval": "not allowed",
    "lightning_modules_evil.Solver": "not allowed",
    "lightning_modules.__main__.main": "no public class",
    "lightning_modules.cli.main": "no class that records its arguments",
    "lightning_modules.modules.SolverModule": "no class that records its arguments",
    "lightning_modules.nothing.Here": "cannot be imported",
    "pibinn_plugin.storage.atomic_file.os.remove": "cannot be imported",
    "lightning_modules.operators..SignBlocks": "no public class",
    "SignBlocks": "not allowed",
    "": "no public class",
}


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_calls_nothing_but_solvers_and_operators(path):
    with pytest.raises(pb.ArtifactError, match=RECIPES[path]) as caught:
        build({"class_path": path, "init_args": {}})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 0}, "cannot be built with"),
        ({"depth": 3}, "cannot be built with"),
        ({"operator": {"class_path": "os.system", "init_args": {}}}, "not allowed"),
        ({"operator": {"structure": {"kind": "nothing"}}}, "JSON of a structure"),
        ({"operator": {"class_path": "lightning_modules.operators.SignBlocks", "init_args": [1]}}, "JSON object"),
    ],
)
def test_arguments_that_a_class_refuses_are_an_error_of_one_line(arguments, words):
    with pytest.raises(pb.PIBiNNError, match=words) as caught:
        build({"class_path": "lightning_modules.solvers.coupled_ista.CoupledISTA", "init_args": arguments})
    assert len(str(caught.value).splitlines()) == 1


def test_the_depth_of_a_recipe_is_bounded():
    recipe = recipe_of(operators.SignBlocks())
    for _ in range(50):
        recipe = {"class_path": "lightning_modules.operators.FlattenedPhysics", "init_args": {"physics": recipe}}
    with pytest.raises(pb.ArtifactError, match="at most 16 deep"):
        build(recipe)


def test_a_recipe_of_another_class_than_the_weights_are_of_is_refused(tmp_path):
    solver = packed(CoupledISTA(operators.SignBlocks(2, 4, 8), layers=2))
    solver.__dict__["_pibinn_recipe"] = recipe_of(operators.SignBlocks(2, 4, 8))
    path = pb.save(solver, tmp_path / "net.safetensors")
    with pytest.raises(pb.ArtifactError, match="which the model lacks"):
        pb.load(path)


def test_a_subclass_that_does_not_record_has_no_recipe_of_its_parent():
    class Other(CoupledISTA):
        def __init__(self):
            super().__init__(operators.SignBlocks(2, 4, 8), layers=2)

    assert recipe_of(Other()) is None
    assert recipe_of(operators.DenseOperator(torch.eye(3))) is None  # a tensor has no JSON form


def test_recording_changes_nothing_else():
    solver = CoupledISTA(operators.SignBlocks(2, 4, 8), 3)
    assert recipe_of(solver) == {
        "class_path": "lightning_modules.solvers.coupled_ista.CoupledISTA",
        "init_args": {
            "operator": {
                "class_path": "lightning_modules.operators.SignBlocks",
                "init_args": {"blocks": 2, "rows": 4, "columns": 8, "seed": 0},
            },
            "layers": 3,
        },
    }
    json.dumps(recipe_of(solver), allow_nan=False)
    with pytest.raises(TypeError, match="depth"):
        CoupledISTA(operators.SignBlocks(2, 4, 8), depth=3)


@pytest.mark.parametrize("inputs", [{"rate": float("nan")}, {"rate": [1]}, {3: 4}, {"rate": None}])
def test_inputs_that_are_no_flat_json_are_refused(inputs, tmp_path):
    model = pb.convert(pb.prepare(nn.Linear(8, 4), {"weight": None}))
    with pytest.raises(pb.ArtifactError, match="expected names with numbers or text"):
        pb.save(model, tmp_path / "net.safetensors", inputs=inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_reader_in_c_of_the_specification_prints_every_sign(tmp_path):
    page = (ROOT / "docs" / "packed_file.md").read_text()
    (program,) = re.findall(r"^```c\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(program.splitlines()) <= 44
    (tmp_path / "reader.c").write_text(program)
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "reader.c", "-o", "reader"]
    subprocess.run(command, cwd=tmp_path, check=True)
    for name in ("hidden", "coupled", "calibrated mask"):
        model = packed(SOLVERS[name]())
        path = pb.save(model, tmp_path / "net.safetensors")
        printed = subprocess.run([tmp_path / "reader", path], capture_output=True, check=True, text=True).stdout
        scale, *lines = printed.splitlines()
        assert torch.tensor(float(scale)) == pb.global_scale(model)().detach()
        found = {}
        for line in lines:
            entry, number, signs = line.split(" ")
            found[re.sub(r"\{.*\}", number, entry)] = signs
        assert found.keys() == {weight.name for weight in packed_weights(model)}
        for weight in packed_weights(model):
            signs = weight.packed.signs().flatten().tolist()
            assert found[weight.name] == "".join("+" if sign > 0 else "-" for sign in signs)
