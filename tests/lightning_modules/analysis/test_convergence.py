"""The convergence certificate is never violated, is not trivial, and breaks when a constant is weakened."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pibinn_plugin as pb
from lightning_modules.analysis.contraction import one_bit_existence, spectral_contraction
from lightning_modules.analysis.convergence import certify, layer_constants
from lightning_modules.analysis.measurement import measure_examples
from lightning_modules.analysis.unrolled import Unrolled, multiply, read_solver
from lightning_modules.operators import GaussianBlocks, SignBlocks
from lightning_modules.solvers.coupled_ista import CoupledISTA

SLACK = 1 + 1e-9


def random_unrolled(generator, layers=4, perturbation=0.05):
    """A nearly orthogonal square or tall operator, so that certificates say something; one-bit or float weights."""
    blocks, n = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 4), (2, 7)))
    m = n + int(torch.randint(0, 4, (), generator=generator))
    operator = torch.eye(m, n) + perturbation * torch.randn(blocks, m, n, generator=generator)
    weights = operator.mT + 0.3 * perturbation * torch.randn(layers, blocks, n, m, generator=generator)
    step_sizes = 0.6 + 0.6 * torch.rand(layers, generator=generator)
    return Unrolled(operator, weights, step_sizes)


def sign_unrolled(generator, layers=6, rows=64, columns=5):
    """One-bit weights sign(Aᵀ) of a ±1 operator with many rows, and a λ that makes the diagonal of G one."""
    operator = torch.where(torch.rand(2, rows, columns, generator=generator) < 0.5, -1.0, 1.0)
    return Unrolled(operator, operator.mT.sign() / rows, torch.full((layers,), 0.95))


def measure(unrolled, certificate, instances, generator=None):
    """Random instances that meet the assumptions, extreme ones among them."""
    blocks, m, n = unrolled.operator.shape
    rank = torch.rand(instances, blocks, n, generator=generator).argsort(-1).argsort(-1)
    support = rank < torch.tensor(certificate.sparsity)[:, None]
    index = torch.arange(instances)[:, None, None]

    def drawn(size, extreme):
        values = 2 * torch.rand(instances, blocks, size, generator=generator, dtype=torch.float64) - 1
        return torch.where(extreme, torch.where(values < 0, -1.0, 1.0).double(), values)

    x = drawn(n, index % 2 == 0) * certificate.amplitude * support
    noise = drawn(m, index % 4 < 2) * certificate.noise
    return measure_examples(unrolled, certificate, multiply(unrolled.operator, x) + noise, x)


def violations(unrolled, certificate, instances, generator):
    """Instances with an error above the certified one, or with a nonzero off the support in a certified layer."""
    measured = measure(unrolled, certificate, instances, generator)
    above = (measured.errors > certificate.errors[:, None] * SLACK + 1e-12).any(-1).any(0)
    # At the smallest threshold an entry may pass it by rounding.
    off = ((measured.off_support[1:] > 1e-12) & certificate.condition[:, None]).any(-1).any(0)
    return int((above | off).sum())


@pytest.mark.parametrize("make", [random_unrolled, sign_unrolled])
def test_certificates_are_never_violated(make):
    generator = torch.Generator().manual_seed(1)
    for trial in range(60):
        unrolled = make(generator)
        blocks, n = unrolled.operator.shape[0], unrolled.operator.shape[-1]
        sparsity = torch.randint(0, min(n, 4), (blocks,), generator=generator).tolist()
        noise = 0.02 * (trial % 3)
        smallest = certify(unrolled, sparsity, amplitude=2.0, noise=noise)
        assert smallest.holds
        assert violations(unrolled, smallest, 100, generator) == 0
        # Given thresholds: larger ones, and ones that are too small in the later layers.
        for thresholds in (smallest.thresholds * 1.3, smallest.thresholds[0] * 0.7 ** torch.arange(1.0, -5, -1)[:4]):
            if len(thresholds) == len(unrolled.step_sizes):
                given_thresholds = dataclasses.replace(unrolled, thresholds=thresholds)
                certificate = certify(given_thresholds, sparsity, 2.0, noise)
                assert violations(given_thresholds, certificate, 100, generator) == 0


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 0.2))
def test_certificates_are_never_violated_on_drawn_instances(seed, sparsity, noise):
    generator = torch.Generator().manual_seed(seed)
    unrolled = random_unrolled(generator, perturbation=0.15)
    certificate = certify(unrolled, min(sparsity, unrolled.operator.shape[-1]), 1.0, noise)
    assert violations(unrolled, certificate, 64, generator) == 0


def test_the_certificate_is_attained():
    """One nonzero, the worst noise: the first layer's bound is an equality, so that no constant can be smaller."""
    operator = torch.tensor([[[1.0, 0.3], [0.0, 1.0], [0.2, 0.1]]])
    unrolled = Unrolled(operator, operator.mT, torch.full((1,), 0.5))
    certificate = certify(unrolled, sparsity=1, amplitude=2.0, noise=0.1)
    row = unrolled.weights[0, 0]
    worst = 0.0
    for column in range(2):
        x = 2.0 * torch.eye(2, dtype=torch.float64)[column]
        for signs in itertools.product((-1.0, 1.0), repeat=3):
            y = unrolled.operator[0] @ x + 0.1 * torch.tensor(signs)
            run = dataclasses.replace(unrolled, thresholds=certificate.thresholds).run(y[None, None])
            worst = max(worst, float((run[1] - x).abs().sum()))
    # The largest d and the largest C are those of different rows here; each row alone attains its own.
    own = (1 - 0.5 * (row @ unrolled.operator[0]).diagonal()) * 2 + 0.5 * row.abs().sum(-1) * 0.1
    assert worst == pytest.approx(float((own + certificate.thresholds[0]).max()))
    assert worst <= certificate.errors[1]
    assert worst > 0.97 * certificate.errors[1]


