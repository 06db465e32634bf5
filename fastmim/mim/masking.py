# SPDX-License-Identifier: Apache-2.0
"""Which blocks of an image are hidden. A new masking is one class and one line in ``MASKINGS``."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

# The finaliser of splitmix64 (Steele et al. 2014), as signed 64-bit numbers: torch has no unsigned shift or multiply.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@runtime_checkable
class Masking(Protocol):
    """Chooses hidden blocks from the samples' keys alone, so that a mask never depends on batch, device or rank."""

    def __call__(self, keys: Int64[Tensor, " B"], side: int) -> Bool[Tensor, "B g g"]:
        """Masks on a grid of ``side`` x ``side`` blocks, True = hidden; ``hidden(side)`` in every image."""
        ...

    def hidden(self, side: int) -> int:
        """How many blocks of each image are hidden: known without asking the device."""
        ...


class RandomMasking:
    """Exactly ``round(ratio * side * side)`` blocks, every choice of them equally likely (FastMIM, section 3).

    A block is hidden when the hash of (key, block) is among the smallest of its image: no generator and no loop, and
    the same on every device.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def __call__(self, keys: Int64[Tensor, " B"], side: int) -> Bool[Tensor, "B g g"]:
        blocks = torch.arange(1, side * side + 1, device=keys.device)
        noise = _splitmix(_splitmix(keys)[:, None] + blocks * _GOLDEN)
        hidden = noise.argsort(dim=1)[:, : self.hidden(side)]
        mask = torch.zeros(noise.shape, dtype=torch.bool, device=keys.device)
        return mask.scatter(1, hidden, True).unflatten(1, (side, side))

    def hidden(self, side: int) -> int:
        """``round(ratio * side * side)``."""
        return round(self.ratio * side * side)


def _splitmix(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    # A logical shift: torch's >> copies the sign into the upper bits.
    return (state >> bits) & ((1 << (64 - bits)) - 1)


MASKINGS: dict[str, type[RandomMasking]] = {"random": RandomMasking}
