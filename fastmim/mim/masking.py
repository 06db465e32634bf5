# SPDX-License-Identifier: Apache-2.0
"""Which blocks of an image are hidden. A new masking is one class and one line in ``MASKINGS``."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fastmim.errors import UserError
from fastmim.mim.masks import (
    Masking,
    Masks,
    Shares,
    as_masks,
    noise,
    one_mask_only,
    part_of,
    ranks,
    shift,
    smallest,
    uniform,
)
from fastmim.mim.selective import SelectiveBlocks

__all__ = ["MASKINGS", "Masking", "Masks", "OneOfFour", "RandomBlocks", "Rectangles", "SelectiveBlocks"]

# Streams of noise beside those of the masks, which are numbered from 0.
_PREDICT, _CELLS, _SHAPES = 1 << 20, 2 << 20, 3 << 20


class RandomBlocks:
    """Exactly ``round(ratio * side * side)`` blocks, every choice of them equally likely (FastMIM, section 3).

    A block is hidden when the hash of (key, block) is among the smallest of its image: no generator and no loop, and
    the same on every device.

    Several masks of an image are as different as they can be: mask k hides the k-th run of a random order of the
    blocks, which begins again at its end. So the second mask hides what the first showed, topped up at random (DMJD,
    Ma et al. 2023, section 3.2), and four masks of ratio 0.75 show each block once (FastConvMAE, Gao et al. 2022,
    section 3.4). Over all masks, no block is hidden more than once oftener than another. When the runs come back to
    where they began, a new order is drawn, so that no mask is there twice.

    Args:
        ratio: share of the blocks that is hidden.
        masks: masks of each image.
        predict: share of all blocks that is predicted: a random part of the hidden ones (CrossMAE, Fu et al. 2024,
            section 3.3); all hidden ones when None.

    Raises:
        UserError: a share that cannot be.
    """

    def __init__(self, ratio: float, masks: int = 1, predict: float | None = None) -> None:
        _at_least_one(masks)
        self.shares, self.masks = Shares(ratio, predict), masks

    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        """See `fastmim.mim.masks.Masking`; neither images nor progress are looked at."""
        blocks, (hidden, predicted) = side * side, self.shares.counts(side)
        lap = blocks // math.gcd(blocks, hidden)  # runs until one begins where the first began
        orders = [ranks(noise(keys, blocks, stream)) for stream in range(-(-self.masks // lap))]
        # A place of a run's random order is as random as any other: its first blocks are those to predict.
        place = torch.cat([(orders[k // lap] - k % lap * hidden) % blocks for k in range(self.masks)])
        return as_masks(place < hidden, None if predicted == hidden else place < predicted, (hidden, predicted), side)


class Rectangles:
    """Block-wise masking: what is hidden is a union of rectangles (BEiT, Bao et al. 2022, section 2.3; MaskFeat).

    Rectangles are drawn one after the other: a share of what is left to hide, but at least ``LEAST`` of all blocks
    (BEiT's 16 of 196), with an aspect of 0.3 to 1 / 0.3, uniform in its logarithm so that upright and lying ones are
    alike, anywhere in the image. A block remembers the first rectangle that covers it; those of the first rectangles
    are hidden until exactly ``round(ratio * side * side)`` are, at random within the last one. Blocks that none of
    the ``RECTANGLES`` covers come last, at random.

    BEiT subtracts from what is left to hide only what a rectangle newly covers, which is known one rectangle after
    the other; here the whole area counts, so that all rectangles are drawn at once. Where they overlap, later ones
    are smaller for it.

    Args:
        ratio: share of the blocks that is hidden.
        masks: 1.
        predict: share of all blocks that is predicted, a random part of the hidden ones; all of them when None.

    Raises:
        UserError: a share that cannot be, or several masks.
    """

    RECTANGLES = 32
    LEAST = 16 / 196
    ASPECT = 0.3

    def __init__(self, ratio: float, masks: int = 1, predict: float | None = None) -> None:
        one_mask_only(masks, "block-wise")
        self.shares, self.masks = Shares(ratio, predict), masks

    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        """See `fastmim.mim.masks.Masking`; neither images nor progress are looked at."""
        counts = self.shares.counts(side)
        first = self._first_cover(self.rectangles(keys, side), side)
        # One number to sort by: the rectangle in the upper bits, noise in the lower ones.
        order = (first << 57) | shift(noise(keys, side * side), 7)
        hidden = smallest(order, counts[0])
        predicted = None
        if counts[1] != counts[0]:
            predicted = part_of(hidden, noise(keys, side * side, _PREDICT), counts[1])
        return as_masks(hidden, predicted, counts, side)

    def rectangles(self, keys: Int64[Tensor, " B"], side: int) -> Int64[Tensor, "B R 4"]:
        """(top, left, height, width) of each image's rectangles in blocks, in the order in which they are drawn."""
        share, aspect, down, right = (uniform(noise(keys, self.RECTANGLES, _SHAPES + number)) for number in range(4))
        left = torch.cat([torch.ones_like(share[:, :1]), (1 - share[:, :-1]).cumprod(dim=1)], dim=1)
        area = (left * share * self.shares.counts(side)[0]).clamp(min=self.LEAST * side * side)
        stretch = ((1 - 2 * aspect) * math.log(self.ASPECT) / 2).exp()  # root of the aspect
        height = (area.sqrt() * stretch).round().clamp(1, side)
        width = (area.sqrt() / stretch).round().clamp(1, side)
        top, from_left = (down * (side + 1 - height)).floor(), (right * (side + 1 - width)).floor()
        return torch.stack([top, from_left, height, width], dim=2).long()

    def _first_cover(self, rectangles: Int64[Tensor, "B R 4"], side: int) -> Int64[Tensor, "B n"]:
        """The number of the first rectangle that covers each block; ``RECTANGLES`` where none does."""
        at = torch.arange(side, device=rectangles.device)
        top, left, height, width = rectangles[..., None].unbind(dim=2)
        rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)
        covered = rows[..., :, None] & columns[..., None, :]
        numbers = torch.arange(self.RECTANGLES, device=rectangles.device, dtype=torch.uint8)[:, None, None]
        return torch.where(covered, numbers, self.RECTANGLES).amin(dim=1).flatten(1).long()


