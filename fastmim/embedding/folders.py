# SPDX-License-Identifier: Apache-2.0
"""Class folders, as far as paths tell: for the colours of a map, and as labels beside the features."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastmim.data.splits import PARTS
from fastmim.data.table import WHOLE, ImageTable


@dataclass(frozen=True)
class Classes:
    """A class for each image."""

    names: tuple[str, ...]
    """Sorted; any bytes (surrogateescape)."""
    labels: tuple[int, ...]
    """Of each image, its place in ``names``."""


def class_folders(table: ImageTable) -> Classes | None:
    """The first folder below what all paths share (below train/, val/ and the like), where it can be a class.

    None where some image lies in no folder, where all lie in one, or where most folders hold a single image.
    """
    every = [_folders(table, row) for row in range(len(table))]
    # Of sorted paths, what the first and the last share is shared by all.
    ends = zip(min(every, default=()), max(every, default=()), strict=False)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], ends)))
    below = [parts[shared:] for parts in every]
    if below and {parts[0] for parts in below if parts} <= set(PARTS):
        below = [parts[1:] for parts in below]
    return _classes([parts[0] if parts else "" for parts in below])


def _classes(found: Sequence[str]) -> Classes | None:
    names = tuple(sorted(set(found)))
    if "" in names or len(names) < 2 or 2 * len(names) > len(found):
        return None
    place = {name: index for index, name in enumerate(names)}
    return Classes(names, tuple(place[name] for name in found))


def _folders(table: ImageTable, row: int) -> tuple[str, ...]:
    """The folders that an image lies in; only those inside of a larger file, where it lies in one."""
    inside = table.offset[row] != WHOLE
    return PurePosixPath(table.name(row) if inside else table.path(row)).parts[:-1]
