# SPDX-License-Identifier: Apache-2.0
"""Which classes are taken for which: a shaded table for some classes, shapes of SVG for many, the worst pairs."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

MOST_NUMBERED = 30
MOST_DRAWN = 300
_SHADES = 8
# The faintest and the strongest shade, in percent of the colour: a single image shows, and text of the page's own
# colour stays readable in both schemes.
_FAINT, _FULL = 14, 50

Counts = Int64[np.ndarray, "K K"]


@dataclass(frozen=True)
class Cell:
    """A cell of the table: how many images, how strong its shade is (percent), and the same in words."""

    count: int
    shade: int
    words: str


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another."""

    label: str
    answer: str
    count: int
    images: int
    """Of the class ``label``."""


@dataclass(frozen=True)
class Shapes:
    """All cells of one shade and kind as an SVG path of unit squares, at column ``answer`` and row ``label``."""

    right: bool
    opacity: float
    path: str


def shares(confusion: Counts) -> Float[np.ndarray, "K K"]:
    """Of each class (row), the share that got each answer (column); 0 in rows without images."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def shaded_table(confusion: Counts, names: list[str]) -> list[list[Cell]]:
    """The matrix as rows of cells."""
    # The root, because a few mistakes in a hundred are what one looks for.
    strength = _FAINT + (_FULL - _FAINT) * np.sqrt(shares(confusion))
    shades = np.where(confusion > 0, strength.round(), 0).astype(int)
    return [
        [
            Cell(int(count), int(shade), f"{name} taken for {names[column]}: {count}" if column != row else "")
            for column, (count, shade) in enumerate(zip(confusion[row], shades[row], strict=True))
        ]
        for row, name in enumerate(names)
    ]


def shaded_shapes(confusion: Counts) -> list[Shapes]:
    """The matrix as few shapes: cells without images are left out, the others have one of eight shades."""
    levels = np.ceil(_SHADES * np.sqrt(shares(confusion))).astype(int)
    diagonal = np.eye(len(confusion), dtype=bool)
    found = []
    for right in (True, False):
        for level in range(1, _SHADES + 1):
            places = np.argwhere((levels == level) & (diagonal == right))
            if len(places):
                path = "".join(f"M{column} {row}h1v1h-1z" for row, column in places.tolist())
                found.append(Shapes(right, level / _SHADES, path))
    return found


def worst_pairs(confusion: Counts, names: list[str], most: int) -> list[Pair]:
    """The mistakes that are made most often, by the number of images; at most so many."""
    wrong = np.where(np.eye(len(confusion), dtype=bool), 0, confusion)
    images = confusion.sum(axis=1)
    places = sorted(np.argwhere(wrong > 0).tolist(), key=lambda place: (-wrong[tuple(place)], place))
    return [Pair(names[row], names[column], int(wrong[row, column]), int(images[row])) for row, column in places[:most]]


def summary(confusion: Counts) -> str:
    """What a screen reader says of the drawing."""
    wrong = int(confusion.sum() - np.trace(confusion))
    kinds = int(np.count_nonzero(confusion)) - int(np.count_nonzero(np.diagonal(confusion)))
    return f"Confusion matrix of {len(confusion)} classes: {wrong} mistakes of {kinds} kinds."
