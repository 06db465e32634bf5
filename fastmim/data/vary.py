# SPDX-License-Identifier: Apache-2.0
"""RandAugment for crops in workers: timm's, with a seed for each sample and no trace in the global generators."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor

from fastmim.errors import UserError


class RandAugment:
    """RandAugment (Cubuk et al. 2020) as timm has it; ``rand-m9-mstd0.5-inc1`` is what MAE and FastMIM fine-tune with.

    Args:
        words: timm's description of it.
        side: of the crops in pixels; images are shifted by at most 45 % of it.
        mean: of each colour (0 to 1): what shows where an image has been shifted away.

    Raises:
        UserError: timm does not understand the words.
    """

    def __init__(self, words: str, side: int, mean: tuple[float, ...]) -> None:
        settings = {"translate_const": int(0.45 * side), "img_mean": tuple(round(255 * value) for value in mean)}
        try:
            if not words.startswith("rand"):
                raise ValueError("it must begin with rand")
            self._change = rand_augment_transform(words, settings)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"rand_augment = {words!r} is not in timm's words ({error}); such as rand-m9-mstd0.5-inc1, or none"
            ) from None
        for step in self._change.ops:
            if step.aug_fn is posterize:
                step.level_fn = functools.partial(_some_bits, step.level_fn)

    def __call__(self, pixels: UInt8[Tensor, "3 S S"], key: int) -> UInt8[Tensor, "3 S S"]:
        """The changed crop, a pure function of ``pixels`` and ``key``."""
        with _seeded(key):
            changed = self._change(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def _some_bits(bits_of: Callable[[float, Any], tuple[int]], magnitude: float, settings: Any) -> tuple[int]:
    """At the ends of its range timm's posterize keeps 0 bits: a black image, which Pillow 13 refuses to make."""
    return (max(1, *bits_of(magnitude, settings)),)


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """The two global generators that timm draws from, seeded here and put back afterwards."""
    before, numbers_before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers_before)
