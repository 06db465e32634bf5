# SPDX-License-Identifier: Apache-2.0
"""The mask that data, backbones and methods share: ``Bool["B g g"]`` on a grid of blocks, True = hidden."""

from jaxtyping import Bool
from torch import Tensor


def resize_mask(mask: Bool[Tensor, "B g g"], side: int) -> Bool[Tensor, "B side side"]:
    """The same mask on another grid; the one place where a mask changes its grid.

    On a finer grid every place takes the value of its block. On a coarser one a place is hidden when all of its blocks
    are.

    Raises:
        ValueError: neither grid divides the other.
    """
    blocks = mask.shape[-1]
    if side % blocks == 0:
        repeat = side // blocks
        return mask.repeat_interleave(repeat, dim=1).repeat_interleave(repeat, dim=2)
    if blocks % side == 0:
        return mask.unflatten(2, (side, -1)).unflatten(1, (side, -1)).all(dim=4).all(dim=2)
    raise ValueError(f"a mask of {blocks} x {blocks} blocks does not fit a grid of {side} x {side}")
