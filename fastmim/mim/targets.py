# SPDX-License-Identifier: Apache-2.0
"""What the network must predict of a hidden block. A new target is one class and one line in ``TARGETS``."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Target(Protocol):
    """Images to what is predicted of them: one vector of ``channels`` for each cell of ``cell`` x ``cell`` pixels."""

    cell: int
    channels: int

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B channels h w"]:
        """The target in float32, without gradient and outside autocast."""
        ...


class HOG(nn.Module):
    """Histograms of oriented gradients (FastMIM, section 3.3; MaskFeat, Wei et al. 2022, section 3.2).

    For each colour and cell, the gradient magnitudes (Sobel, reflected borders) summed over ``bins`` unsigned
    directions without interpolation, then divided by their L2 norm when ``normalise``. Channel = colour * bins + bin;
    bin k holds the directions atan2(gx, gy) in [k * pi / bins, (k + 1) * pi / bins). With normalisation it does not
    change when a colour is scaled or shifted, so it may be computed before or after the images are standardised.

    Args:
        colours: channels of the images.
        cell: side of a cell in pixels; divides height and width.
        bins: directions from 0 to 180 degrees.
        normalise: divide each cell's histogram by its L2 norm.
    """

    def __init__(self, colours: int = 3, cell: int = 8, bins: int = 9, normalise: bool = True) -> None:
        super().__init__()
        self.cell, self.bins, self.normalise = cell, bins, normalise
        self.channels = colours * bins

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B channels h w"]:
        histogram = gradient_histograms(images, self.cell, self.bins)
        return (F.normalize(histogram, dim=2) if self.normalise else histogram).flatten(1, 2)


class HOGColour(nn.Module):
    """HOG, and beside it the mean of each colour: for images whose colours tell them apart.

    HOG is blind to colour: it does not change when a colour is scaled or shifted. Here each colour's mean over the
    cell follows as one more channel, times ``WEIGHT``. Channels: those of `HOG`, then one for each colour.

    Of images that are standardised by their own statistics, colour then makes about half of the target's variance:
    for cells of 8 px, the weight that makes it half lies between 0.64 and 0.97 on five sets of photos and microscope
    images (Imagenette, waste, produce, hands, nuclei), whatever the number of bins, since both parts' variance is that
    of one colour times their number.

    Args:
        colours: channels of the images.
        cell: side of a cell in pixels; divides height and width.
        bins: directions from 0 to 180 degrees.
    """

    WEIGHT = 0.75

    def __init__(self, colours: int = 3, cell: int = 8, bins: int = 9) -> None:
        super().__init__()
        self.cell = cell
        self.hog = HOG(colours, cell, bins)
        self.channels = self.hog.channels + colours

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B channels h w"]:
        """The target of standardised images; unlike HOG's, it depends on how they are standardised."""
        with torch.autocast(images.device.type, enabled=False):
            colour = self.WEIGHT * F.avg_pool2d(images.float(), self.cell)
        return torch.cat([self.hog(images), colour], dim=1)


class Pixels(nn.Module):
    """The pixels of a cell themselves (MAE, He et al. 2022, section 3; SimMIM, Xie et al. 2022, section 3.4).

    Channel = colour * cell * cell + row * cell + column.

    Args:
        colours: channels of the images.
        cell: side of a cell in pixels; divides height and width.
        normalise: subtract each cell's mean and divide by its standard deviation (MAE's "normalised pixels").
    """

    def __init__(self, colours: int = 3, cell: int = 16, normalise: bool = False) -> None:
        super().__init__()
        self.cell, self.normalise = cell, normalise
        self.channels = colours * cell * cell

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B channels h w"]:
        with torch.autocast(images.device.type, enabled=False):
            pixels = F.pixel_unshuffle(images.float(), self.cell)
            if self.normalise:
                variance, mean = torch.var_mean(pixels, dim=1, keepdim=True)
                pixels = (pixels - mean) / (variance + 1e-6).sqrt()
            return pixels


@torch.no_grad()
def gradient_histograms(images: Float[Tensor, "B C H W"], cell: int, bins: int) -> Float[Tensor, "B C bins h w"]:
    """The histograms of `HOG` before they are divided by their norm: the magnitudes of a cell, by direction.

    No ``atan2``: the cotangent gy / gx falls from infinity to minus infinity as the direction turns from 0 to pi, and
    is the same for opposite gradients. So a direction is past k * pi / bins where its cotangent is not above that of
    the angle, and sums of the magnitudes past each angle give the histogram by subtracting neighbours. That is exact,
    has no scatter, and fuses under torch.compile.
    """
    with torch.autocast(images.device.type, enabled=False):
        gx, gy = _sobel(images.float())
        magnitude, cotangent = torch.hypot(gx, gy), gy / gx
        # Reflected borders make gx == 0 common: the direction then is 0, whatever the signs. (0 / 0 has no magnitude.)
        cotangent = cotangent.masked_fill(cotangent == -math.inf, math.inf)
        sums = [F.avg_pool2d(magnitude, cell, divisor_override=1)]
        for k in range(1, bins):  # one after the other, so that each finds the memory of the one before in the cache
            past = (cotangent <= 1 / math.tan(k * math.pi / bins)).float().mul_(magnitude)
            sums.append(F.avg_pool2d(past, cell, divisor_override=1))
        sums.append(torch.zeros_like(sums[0]))
        return torch.stack([here - after for here, after in itertools.pairwise(sums)], dim=2)


def _sobel(images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Differences along x (left minus right) and y (upper minus lower), smoothed 1-2-1 across."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return down[..., :-2] - down[..., 2:], across[:, :, :-2] - across[:, :, 2:]


TARGETS: dict[str, Callable[[int, int], Target]] = {
    "hog": HOG,
    "hog_colour": HOGColour,
    "pixels": Pixels,
    "pixels_norm": functools.partial(Pixels, normalise=True),
}
