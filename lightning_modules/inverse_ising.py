r"""Couplings on a torus from samples of its spins, by pseudo-likelihood: float, one-bit and ternary ones.

All minimise :math:`L(W) = \sum \log(1 + e^{-2 s_i h_i})` over spins and samples, with `local_fields` h = W s on the
edges of the lattice, see `negative_log_pseudo_likelihood`:

- `ridge_couplings`: L + ρ ‖W‖²;
- `box_couplings`: L over |W| ≤ λ;
- `one_bit_couplings`: the signs of a box solution, then L over the one scale of these signs;
- `ternary_couplings`: 0 where a box solution is below a threshold, else its sign, then L over their one scale.

What L alone would not choose (ρ, the box, the threshold) is chosen by cross-validation: the samples are dealt into four
parts, three are fitted and the pseudo-likelihood of the fourth decides. The choice is then fitted to all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from lightning_modules.pseudo_likelihood import negative_log_pseudo_likelihood
from lightning_modules.solvers.local_fields import local_fields
from pibinn_plugin.errors import PIBiNNError, ScaleError
from pibinn_plugin.initialization.sign_regression import OneBitStart, one_bit_latent

__all__ = [
    "box_couplings",
    "fit_couplings",
    "fit_scale",
    "one_bit_couplings",
    "ridge_couplings",
    "ternary_couplings",
]

STEPS, TOLERANCE, PARTS, LARGEST_SCALE = 300, 1e-4, 4, 10.0
PENALTIES = tuple(0.3 * 3**k for k in range(5))  # ρ: 0.3 to 24
BOXES = tuple(0.1 * 1.3**k for k in range(10))  # λ: 0.1 to 1.06
THRESHOLDS = tuple(0.1 * k for k in range(9))  # in units of the largest coupling
NEIGHBOURS = 4

Fit = Callable[[Tensor], Tensor]  # of samples
Finish = Callable[[Tensor, Tensor], Tensor]  # of couplings and the samples that they were fitted to


class _PairProducts:
    """What L needs of samples: the products of each spin with its right neighbour and with the one below.

    ``products`` is (2, rows, columns, samples): rolling the lattice then moves whole rows of numbers.
    """

    def __init__(self, spins: Tensor) -> None:
        self.products = torch.stack([spins * spins.roll(-1, -1), spins * spins.roll(-1, -2)]).movedim(1, -1)
        self.products = self.products.contiguous()

    def alignments(self, couplings: Tensor) -> Tensor:
        """The products s h of spins and fields, shape (rows, columns, samples)."""
        across, along = couplings.unsqueeze(-1) * self.products
        return across + across.roll(1, 1) + along + along.roll(1, 0)

    def gradient(self, couplings: Tensor) -> Tensor:
        """Of L, in the shape of the couplings."""
        slope = -2 * torch.sigmoid(-2 * self.alignments(couplings))
        both_ends = torch.stack([slope + slope.roll(-1, 1), slope + slope.roll(-1, 0)])
        return (both_ends * self.products).sum(-1)


@torch.no_grad()
def fit_couplings(spins: Tensor, box: float = math.inf, penalty: float = 0.0) -> Tensor:
    """The couplings that minimise ``L(W) + ρ ‖W‖²`` over ``|W| ≤ λ``.

    By accelerated projected gradients (Beck and Teboulle, SIAM Journal on Imaging Sciences 2, 2009), until no coupling
    moves by 1e-4. A field has four couplings and each is in two fields: no curvature of L is above 8 a sample.

    Args:
        spins: samples, -1 or 1, shape ``(samples, rows, columns)``.
        box: λ.
        penalty: ρ.

    Returns:
        W, shape ``(2, rows, columns)``, as of `local_fields`.

    Raises:
        PIBiNNError: no samples, or values other than -1 and 1.

    Example:
        >>> spins = torch.ones(10, 4, 4)
        >>> fit_couplings(spins, box=0.5).unique()
        tensor([0.5000])
    """
    if spins.dim() != 3 or not len(spins) or not torch.equal(spins.abs(), torch.ones_like(spins)):
        raise PIBiNNError(
            f"the samples have shape {tuple(spins.shape)}: expected (samples, rows, columns) with at least one sample "
            f"and values of -1 and 1 alone"
        )
    return _minimum(spins.to(torch.int8).numpy().tobytes(), tuple(spins.shape), box, penalty).clone()


@lru_cache(maxsize=512)  # box, one-bit and ternary couplings share their fits, and so do the rows of a comparison
def _minimum(samples: bytes, shape: tuple[int, ...], box: float, penalty: float) -> Tensor:
    spins = torch.frombuffer(bytearray(samples), dtype=torch.int8).reshape(shape).float()
    data = _PairProducts(spins)
    step = 1 / (8 * len(spins) + 2 * penalty)
    couplings = ahead = spins.new_zeros(2, *spins.shape[1:])
    momentum = 1.0
    for _ in range(STEPS):
        gradient = data.gradient(ahead) + 2 * penalty * ahead
        before, couplings = couplings, (ahead - step * gradient).clamp(-box, box)
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = couplings + (momentum - 1) / next_momentum * (couplings - before)
        momentum = next_momentum
        if float((couplings - before).abs().max()) < TOLERANCE:
            break
    return couplings


@torch.no_grad()
def fit_scale(spins: Tensor, codes: Tensor) -> float:
    """The scale λ in (0, 10) that minimises ``L(λ C)`` for codes C of -1, 0 and 1, by bisection.

    A spin and its four neighbours then agree to one of nine degrees, and how often each occurs is all that L needs.

    Args:
        spins: samples, shape ``(samples, rows, columns)``.
        codes: C, shape ``(2, rows, columns)``.

    Raises:
        ScaleError: L does not fall with λ: the samples contradict the codes, or all codes are zero.

    Example:
        >>> spins = torch.ones(8, 4, 4)
        >>> spins[:, 0, 0] = torch.tensor([1.0, -1.0] * 4)
        >>> round(fit_scale(spins, torch.ones(2, 4, 4)), 3)
        0.454
    """
    agreement = _PairProducts(spins).alignments(codes)
    counts = torch.bincount((agreement.flatten() + NEIGHBOURS).round().long(), minlength=2 * NEIGHBOURS + 1).double()
    degrees = 2.0 * torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=torch.float64)
    if not float(counts @ degrees) > 0:
        raise ScaleError(
            f"the pseudo-likelihood of {len(spins)} samples does not rise with the scale of these couplings: the "
            f"samples say nothing of them, or the contrary"
        )
    low, high = 0.0, LARGEST_SCALE
    while high - low > 1e-9:
        middle = (low + high) / 2
        falls = float(counts @ (degrees * torch.sigmoid(-middle * degrees))) > 0
        low, high = (middle, high) if falls else (low, middle)
    return (low + high) / 2


def ridge_couplings(spins: Tensor) -> Tensor:
    """Float couplings: L + ρ ‖W‖², with ρ from a grid by cross-validation.

    Args and errors are those of `box_couplings`.

    Example:
        >>> ridge_couplings(torch.ones(8, 4, 4)).shape
        torch.Size([2, 4, 4])
    """
    return _cross_validated(spins, [partial(fit_couplings, penalty=penalty) for penalty in PENALTIES], [_as_they_are])[
        1
    ]


def box_couplings(spins: Tensor) -> Tensor:
    """Float couplings: L over ``|W| ≤ λ``, with λ from a grid by cross-validation.

    Args:
        spins: samples, -1 or 1, shape ``(samples, rows, columns)``.

    Returns:
        W, shape ``(2, rows, columns)``.

    Raises:
        PIBiNNError: fewer than four samples, or values other than -1 and 1.

    Example:
        >>> box_couplings(torch.ones(8, 4, 4)).shape
        torch.Size([2, 4, 4])
    """
    return _cross_validated(spins, _BOX_FITS, [_as_they_are])[1]


def one_bit_couplings(spins: Tensor) -> OneBitStart:
    """Signs of couplings as latents ``S · max(|V|, 0.2 λ)``, and λ: the signs of the box solution V that does best so.

    The box is chosen by the cross-validated pseudo-likelihood of the one-bit couplings, not of V: a smaller one than
    that of `box_couplings` often has the better signs.

    Args and errors are those of `box_couplings`.

    Raises:
        ScaleError: samples that say nothing of the couplings.

    Example:
        >>> from lightning_modules.data.spin_samples import SpinSamples
        >>> data = SpinSamples(size=4, coupling=0.5, training_samples=200)
        >>> data.setup()
        >>> start = one_bit_couplings(data.train_set.samples)
        >>> torch.equal(start.latent.sign(), data.couplings.sign()), 0.4 < start.scale < 0.6
        (True, True)
    """
    box_solution, couplings = _cross_validated(spins, _BOX_FITS, [partial(_scaled_codes, threshold=0.0)])
    signs, scale = couplings.sign(), float(couplings.abs().max())
    return OneBitStart(one_bit_latent(signs, box_solution, scale), scale)


def ternary_couplings(spins: Tensor) -> Tensor:
    """Couplings -α, 0 or α: where a box solution is above a threshold, its sign; box and threshold cross-validated.

    Args and errors are those of `box_couplings`.

    Raises:
        ScaleError: samples that say nothing of the couplings.

    Example:
        >>> ternary_couplings(torch.ones(8, 4, 4)).unique().numel()
        1
    """
    finishes = [partial(_scaled_codes, threshold=threshold) for threshold in THRESHOLDS]
    return _cross_validated(spins, _BOX_FITS, finishes)[1]


_BOX_FITS = [partial(fit_couplings, box=box) for box in BOXES]


def _as_they_are(couplings: Tensor, spins: Tensor) -> Tensor:
    return couplings


def _scaled_codes(couplings: Tensor, spins: Tensor, threshold: float) -> Tensor:
    """Signs, 0 below a threshold in units of the largest coupling, times the scale that fits the samples best."""
    signs = torch.where(couplings >= 0, 1.0, -1.0)
    codes = torch.where(couplings.abs() < threshold * couplings.abs().max(), 0.0, signs)
    return fit_scale(spins, codes) * codes


def _cross_validated(spins: Tensor, fits: Sequence[Fit], finishes: Sequence[Finish]) -> tuple[Tensor, Tensor]:
    """The pair of fit and finish that predicts parts held out best: its fit to all samples, and the finish of that."""
    if len(spins) < PARTS:
        raise PIBiNNError(f"{len(spins)} samples cannot be dealt into {PARTS} parts: give more")
    part = torch.arange(len(spins)) % PARTS
    losses = torch.zeros(len(fits), len(finishes), dtype=torch.float64)
    for held in range(PARTS):
        fitted, others = spins[part != held], spins[part == held]
        for row, fit in zip(losses, fits, strict=True):
            couplings = fit(fitted)
            row += torch.tensor([_loss(others, finish(couplings, fitted)) for finish in finishes])
    best = int(losses.argmin())
    couplings = fits[best // len(finishes)](spins)
    return couplings, finishes[best % len(finishes)](couplings, spins)


def _loss(spins: Tensor, couplings: Tensor) -> float:
    return float(negative_log_pseudo_likelihood(local_fields(spins, couplings), spins).sum(dtype=torch.float64))