@pytest.mark.parametrize(
    ("constant", "weaker"), [("factors", 0.8), ("coherence", 0.8), ("noise_gain", 0.5), ("noise_gain", 0.0)]
)
def test_a_weakened_constant_is_caught(constant, weaker):
    generator = torch.Generator().manual_seed(2)
    found = 0
    for _ in range(40):
        operator = torch.eye(3) + 0.1 * torch.randn(1, 3, 3, generator=generator)
        unrolled = Unrolled(operator, operator.mT, torch.full((3,), 0.6))
        constants = layer_constants(unrolled)
        weakened = dataclasses.replace(constants, **{constant: weaker * getattr(constants, constant)})
        for amplitude, noise in ((1.0, 0.0), (0.05, 0.5)):
            assert violations(unrolled, certify(unrolled, 1, amplitude, noise), 200, generator) == 0
            found += violations(unrolled, certify(unrolled, 1, amplitude, noise, weakened), 200, generator)
        if found:
            return
    pytest.fail("every certificate holds with the weakened constant too")


def test_the_threshold_term_is_needed_in_the_error():
    unrolled = Unrolled(torch.eye(3)[None], torch.eye(3)[None], torch.ones(1), torch.tensor([0.2]))
    certificate = certify(unrolled, sparsity=2, amplitude=1.0)
    errors = measure(unrolled, certificate, 50).errors[1].max()
    assert errors == pytest.approx(float(certificate.errors[1])) == pytest.approx(0.4)


def test_the_certificate_is_not_trivial():
    """One-bit weights for a tall ±1 operator: contraction is certified, and the measured error follows."""
    operator = SignBlocks(2, 1024, 16, seed=0).blocks
    scale = 1 / 1024**0.5  # λ: sign(Aᵀ) A has the diagonal √rows
    unrolled = Unrolled(operator, scale * operator.mT.sign(), torch.ones(12))
    certificate = certify(unrolled, sparsity=3, amplitude=1.0)
    assert certificate.holds
    assert certificate.rates.max() < 0.7
    assert certificate.errors[-1].max() < 0.02 * certificate.errors[0].max()
    assert measure(unrolled, certificate, 100).errors[-1].max() < 0.02 * certificate.errors[0].max()
    noisy = certify(unrolled, sparsity=3, amplitude=1.0, noise=1e-4)
    rate, gain = noisy.rates.max(), noisy.constants.noise_gain.max()
    floor = 2 * 3 * gain * 1e-4 / (1 - rate)
    assert noisy.errors[-1].max() <= rate**12 * 3 + floor


