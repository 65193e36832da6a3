"""SupportLISTA: images recovered by transform shrinkage whose support a network of one-bit weights infers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.block_patterns import ImageOperator, PatternOperator
from lightning_modules.operators.subsampled import dct
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["BlockTransform", "SupportLISTA"]


class BlockTransform(nn.Module):
    """The orthonormal cosine transform (DCT-II) of all blocks of an image, and the average of transformed blocks.

    Blocks are `size` pixels wide and `stride` apart, beyond the rim too, where the image is mirrored: each pixel is in
    (size / stride)² blocks. ``average(analyse(x))`` is x. The transform is known: it is in no checkpoint or file.

    Args:
        size: Height and width of a block.
        stride: Distance of the blocks, a divisor of `size`.

    Raises:
        ValueError: If the stride does not divide the size.

    Example:
        >>> transform = BlockTransform(size=8, stride=2)
        >>> x = torch.rand(1, 1, 17, 20)
        >>> coefficients = transform.analyse(x)
        >>> coefficients.shape, torch.allclose(transform.average(coefficients, 17, 20), x, atol=1e-5)
        (torch.Size([1, 64, 12, 13]), True)
    """

    basis: Tensor

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        if size < 1 or stride < 1 or size % stride:
            raise ValueError(f"size={size}, stride={stride}: the stride must be positive and divide the size.")
        self.size, self.stride = size, stride
        transform = dct(torch.eye(size, dtype=torch.float64)).T
        basis = torch.einsum("ih,jw->ijhw", transform, transform).float().reshape(size**2, 1, size, size)
        # A convolution of stride 1 over stride² phases is several times as fast as one of that stride over pixels.
        basis = F.pixel_unshuffle(basis, stride).contiguous(memory_format=torch.channels_last)
        self.register_buffer("basis", basis, persistent=False)

    def analyse(self, image: Tensor) -> Tensor:
        """The coefficients of shape (batch, size², rows, columns) of images (batch, 1, height, width)."""
        margin = self.size - self.stride
        right, bottom = (margin + -extent % self.stride for extent in (image.shape[3], image.shape[2]))
        padded = F.pad(image, (margin, right, margin, bottom), mode="reflect")
        phases = F.pixel_unshuffle(padded, self.stride).contiguous(memory_format=torch.channels_last)
        return F.conv2d(phases, self.basis)

    def average(self, coefficients: Tensor, height: int, width: int) -> Tensor:
        """Images (batch, 1, height, width) in which every pixel is the mean over the blocks that it is in."""
        overlap, margin = self.size // self.stride, self.size - self.stride
        flipped = self.basis.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        phases = F.conv2d(coefficients, flipped / overlap**2, padding=overlap - 1)
        return F.pixel_shuffle(phases, self.stride)[..., margin : margin + height, margin : margin + width]


@records_arguments
class SupportLISTA(nn.Module):
    r"""Recovers images from y = A x + noise by projections and shrinkage of overlapping block transforms.

    From a linear estimate x of y (y itself, in denoising) and z = 0, each stage k computes

    .. math::
        v &= x + g_k A^+ (y - A x), \qquad p = v + \rho_k (x - v), \\
        \ell_f &= 4 \log(|(D p)_f| / t_{k,f}), \\
        z &\leftarrow \mathrm{relu}(z + s S z + w W \tanh(\ell / 2) - \theta) \quad \text{in each of its layers}, \\
        x &= D^+ \left( \sigma(\ell + d_k U_k z) \odot D v \right).

    A⁺ is the pseudo-inverse, D a `BlockTransform`, D⁺ its average. Without the network, σ(ℓ) = c⁴ / (c⁴ + t⁴) of a
    coefficient c is a smooth hard threshold t_f for each frequency f: denoising by an overcomplete DCT (Guleryuz,
    "Weighted Averaging for Denoising with Overcomplete DCTs", ICIP 2007), here with the estimate of the stage before
    as the pilot p, as in BM3D (Dabov et al., IEEE TIP 2007). ℓ is the log-odds that a coefficient belongs to the
    support of the image. Neighbours in space and frequency know more of it (Faktor, Eldar and Elad, "Exploiting
    Statistical Dependencies in Sparse Representations for Signal Recovery", IEEE TSP 2012, with a Boltzmann
    machine): the network, a convolutional LISTA (Gregor and LeCun, ICML 2010) with a nonnegative state z carried
    from stage to stage and I + S in place of I - W A, adds to these odds. Its weights decide how much of a
    coefficient is kept, never its value: they can be of one bit.

    The scalars g, ρ, w, s, d are explicit step sizes of the algorithm: they let layers differ in scale when all weights
    share one.

    Args:
        operator: A, of images; the identity, for denoising, if None.
        stages: Number of stages.
        layers: Layers of the network in a stage, each with weights of its own; the very first has no S, as z is zero.
        channels: Channels of z; 0 for the method without learned filters.
        size: Height and width of the transformed blocks.
        stride: Distance of these blocks.
        threshold: Initial thresholds t, in units of the image, of the first and of the last stage, geometric between.

    Raises:
        ValueError: If an argument is out of range, or, by `forward`, if images are smaller than a block.

    Example:
        >>> solver = SupportLISTA(stages=2, layers=2, channels=4)
        >>> solver(torch.rand(3, 1, 21, 16)).shape
        torch.Size([3, 1, 21, 16])
    """

    def __init__(
        self,
        operator: ImageOperator | None = None,
        stages: int = 2,
        layers: int = 3,
        channels: int = 24,
        size: int = 8,
        stride: int = 2,
        threshold: tuple[float, float] = (0.22, 0.13),
    ) -> None:
        super().__init__()
        if min(stages, layers) < 1 or channels < 0:
            raise ValueError(f"stages={stages}, layers={layers}, channels={channels}: at least 1, 1 and 0.")
        if min(threshold) <= 0:
            raise ValueError(f"threshold={threshold}: thresholds must be positive.")
        self.operator, self.layers, self.channels = operator, layers, channels
        self.transform = BlockTransform(size, stride)
        between = torch.linspace(math.log(threshold[0]), math.log(threshold[1]), stages)
        self.log_thresholds = nn.Parameter(between.view(-1, 1, 1, 1).repeat(1, size**2 - 1, 1, 1))
        self.gradient_step_sizes = nn.Parameter(torch.ones(stages))
        # In denoising v is y throughout, and the pilot is the last estimate.
        self.pilot_weights = nn.Parameter(torch.full((stages,), 1.0 if operator is None else 0.0))
        if channels:
            self._add_network(stages, layers, channels, size**2)

    @torch.no_grad()
    def _add_network(self, stages: int, layers: int, channels: int, frequencies: int) -> None:
        """Normal weights of one deviation, with the gains in the step sizes: they can share one scale later on."""
        # What the layers of a stage see is the same: their weights W are the rows of one convolution.
        self.inputs = nn.ModuleList(nn.Conv2d(frequencies, layers * channels, 1, bias=False) for _ in range(stages))
        self.states = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(stages * layers - 1)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(channels, frequencies, 1, bias=False) for _ in range(stages))
        deviation = 1 / (3 * math.sqrt(channels))
        steps = []
        for convolutions, gain in ((self.inputs, 0.7), (self.states, 0.3), (self.outputs, 0.3)):
            steps.append(torch.empty(len(convolutions)))
            for number, convolution in enumerate(convolutions):
                weight = convolution.get_parameter("weight")
                weight.normal_(std=deviation)
                steps[-1][number] = gain / math.sqrt(weight[0].numel()) / deviation
        self.input_step_sizes, self.state_step_sizes, self.output_step_sizes = map(nn.Parameter, steps)
        self.state_thresholds = nn.Parameter(torch.full((stages * layers, channels, 1, 1), 0.02))

    def forward(self, y: Tensor) -> Tensor:
        """Recover images.

        Args:
            y: Noisy images (batch, 1, height, width), or what the operator measures of such images.

        Returns:
            The images, (batch, 1, height, width).
        """
        x = y if self.operator is None else self.operator.linear_estimate(y)
        if x.dim() != 4 or x.shape[1] != 1 or min(x.shape[2:]) < self.transform.size:
            raise ValueError(
                f"the images have shape {tuple(x.shape)}: it must be (batch, 1, height, width), at least "
                f"{self.transform.size} by {self.transform.size} pixels."
            )
        operator = self.operator.evaluated() if isinstance(self.operator, PatternOperator) else self.operator
        state = None
        for stage in range(len(self.log_thresholds)):
            towards_data = y - x if operator is None else operator.A_dagger(y - operator.A(x))
            moved = x + self.gradient_step_sizes[stage] * towards_data
            log_odds = self._log_odds(stage, moved + self.pilot_weights[stage] * (x - moved))
            if self.channels:
                state = self._infer(stage, state, log_odds)
                log_odds = log_odds + self.outputs[stage](self.output_step_sizes[stage] * state)
            kept = torch.sigmoid(log_odds) * self.transform.analyse(moved)
            x = self.transform.average(kept, *x.shape[2:])
        return x

    def _log_odds(self, stage: int, pilot: Tensor) -> Tensor:
        """ℓ, with the mean of a block, at frequency 0, always in the support."""
        logs = torch.log(self.transform.analyse(pilot).square() + 1e-8)
        # The mean of any block that is not black is far above e⁻⁴.
        thresholds = F.pad(self.log_thresholds[stage], (0, 0, 0, 0, 1, 0), value=-4.0)
        return 2 * (logs - 2 * thresholds)

    def _infer(self, stage: int, state: Tensor | None, log_odds: Tensor) -> Tensor:
        seen = self.inputs[stage](self.input_step_sizes[stage] * torch.tanh(0.5 * log_odds))
        for number, total in enumerate(seen.chunk(self.layers, dim=1)):
            layer = stage * self.layers + number
            if state is not None:
                convolved = self.states[layer - 1](self.state_step_sizes[layer - 1] * state)
                total = total + state + convolved
            state = torch.relu(total - self.state_thresholds[layer])
        assert state is not None
        return state
