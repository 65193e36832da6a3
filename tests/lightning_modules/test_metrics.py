"""The metrics against plain numpy, and what must hold of them for any signals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics import (
    NMSE,
    CorrelationCoefficient,
    RRMSELoss,
    RRMSESpectral,
    RRMSETemporal,
    SignAccuracy,
    correlation_coefficient,
    nmse_db,
    rrmse_spectral,
    rrmse_temporal,
    sign_accuracy,
)


def reference_nmse_db(preds, target):
    return 10 * np.log10(((preds - target) ** 2).sum() / (target**2).sum())


def rms(values):
    return np.sqrt((values**2).mean())


def power_spectrum(epoch):
    """By the definition of the discrete Fourier transform, without an FFT."""
    samples = np.arange(len(epoch))
    frequencies = np.arange(len(epoch) // 2 + 1)
    transform = np.exp(-2j * np.pi * np.outer(frequencies, samples) / len(epoch))
    return np.abs(transform @ epoch) ** 2


def reference_rrmse_temporal(preds, target):
    return np.mean([rms(p - t) / rms(t) for p, t in zip(preds, target, strict=True)])


def reference_rrmse_spectral(preds, target):
    spectra = [(power_spectrum(p), power_spectrum(t)) for p, t in zip(preds, target, strict=True)]
    return np.mean([rms(p - t) / rms(t) for p, t in spectra])


def reference_correlation(preds, target):
    return np.mean([np.corrcoef(p, t)[0, 1] for p, t in zip(preds, target, strict=True)])


def reference_sign_accuracy(preds, target):
    return np.mean([np.sign(p) == np.sign(t) for p, t in zip(preds.flat, target.flat, strict=True) if t != 0])


PAIRS = [
    (NMSE, reference_nmse_db),
    (SignAccuracy, reference_sign_accuracy),
    (RRMSETemporal, reference_rrmse_temporal),
    (RRMSESpectral, reference_rrmse_spectral),
    (CorrelationCoefficient, reference_correlation),
]
METRICS = [metric for metric, _ in PAIRS]
EEG_FUNCTIONS = [rrmse_temporal, rrmse_spectral, correlation_coefficient]
FUNCTIONS = [nmse_db, *EEG_FUNCTIONS]


def signals(epochs=7, samples=64, seed=0):
    random = np.random.default_rng(seed)
    # Epochs of unequal energy tell a ratio of sums from a mean of ratios.
    target = random.standard_normal((epochs, samples)) * random.uniform(0.1, 10, (epochs, 1))
    return target + 0.5 * random.standard_normal((epochs, samples)), target


@pytest.mark.parametrize(("metric", "reference"), PAIRS)
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_agrees_with_numpy_however_the_epochs_are_batched(metric, reference, batches):
    preds, target = signals()
    metric = metric()
    for p, t in zip(np.array_split(preds, batches), np.array_split(target, batches), strict=True):
        metric.update(torch.from_numpy(p), torch.from_numpy(t))
    np.testing.assert_allclose(metric.compute().item(), reference(preds, target), rtol=1e-5)


def test_nmse_is_a_ratio_of_sums():
    target = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    preds = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    assert nmse_db(preds, target).item() == pytest.approx(10 * np.log10(1 / 101), rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_reset_forgets(metric):
    preds, target = map(torch.from_numpy, signals())
    metric = metric()
    metric.update(preds, target)
    first = metric.compute()
    metric.reset()
    metric.update(preds, target)
    assert metric.compute() == first


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_are_summed(metric):
    preds, target = map(torch.from_numpy, signals())
    whole, ranks = metric(), [metric(), metric()]
    whole.update(preds, target)
    ranks[0].update(preds[:2], target[:2])
    ranks[1].update(preds[2:], target[2:])
    for name, reduction in whole._reductions.items():
        gathered = torch.stack([getattr(rank, name) for rank in ranks])
        torch.testing.assert_close(reduction(gathered), getattr(whole, name))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shapes", [((3, 8), (4, 8)), ((3, 8), (1, 8)), ((8,), (1, 8))])
def test_unequal_shapes_are_refused_and_named(function, shapes):
    with pytest.raises(ValueError, match="preds has shape") as error:
        function(torch.ones(shapes[0]), torch.ones(shapes[1]))
    assert str(shapes[0]) in str(error.value) and str(shapes[1]) in str(error.value)


@pytest.mark.parametrize("function", EEG_FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_epochs_without_samples_are_refused(function, shape):
    with pytest.raises(ValueError, match="samples"):
        function(torch.ones(shape), torch.ones(shape))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(function, dtype):
    preds, target = (torch.from_numpy(values).to(dtype) for values in signals(samples=512))
    value = function(100 * preds, 100 * target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, function((100 * preds).float(), (100 * target).float()))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_finite(function):
    preds, target = map(torch.from_numpy, signals())
    preds.requires_grad_()
    function(preds, target).sum().backward()
    assert torch.isfinite(preds.grad).all() and preds.grad.any()


def test_the_loss_is_the_metric_and_its_gradient_ends_at_no_error():
    preds, target = map(torch.from_numpy, signals())
    torch.testing.assert_close(RRMSELoss()(preds, target).float(), RRMSETemporal()(preds, target))
    perfect = target.clone().requires_grad_()
    RRMSELoss()(perfect, target).backward()
    assert not perfect.grad.any()


def test_a_constant_estimate_has_no_correlation():
    assert correlation_coefficient(torch.full((1, 4), 2.0), torch.tensor([[1.0, 2.0, 3.0, 5.0]])).item() == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_do_not_depend_on_the_unit(seed, scale):
    preds, target = map(torch.from_numpy, signals(3, 32, seed))
    for function in FUNCTIONS:
        torch.testing.assert_close(function(scale * preds, scale * target), function(preds, target))


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), gain=st.floats(0.01, 4))
def test_a_wrong_gain_gives_the_error_of_the_gain(seed, gain):
    _, target = map(torch.from_numpy, signals(3, 32, seed))
    torch.testing.assert_close(rrmse_temporal(gain * target, target), torch.full((3,), abs(gain - 1)).double())
    torch.testing.assert_close(rrmse_spectral(gain * target, target), torch.full((3,), abs(gain**2 - 1)).double())
    torch.testing.assert_close(correlation_coefficient(gain * target, target), torch.ones(3).double())


def test_signs_of_zeros_are_not_asked_for_and_a_zero_is_no_sign():
    target = torch.tensor([[2.0, 0.0], [-1.0, -3.0]])
    preds = torch.tensor([[1.0, 5.0], [0.0, -0.1]])
    assert sign_accuracy(preds, target).item() == pytest.approx(2 / 3)
    metric = SignAccuracy()
    metric.update(preds[:1], target[:1])
    metric.update(preds[1:], target[1:])
    assert metric.compute().item() == pytest.approx(2 / 3)