@given(st.integers(0, 10**6))
def test_constants_against_their_definitions(seed):
    unrolled = random_unrolled(torch.Generator().manual_seed(seed), layers=1, perturbation=0.4)
    constants = layer_constants(unrolled)
    for block in range(unrolled.operator.shape[0]):
        weight = float(unrolled.step_sizes[0]) * unrolled.weights[0, block].numpy()
        difference = np.eye(len(weight)) - weight @ unrolled.operator[block].numpy()
        off = np.abs(difference - np.diag(np.diag(difference)))
        assert constants.diagonal[0, block] == pytest.approx(np.abs(np.diag(difference)).max())
        assert constants.coherence[0, block] == pytest.approx(off.max())
        assert constants.noise_gain[0, block] == pytest.approx(np.abs(weight).sum(1).max())
        for s in range(1, len(weight) + 1):
            norms = [
                np.linalg.norm(difference[np.ix_(support, support)], 1)
                for support in itertools.combinations(range(len(weight)), s)
            ]
            assert constants.factors[0, block, s] == pytest.approx(max(norms))
            coarse = constants.diagonal[0, block] + (s - 1) * constants.coherence[0, block]
            assert constants.factors[0, block, s] <= coarse * SLACK


def test_the_condition_of_the_source_for_a_normalised_diagonal():
    """With G_ii = 1 and equal |G_ij| = μ, the largest s is the largest below (1 + 1/μ)/2."""
    for mu in (0.04, 0.11, 0.3):
        operator = (1 - mu) * torch.eye(20, dtype=torch.float64) + mu
        constants = layer_constants(Unrolled(operator[None], torch.eye(20)[None], torch.ones(1)))
        assert constants.largest_sparsity.item() == math.ceil((1 + 1 / mu) / 2) - 1


def test_contraction_without_the_threshold_term_is_not_enough():
    """ρ(s) < 1 ≤ ρ(s) + s μ: with every admissible threshold the certified error grows."""
    operator = 0.8 * torch.eye(6) + 0.2
    unrolled = Unrolled(operator[None], torch.eye(6)[None], torch.ones(5))
    certificate = certify(unrolled, sparsity=4, amplitude=1.0)
    assert certificate.constants.factors[0, 0, 4] < 1 < certificate.rates[0, 0]
    assert certificate.holds
    assert certificate.errors[-1] > certificate.errors[0]
    assert "VACUOUS" in str(certificate)


def test_a_failed_condition_certifies_nothing_from_there_on():
    unrolled = Unrolled(torch.eye(3)[None] + 0.05, torch.eye(3)[None], torch.ones(3), torch.tensor([0.2, 0.0, 0.2]))
    certificate = certify(unrolled, sparsity=1, amplitude=1.0)
    assert certificate.condition.flatten().tolist() == [True, False, False]
    assert certificate.errors.isinf().flatten().tolist() == [False, False, True, True]
    assert not certificate.holds
    assert "NOT certified: the threshold condition fails at layer 2" in str(certificate)


def test_the_threshold_condition_is_sharp():
    eye = torch.eye(3)[None]
    needed = certify(Unrolled(eye + 0.05, eye, torch.ones(1)), 2, 1.0, noise=0.1).thresholds
    for factor, holds in ((1.0, True), (0.999, False)):
        assert certify(Unrolled(eye + 0.05, eye, torch.ones(1), factor * needed), 2, 1.0, noise=0.1).holds is holds


def test_blocks_have_their_own_sparsity():
    operator = torch.stack([torch.eye(4) + 0.01, torch.eye(4) + 0.1])
    both = certify(Unrolled(operator, operator.mT, torch.full((3,), 0.9), torch.full((3,), 0.6)), (3, 1), 1.0)
    for block, s in enumerate((3, 1)):
        part = operator[block : block + 1]
        alone = certify(Unrolled(part, part.mT, torch.full((3,), 0.9), torch.full((3,), 0.6)), s, 1.0)
        torch.testing.assert_close(both.errors[:, block], alone.errors[:, 0])
    empty = certify(Unrolled(operator, operator.mT, torch.full((3,), 0.9)), (0, 1), 1.0, noise=0.1)
    assert empty.errors[:, 0].tolist() == [0.0] * 4


def trained_like(operator, layers=3):
    """A solver whose weights are no longer Aᵀ."""
    solver = CoupledISTA(operator, layers)
    with torch.no_grad():
        for layer in solver.layers:
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    return solver


