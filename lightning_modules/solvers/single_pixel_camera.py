"""A camera and its decoder as one network: it measures a scene with its own patterns, and recovers the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.block_patterns import PatternOperator
from lightning_modules.solvers.support_lista import SupportLISTA
from pibinn_plugin.storage.recipe import records_arguments

__all__ = ["SinglePixelCamera"]


@records_arguments
class SinglePixelCamera(nn.Module):
    r"""Measures blocks of images with the patterns A of its decoder, and decodes: x = f(A x + noise, A).

    Patterns and decoder are trained together: learned sensing (compare Mousavi, Patel and Baraniuk, "A Deep Learning
    Approach to Structured Signal Recovery", Allerton 2015). What it takes in is a scene, see
    `lightning_modules.data.scenes.BSDS500Scenes`: the pixels of each block, and the noise of each exposure. Once the
    patterns are on the device, it takes the measurements in the place of the scene.

    Args:
        decoder: recovers images, with the patterns as its operator, such as
            `lightning_modules.mirror_patterns.MirrorPatterns`.

    Raises:
        ValueError: a decoder whose operator does not measure blocks; by ``forward``, an input that is neither.

    Example:
        >>> import torch
        >>> from lightning_modules.walsh_patterns import WalshPatterns
        >>> camera = SinglePixelCamera(SupportLISTA(WalshPatterns(8, 16), stages=1, channels=0))
        >>> x = torch.rand(1, 1, 24, 32)
        >>> scene = torch.cat([F.pixel_unshuffle(x, 8), torch.zeros(1, 16, 3, 4)], dim=1)
        >>> scene.shape, camera(scene).shape
        (torch.Size([1, 80, 3, 4]), torch.Size([1, 1, 24, 32]))
        >>> torch.equal(camera(scene), camera(camera.decoder.operator.A(x)))
        True
    """

    def __init__(self, decoder: SupportLISTA) -> None:
        super().__init__()
        if not isinstance(decoder.operator, PatternOperator):
            raise ValueError(
                f"the decoder's operator is a {type(decoder.operator).__name__}: a camera measures with patterns of "
                f"blocks, such as MirrorPatterns"
            )
        self.decoder = decoder

    @property
    def patterns(self) -> PatternOperator:
        """What the camera measures with."""
        assert isinstance(self.decoder.operator, PatternOperator)
        return self.decoder.operator

    def measure(self, scene: Tensor) -> Tensor:
        """The measurements of a scene.

        Args:
            scene: shape ``(batch, block² + measurements, rows, columns)``.

        Returns:
            Shape ``(batch, measurements, rows, columns)``.
        """
        measurements, pixels = self.patterns.shape
        blocks, noise = scene.split([pixels, measurements], dim=1)
        return self.patterns.A(F.pixel_shuffle(blocks, self.patterns.block_size)) + noise

    def forward(self, y: Tensor) -> Tensor:
        """Recover images.

        Args:
            y: a scene, shape ``(batch, block² + measurements, rows, columns)``, or what the device has measured of it,
                shape ``(batch, measurements, rows, columns)``.

        Returns:
            The images, shape ``(batch, 1, rows · block, columns · block)``.
        """
        measurements, pixels = self.patterns.shape
        if y.dim() != 4 or y.shape[1] not in (measurements, pixels + measurements):
            raise ValueError(
                f"the input has shape {tuple(y.shape)}: it must be (batch, channels, rows, columns) with "
                f"{pixels + measurements} channels, the {pixels} pixels of a block and the noise of {measurements} "
                f"exposures, or with {measurements}, the measurements"
            )
        return self.decoder(y if y.shape[1] == measurements else self.measure(y))
