# SPDX-License-Identifier: Apache-2.0
"""What a masking hands over, and what every masking is made of: noise that follows from keys, and exact counts."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fastmim.errors import UserError

# The finaliser of splitmix64 (Steele et al. 2014), as signed 64-bit numbers: torch has no unsigned shift or multiply.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_SIGN = -(2**63)


class Masks(NamedTuple):
    """What is hidden and what of it must be predicted.

    N = masks per image * B, all images under their first mask first.
    """

    hidden: Bool[Tensor, "N g g"]
    """True = hidden from the encoder; ``hidden_count`` in every row."""
    predicted: Bool[Tensor, "N g g"]
    """True = in the objective; a part of ``hidden`` (often the same tensor); ``predicted_count`` in every row."""
    hidden_count: int
    """Known without asking the device."""
    predicted_count: int


@runtime_checkable
class Masking(Protocol):
    """Chooses blocks from a sample's key, and from its pixels where it looks at them.

    A pure function of (key, side, image, progress): a mask never depends on batch, device or rank.
    """

    masks: int
    """Masks of each image."""

    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        """Masks on a grid of ``side`` x ``side`` blocks.

        Args:
            keys: one seed per image.
            side: blocks along a side of the image.
            images: normalised; only maskings that look at them need them.
            progress: share of the run that is done, 0 to 1; it may lie on the device and is never read back.
        """
        ...


class Shares:
    """How much is hidden and predicted, as shares of all blocks, checked once.

    Args:
        ratio: share that is hidden.
        predict: share that is predicted; all that is hidden when None.

    Raises:
        UserError: a share that cannot be.
    """

    def __init__(self, ratio: float, predict: float | None) -> None:
        if not 0 < ratio < 1:
            raise UserError(f"mask ratio {ratio}: the share of hidden blocks lies between 0 and 1, as 0.75")
        if predict is not None and not 0 < predict <= ratio:
            raise UserError(f"predict {predict}: only hidden blocks can be predicted; above 0, at most ratio {ratio}")
        self.ratio, self.predict = ratio, predict

    def counts(self, side: int) -> tuple[int, int]:
        """(hidden, predicted) blocks of ``side * side``, each rounded."""
        hidden = round(self.ratio * side * side)
        return hidden, hidden if self.predict is None else round(self.predict * side * side)


def one_mask_only(masks: int, what: str) -> None:
    """Refuse several masks of an image where they cannot be kept apart.

    Raises:
        UserError: ``masks`` is not 1.
    """
    if masks != 1:
        raise UserError(f"masks {masks}: {what} masking makes one of each image; 'random' and 'grid' make several")


# torch 2.14 compiles this for CPUs into code that writes beyond its memory (at grids of 7 x 7).
@torch.compiler.disable  # type: ignore[untyped-decorator]
def noise(keys: Int64[Tensor, " B"], count: int, stream: int = 0) -> Int64[Tensor, "B count"]:
    """64 random bits for each of ``count`` things of each image; another ``stream`` gives unrelated ones."""
    state = _splitmix(keys)
    if stream:
        state = _splitmix(state ^ stream)
    return _splitmix(state[:, None] + torch.arange(1, count + 1, device=keys.device) * _GOLDEN)


def uniform(bits: Int64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bits of `noise` as numbers above 0 and below 1, in float32: the middles of 2**23 equal parts."""
    return (shift(bits, 41).float() + 0.5) * 2.0**-23


def gumbel(bits: Int64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard Gumbel noise: the largest of log p + noise draw from p without replacement (Kool et al. 2019)."""
    return -(-uniform(bits).log()).log()


def ranks(order: Tensor) -> Int64[Tensor, "B n"]:
    """The place of each thing of a row when the row is sorted, 0 for the smallest."""
    order = order.argsort(dim=1)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def smallest(order: Tensor, count: int) -> Bool[Tensor, "B n"]:
    """True for the ``count`` smallest of each row."""
    chosen = order.argsort(dim=1)[:, :count]
    return torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter(1, chosen, True)


def part_of(hidden: Bool[Tensor, "N n"], bits: Int64[Tensor, "N n"], count: int) -> Bool[Tensor, "N n"]:
    """``count`` of the blocks that are True in each row, every choice of them equally likely."""
    # With the sign bit, noise of hidden blocks sorts before that of all others.
    return smallest(torch.where(hidden, bits | _SIGN, bits & ~_SIGN), count)


def as_masks(
    hidden: Bool[Tensor, "N n"], predicted: Bool[Tensor, "N n"] | None, counts: tuple[int, int], side: int
) -> Masks:
    """Rows of ``side * side`` blocks as grids; what is hidden is predicted when ``predicted`` is None."""
    grid = hidden.unflatten(1, (side, side))
    return Masks(grid, grid if predicted is None else predicted.unflatten(1, (side, side)), *counts)


def shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """A logical shift to the right: torch's >> copies the sign into the upper bits."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    state = (state ^ shift(state, 30)) * _MIX_1
    state = (state ^ shift(state, 27)) * _MIX_2
    return state ^ shift(state, 31)
