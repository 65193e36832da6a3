"""Several networks on the same examples: the assumptions they meet, and certificates that hold on them."""

import dataclasses

import pytest
import torch

from lightning_modules.analysis.comparison import compare_convergence, plain_ista
from lightning_modules.analysis.convergence import certify
from lightning_modules.analysis.measurement import measure_examples
from lightning_modules.analysis.unrolled import Unrolled, read_solver
from lightning_modules.operators import SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA


def sparse_examples(operator, count, nonzeros, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks, _, n = operator.shape
    rank = torch.rand(count, blocks, n, generator=generator).argsort(-1).argsort(-1)
    x = torch.where(rank < nonzeros, 2 * torch.rand(rank.shape, generator=generator).double() - 1, 0.0)
    y = torch.einsum("brc,...bc->...br", operator.double(), x)
    y = y + noise * (2 * torch.rand(y.shape, generator=generator).double() - 1)
    return y.flatten(-2), x.flatten(-2)


def tall_networks(layers=8):
    """One-bit weights and plain ISTA for a tall ±1 operator, both with thresholds that are admissible."""
    operator = SignBlocks(2, 1024, 16).blocks.double()
    networks = {
        "one-bit": Unrolled(operator, operator.mT.sign() / 32, torch.ones(layers)),
        "plain ISTA": dataclasses.replace(plain_ista(operator, torch.zeros(layers)), thresholds=None),
    }
    return operator, {
        name: dataclasses.replace(network, thresholds=certify(network, 2, 1.0, 1e-3).thresholds)
        for name, network in networks.items()
    }


def test_certificates_hold_on_the_examples_they_are_made_for():
    operator, networks = tall_networks()
    y, x = sparse_examples(operator, 200, nonzeros=2, noise=1e-3)
    comparison = compare_convergence(networks, y, x)
    for measured in comparison.measurements.values():
        certificate = measured.certificate
        assert certificate.holds
        assert certificate.sparsity == (2, 2)
        assert certificate.amplitude == x.abs().max()
        assert 0.9e-3 < certificate.noise <= 1e-3
        assert (measured.errors <= certificate.errors[:, None] * (1 + 1e-9)).all()
        assert measured.off_support.max() < 1e-12
    text = str(comparison)
    assert "one-bit: rate" in text and "plain ISTA: rate" in text
    assert "Assumed" in text and "measured on 200 examples" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_measured_errors_are_those_of_the_solver():
    solver = CoupledISTA(SignBlocks(2, 8, 16), layers=4)
    y, x = sparse_examples(solver.operator.blocks, 50, nonzeros=3, noise=0.01)
    measured = compare_convergence({"start": read_solver(solver)}, y, x).measurements["start"]
    with torch.no_grad():
        errors = (solver(y.float()) - x).abs().unflatten(-1, (2, 16)).sum(-1)
    torch.testing.assert_close(measured.errors[-1], errors, atol=1e-4, rtol=1e-4)


def test_plain_ista_is_the_solver_before_training_for_one_block():
    solver = CoupledISTA(SignBlocks(1, 8, 16), layers=4)
    start, ista = read_solver(solver), plain_ista(solver.operator.blocks, solver.thresholds)
    torch.testing.assert_close(ista.weights, start.weights)
    torch.testing.assert_close(ista.step_sizes, start.step_sizes)


def test_examples_outside_the_assumptions_are_refused():
    unrolled = Unrolled(torch.eye(4)[None], torch.eye(4)[None], torch.full((3,), 0.5))
    certificate = certify(unrolled, sparsity=1, amplitude=1.0)
    x = torch.eye(4)[:, None]
    for y, unknowns in ((x, torch.ones(4, 1, 4)), (2 * x, 2 * x), (x + 0.1, x)):
        with pytest.raises(ValueError, match="do not meet the assumptions"):
            measure_examples(unrolled, certificate, y, unknowns)
    with pytest.raises(ValueError, match="have the shapes"):
        measure_examples(unrolled, certificate, x[:, 0], x)


def test_networks_of_different_operators_are_refused():
    _, networks = tall_networks()
    other = plain_ista(torch.eye(3)[None], torch.zeros(2))
    with pytest.raises(ValueError, match="networks of one operator; got one-bit, plain ISTA, other"):
        compare_convergence({**networks, "other": other}, torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="none"):
        compare_convergence({}, torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"expected \(examples, 3\), \(examples, 3\)"):
        compare_convergence({"other": other}, torch.ones(1, 3), torch.ones(1, 4))