@pytest.mark.parametrize("scheme", ["native", "torchao", "brevitas"])
def test_float_prepared_and_packed_solvers_are_read(scheme):
    solver = trained_like(SignBlocks(3, 8, 6, seed=1))
    weights = torch.stack([layer.weight.detach() for layer in solver.layers])
    torch.testing.assert_close(read_solver(solver).weights, weights.double())
    prepared = pb.prepare(solver, {"layers.*.weight": None}, scheme=scheme)
    one_bit = pb.global_scale(prepared)().item() * torch.where(weights >= 0, 1.0, -1.0)
    torch.testing.assert_close(read_solver(prepared).weights, one_bit.double())
    packed = read_solver(pb.convert(prepared))
    torch.testing.assert_close(packed.weights, one_bit.double())
    for unrolled in (packed, read_solver(prepared)):
        certificate = certify(unrolled, 1, 1.0)
        row = certificate.constants.noise_gain  # of a one-bit row: g λ times its structural nonzeros
        torch.testing.assert_close(row, (packed.step_sizes * 8 * one_bit.abs().max()).double()[:, None].expand(3, 3))


def test_a_dense_operator_is_one_block():
    unrolled = read_solver(trained_like(GaussianBlocks(1, 4, 8)))
    assert unrolled.weights.shape == (3, 1, 8, 4)


def test_other_solvers_are_refused():
    with pytest.raises(pb.PIBiNNError, match="Linear has no operator, layers"):
        read_solver(torch.nn.Linear(2, 2))

    class Momentum(CoupledISTA):
        def forward(self, y):
            return 1.1 * super().forward(y)

    with pytest.raises(pb.PIBiNNError, match="Momentum computes something else: certificates are for"):
        read_solver(Momentum(SignBlocks(2, 4, 8), 2))
    biased = CoupledISTA(SignBlocks(2, 4, 8), 1)
    biased.layers[0] = torch.nn.Linear(8, 16)
    with pytest.raises(pb.PIBiNNError, match="layer 0 is not linear"):
        read_solver(biased)


def test_weights_of_another_structure_than_the_operators_blocks_are_one_block(monkeypatch):
    solver = CoupledISTA(SignBlocks(2, 4, 8), 2)
    dense = torch.randn(16, 8)
    structure = pb.Mask(torch.rand(16, 8) < 0.5)
    solver.layers = torch.nn.ModuleList([torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)])
    with torch.no_grad():
        for layer in solver.layers:
            layer.weight.copy_(dense)
    unrolled = read_solver(solver)
    assert unrolled.operator.shape == (1, 8, 16)
    torch.testing.assert_close(unrolled.weights[1, 0], dense.double())
    masked = read_solver(pb.convert(pb.prepare(solver, {"layers.*.weight": structure})))
    assert torch.equal(masked.weights[0, 0] != 0, structure.mask((16, 8)))
    y = torch.randn(5, 8)
    torch.testing.assert_close(masked.run(y[:, None].double())[-1][:, 0], solver(y).double(), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("lightning_modules.analysis.unrolled.LARGEST_DENSE", 100)
    with pytest.raises(
        pb.PIBiNNError, match="layer 0 is not block-diagonal in the blocks of the operator, and 8 x 16 is"
    ):
        read_solver(solver)


def test_errors_name_what_was_given():
    eye = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 3\); got \(2, 2, 3, 3\)"):
        Unrolled(eye, torch.zeros(2, 2, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="thresholds of at least 0"):
        Unrolled(eye, eye, torch.ones(1), torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="weights has an entry that is not finite"):
        Unrolled(eye, eye / 0, torch.ones(1))
    with pytest.raises(ValueError, match=r"sparsity of 0 to 3.*got 4"):
        certify(Unrolled(eye, eye, torch.ones(1)), 4, 1.0)
    with pytest.raises(ValueError, match="got nan and 0"):
        certify(Unrolled(eye, eye, torch.ones(1)), 1, math.nan)
    with pytest.raises(ValueError, match="no thresholds"):
        Unrolled(eye, eye, torch.ones(1)).run(torch.ones(1, 1, 3))
    with pytest.raises(ValueError, match="column 1 of the operator is zero"):
        one_bit_existence(torch.tensor([[1.0, 0.0]]))


def test_every_table_prints_its_assumptions():
    unrolled = Unrolled(torch.eye(3)[None], torch.eye(3)[None], torch.full((2,), 0.9))
    certificate = certify(unrolled, 2, 1.5, 0.01)
    reports = [certificate, measure(unrolled, certificate, 10), spectral_contraction(unrolled)]
    reports.append(one_bit_existence(torch.eye(3) + 0.1))
    for report in reports:
        assert "Assumed" in str(report)
    assert "at most 2 nonzeros" in str(certificate)
    assert "|x*| <= 1.5 and |noise| <= 0.01" in str(certificate)
