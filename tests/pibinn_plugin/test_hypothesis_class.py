"""The size of a class of unrolled solvers: Lipschitz constants that random networks never break, covers that cover."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pibinn_plugin.analysis.hypothesis_class import KINDS, Box, unrolled_class
from pibinn_plugin.analysis.unrolled import Unrolled, multiply
from pibinn_plugin.errors import PIBiNNError

SEEDS = st.integers(0, 10**6)
EXPONENTS = st.integers(-3, 2)
BOX = Box(weight=0.5, step_size=1.0, threshold=0.25, measurement=2.0)


def uniform(shape, bound, generator, lowest=-1):
    return bound * (lowest + (1 - lowest) * torch.rand(shape, generator=generator, dtype=torch.float64))


def random_member(box, seed, layers=3, kind="one-bit", tied=False):
    """A random network of the class with random structure, and its structure."""
    generator = torch.Generator().manual_seed(seed)
    operator = uniform((2, 3, 4), 1.0, generator)
    structure = torch.rand((1 if tied else layers, 2, 4, 3), generator=generator) < 0.7
    structure[..., 0, 0] = True
    signs = torch.where(torch.rand(structure.shape, generator=generator) < 0.5, -1.0, 1.0).double() * structure
    if kind == "channel-wise":
        weights = uniform((*signs.shape[:-1], 1), box.weight, generator, lowest=0.1) * signs
    elif kind == "float":
        weights = uniform(signs.shape, box.weight, generator) * structure
    else:
        weights = uniform((), box.weight, generator, lowest=0.1) * signs
    thresholds = uniform((layers,), box.threshold, generator, lowest=0)
    return Unrolled(
        operator, weights.expand(layers, -1, -1, -1), uniform((layers,), box.step_size, generator), thresholds
    )


def measurements(box, seed, count=50):
    y = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return box.measurement * y / y.norm(dim=(-2, -1), keepdim=True)


def change(first, second, y):
    return float((first.run(y)[-1] - second.run(y)[-1]).norm(dim=(-2, -1)).max())


@given(SEEDS, EXPONENTS, EXPONENTS, st.booleans())
def test_lipschitz_constants_are_never_violated(seed, weight, step_size, tied):
    box = Box(2.0**weight, 2.0**step_size, 0.25, 2.0)
    network = random_member(box, seed, tied=tied)
    found = unrolled_class(network, (0, 0, 0) if tied else None)
    constants = {name: [math.exp(value) for value in values] for name, values in found.log_lipschitz(box).items()}
    y = measurements(box, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)

    def stays_within(other, allowed):
        assert change(network, other, y) <= allowed * (1 + 1e-9) + 1e-12

    for k in range(3):
        steps, thresholds = network.step_sizes.clone(), network.thresholds.clone()
        steps[k] = uniform((), box.step_size, generator)
        stays_within(
            dataclasses.replace(network, step_sizes=steps),
            constants["step_size"][k] * float((steps - network.step_sizes).abs().sum()),
        )
        thresholds[k] = uniform((), box.threshold, generator, lowest=0)
        stays_within(
            dataclasses.replace(network, thresholds=thresholds),
            constants["threshold"][k] * float((thresholds - network.thresholds).abs().sum()),
        )
    for index, constant in enumerate(constants["weight"]):
        weights = network.weights.clone()
        drawn = uniform(weights.shape[1:], box.weight, generator) * (network.weights[index] != 0)
        weights[slice(None) if tied else index] = drawn
        stays_within(
            dataclasses.replace(network, weights=weights), constant * float((weights - network.weights).abs().max())
        )
    scale = float(network.weights.abs().max())
    other = float(uniform((), box.weight, generator, lowest=0.1))
    stays_within(
        dataclasses.replace(network, weights=network.weights * (other / scale)),
        constants["scale"][0] * abs(other - scale),
    )


def test_the_constants_are_attained():
    """One unknown, W A < 0 and all parameters at the bounds of the box: a small change is as large as the constants."""
    box, step = Box(weight=0.5, step_size=2.0, threshold=1.0, measurement=3.0), 1e-6
    operator = torch.tensor([[[0.8]]], dtype=torch.float64)
    network = Unrolled(operator, -box.weight * torch.ones(4, 1, 1, 1), box.step_size * torch.ones(4), torch.zeros(4))
    y = torch.full((1, 1, 1), box.measurement, dtype=torch.float64)
    found = unrolled_class(network).log_lipschitz(box)
    constants = {name: [math.exp(value) for value in values] for name, values in found.items()}
    for k in range(4):
        one = torch.zeros(4, dtype=torch.float64)
        one[k] = step
        steps = dataclasses.replace(network, step_sizes=network.step_sizes - one)
        assert change(network, steps, y) == pytest.approx(constants["step_size"][k] * step, rel=1e-4)
        thresholds = dataclasses.replace(network, thresholds=network.thresholds + one)
        assert change(network, thresholds, y) == pytest.approx(constants["threshold"][k] * step, rel=1e-4)
        weights = dataclasses.replace(network, weights=network.weights + one[:, None, None, None])
        assert change(network, weights, y) == pytest.approx(constants["weight"][k] * step, rel=1e-4)
    scale = dataclasses.replace(network, weights=network.weights * (1 - step / box.weight))
    assert change(network, scale, y) == pytest.approx(constants["scale"][0] * step, rel=1e-4)


@given(SEEDS)
def test_residuals_grow_no_faster_than_the_bound(seed):
    network, y = random_member(BOX, seed), measurements(BOX, seed + 1)
    found = unrolled_class(network)
    growth = 1 + BOX.step_size * BOX.weight * max(found.structure_norms) * found.operator_norm
    for k, x in enumerate(network.run(y)):
        residual = (y - multiply(network.operator, x)).norm(dim=(-2, -1)).max()
        assert residual <= growth**k * BOX.measurement * (1 + 1e-9)


def nearest(values, length_from, length_to, radius):
    """The point of the grid of an interval that is nearest."""
    points = max(1, math.ceil((length_to - length_from) / (2 * radius)))
    spacing = (length_to - length_from) / points
    index = ((values - length_from) / spacing).floor().clamp(0, points - 1)
    return length_from + (index + 0.5) * spacing


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
def test_the_grid_is_a_cover(kind, seed):
    """The nearest member of the grid is a network within the resolution, and the grid has the size that is said."""
    network, resolution = random_member(BOX, seed, kind=kind), 0.05
    found = unrolled_class(network)
    radii = {name: [math.exp(r) for r in values] for name, values in found.log_radii(kind, BOX, resolution).items()}
    zip_radii = {name: torch.tensor(values, dtype=torch.float64) for name, values in radii.items()}
    steps = torch.stack(
        [
            nearest(g, -BOX.step_size, BOX.step_size, r)
            for g, r in zip(network.step_sizes, radii["step_size"], strict=True)
        ]
    )
    thresholds = torch.stack(
        [nearest(t, 0, BOX.threshold, r) for t, r in zip(network.thresholds, radii["threshold"], strict=True)]
    )
    structure, scale_radii = network.weights != 0, zip_radii.get("weight", zip_radii.get("scale"))
    weights = torch.empty_like(network.weights)
    points = sum(math.log(max(1, math.ceil(BOX.step_size / r))) for r in radii["step_size"])
    points += sum(math.log(max(1, math.ceil(BOX.threshold / (2 * r)))) for r in radii["threshold"])
    for k, weight in enumerate(network.weights):
        radius = float(scale_radii[k] if len(scale_radii) > 1 else scale_radii[0])
        if kind == "float":
            weights[k] = nearest(weight, -BOX.weight, BOX.weight, radius) * structure[k]
            points += int(structure[k].sum()) * math.log(math.ceil(BOX.weight / radius))
        else:
            weights[k] = nearest(weight.abs(), 0, BOX.weight, radius) * weight.sign()
            count = int(structure[k].any(-1).sum()) if kind == "channel-wise" else int(k == 0)
            points += count * math.log(math.ceil(BOX.weight / (2 * radius)))
    covered = dataclasses.replace(network, weights=weights, step_sizes=steps, thresholds=thresholds)
    assert change(network, covered, measurements(BOX, seed + 1)) <= resolution * (1 + 1e-9)
    patterns = {"ternary": 3, "float": 1}.get(kind, 2)
    size = found.log_size(kind, BOX, resolution)
    exact = points + int(structure.sum()) * math.log(patterns)
    assert exact - 1e-9 <= size <= exact + 0.7 * (3 + 3 + int(structure.sum()))  # ceilings


def test_sign_patterns_are_what_a_coarse_cover_counts():
    network = random_member(BOX, 0)
    found, nonzeros = unrolled_class(network), int((network.weights != 0).sum())
    assert found.log_size("one-bit", BOX, 1e9) == pytest.approx(nonzeros * math.log(2))
    assert found.log_size("channel-wise", BOX, 1e9) == pytest.approx(nonzeros * math.log(2))
    assert found.log_size("float", BOX, 1e9) == 0
    difference = found.log_size("ternary", BOX, 1e-3) - found.log_size("one-bit", BOX, 1e-3)
    assert difference == pytest.approx(nonzeros * math.log(1.5))


@given(SEEDS, st.floats(1e-12, 1.0))
def test_classes_are_ordered_and_grow_with_nonzeros_and_fineness(seed, resolution):
    found = unrolled_class(random_member(BOX, seed))
    sizes = [found.log_size(kind, BOX, resolution) for kind in KINDS]
    assert sizes[0] < sizes[1]
    assert sizes[0] <= sizes[2]
    for kind, size in zip(KINDS, sizes, strict=True):
        more = dataclasses.replace(found, nonzeros=tuple(count + 1 for count in found.nonzeros))
        assert more.log_size(kind, BOX, resolution) >= size
        assert found.log_size(kind, BOX, resolution / 2) >= size
        assert found.log_size(kind, dataclasses.replace(BOX, weight=1.0), resolution) >= size
    fine = found.log_size("float", BOX, 1e-300)
    assert fine == pytest.approx((sum(found.nonzeros) + 6) * 32 * math.log(2))  # no finer than float32


def test_a_tied_weight_counts_once():
    network = random_member(BOX, 0, tied=True)
    tied, free = unrolled_class(network, (0, 0, 0)), unrolled_class(network)
    assert sum(free.nonzeros) == 3 * sum(tied.nonzeros)
    assert sum(free.rows) == 3 * sum(tied.rows)
    # The one λ has the same constant in both: it scales all layers either way.
    assert tied.log_lipschitz(BOX)["scale"] == pytest.approx(free.log_lipschitz(BOX)["scale"])
    assert math.exp(tied.log_lipschitz(BOX)["weight"][0]) == pytest.approx(
        sum(math.exp(value) for value in free.log_lipschitz(BOX)["weight"])
    )


def test_deep_networks_do_not_overflow():
    network = random_member(BOX, 0)
    deep = dataclasses.replace(unrolled_class(network, (0, 0, 0)), weight_of_layer=(0,) * 5000)
    assert math.isfinite(deep.log_size("float", Box(1e9, 1e9, 1e9, 1e9), 1e-9))


def test_impossible_classes_are_refused():
    network = random_member(BOX, 0)
    with pytest.raises(ValueError, match="expected one of"):
        unrolled_class(network).log_size("quaternary", BOX, 0.1)
    with pytest.raises(ValueError, match="bounds > 0"):
        unrolled_class(network).log_size("float", dataclasses.replace(BOX, weight=0.0), 0.1)
    with pytest.raises(PIBiNNError, match="the weight of layer 0 has no nonzero"):
        unrolled_class(Unrolled(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.ones(1)))