class OneOfFour:
    """Uniform sampling of UM-MAE (Li et al. 2022, section 3): in each cell of 2 x 2 blocks, one at most is visible.

    Which one is drawn at random; it makes visible blocks a dense grid of half the side, whatever the network is. What
    ``ratio`` exceeds 0.75 hides whole cells at random (the paper's secondary masking: 0.8125 hides a quarter of the
    cells). Exactly ``round(ratio * side * side)`` blocks are hidden.

    Each mask of an image shows another block of each cell, so that four of ratio 0.75 show each block once.

    Args:
        ratio: share of the blocks that is hidden; 0.75 or more.
        masks: masks of each image, up to 4.
        predict: share of all blocks that is predicted, a random part of the hidden ones; all of them when None.

    Raises:
        UserError: a share that cannot be, or more than four masks.
    """

    def __init__(self, ratio: float, masks: int = 1, predict: float | None = None) -> None:
        if ratio < 0.75:
            raise UserError(f"mask ratio {ratio}: grid masking hides three of four blocks, 0.75, or more")
        if masks > 4:
            raise UserError(f"masks {masks}: grid masking has four blocks to show in each cell, so masks is 4 at most")
        _at_least_one(masks)
        self.shares, self.masks = Shares(ratio, predict), masks

    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        """See `fastmim.mim.masks.Masking`; neither images nor progress are looked at.

        Raises:
            UserError: ``side`` is odd.
        """
        if side % 2:
            raise UserError(
                f"grid masking pairs blocks, but {side} lie along a side; choose a block that makes it even,"
                f" or a resolution of {side - 1} or {side + 1} blocks"
            )
        blocks, counts = side * side, self.shares.counts(side)
        cells, shown = blocks // 4, blocks - counts[0]
        within = ranks(noise(keys, blocks).unflatten(1, (cells, 4)).flatten(0, 1)).unflatten(0, (-1, cells))
        cell = ranks(noise(keys, cells, _CELLS))
        # Mask k shows the k-th block of its cells, which are the next of a random order, as in RandomBlocks.
        visible = torch.cat(
            [(within == k) & (((cell - k * shown) % cells) < shown)[..., None] for k in range(self.masks)]
        )
        hidden = ~_from_cells(visible, side)
        predicted = None
        if counts[1] != counts[0]:
            bits = torch.cat([noise(keys, blocks, _PREDICT + k) for k in range(self.masks)])
            predicted = part_of(hidden, bits, counts[1])
        return as_masks(hidden, predicted, counts, side)


def _from_cells(blocks: Bool[Tensor, "N cells 4"], side: int) -> Bool[Tensor, "N n"]:
    """Cells of upper left, upper right, lower left, lower right block, as rows of blocks of an image."""
    cells = blocks.unflatten(1, (side // 2, side // 2)).unflatten(3, (2, 2))
    return cells.transpose(2, 3).flatten(1)


def _at_least_one(masks: int) -> None:
    if masks < 1:
        raise UserError(f"masks {masks}: each image needs at least one")


MASKINGS: dict[str, Callable[..., Masking]] = {
    "random": RandomBlocks,
    "blockwise": Rectangles,
    "grid": OneOfFour,
    "selective": SelectiveBlocks,
}
