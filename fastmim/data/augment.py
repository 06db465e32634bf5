# SPDX-License-Identifier: Apache-2.0
"""Which part of a picture is used. Plain Python: the box is chosen before the picture is decoded."""

import math
import random
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in pixels of the upright picture; ``right`` and ``bottom`` are just outside of it."""

    left: int
    top: int
    right: int
    bottom: int


def random_box(
    width: int,
    height: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """The random resized crop of Inception (Szegedy et al. 2015), with the law that torchvision uses.

    The area is uniform in ``scale`` (shares of the picture), the logarithm of width / height uniform in ``ratio``, and
    the place uniform. After ten draws that do not fit: the largest centred box whose shape is within ``ratio``.

    Only ``rng.random()`` is used, because it alone is promised to give the same numbers in every version of Python.
    """
    for _ in range(10):
        area = width * height * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.random() * (width - box_width + 1))
            top = int(rng.random() * (height - box_height + 1))
            return Box(left, top, left + box_width, top + box_height)
    if width < height * ratio[0]:
        return _centred(width, height, width, round(width / ratio[0]))
    if width > height * ratio[1]:
        return _centred(width, height, round(height * ratio[1]), height)
    return Box(0, 0, width, height)


def centre_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    return _centred(width, height, side, side)


def _centred(width: int, height: int, box_width: int, box_height: int) -> Box:
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left, top, left + box_width, top + box_height)


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
