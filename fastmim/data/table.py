# SPDX-License-Identifier: Apache-2.0
"""The images of a run as columns: a million rows take some 60 MB, and forked workers share them.

A row is a file of its own, or a stretch of bytes in a larger one: a member of a tar file, a picture in an Arrow file, a
record of a prepared set. So one reader serves all sources, and what follows need not know which one it is.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int32, Int64

from fastmim.data.read import read_file, read_range

WHOLE = -1
"""The offset of an image that is a file of its own."""


@dataclass(frozen=True)
class Squares:
    """What the records of a prepared set are: upright pictures squashed to ``side`` x ``side`` pixels."""

    side: int
    channels: int
    dtype: str
    """Of the values: uint8, or float32 for raw ones."""


@dataclass(frozen=True)
class ImageTable:
    """Where each image lies. The order depends on names only, and is what indices of a run refer to."""

    blob: bytes
    """All names, one after another, in the file system's encoding (any bytes)."""
    start: Int64[np.ndarray, " n"]
    """Where each name begins in ``blob``."""
    end: Int64[np.ndarray, " n"]
    """Where it ends."""
    containers: tuple[str, ...]
    """Folders (of files), or files (of stretches); paths or URLs, without a slash at the end."""
    container: Int32[np.ndarray, " n"]
    """The container of each image."""
    offset: Int64[np.ndarray, " n"]
    """Where its bytes begin in the container; ``WHOLE`` for a file of its own, called container/name."""
    size: Int64[np.ndarray, " n"]
    """Number of its bytes."""
    formats: dict[str, int] = field(default_factory=dict)
    """Number of images by format, judged by suffix."""
    true_size: Int32[np.ndarray, "n 2"] | None = None
    """Width and height of each upright original, where the records are ``squares``."""
    squares: Squares | None = None
    """What the records are, where the images come from a prepared set."""
    source: str = ""
    """What the images are by content, where that is known (a prepared set's checksum); else empty."""

    def __len__(self) -> int:
        return len(self.start)

    def name(self, index: int) -> str:
        """The name of an image relative to its container, with ``/``; any bytes (surrogateescape)."""
        return os.fsdecode(self.blob[self.start[index] : self.end[index]])

    def path(self, index: int) -> str:
        """What to tell people: the file's path or URL; ``container::name`` for a stretch of a larger file."""
        container, name = self.containers[self.container[index]], self.name(index)
        if self.offset[index] != WHOLE:
            return f"{container}::{name}"
        return f"{container}/{name}" if container else name

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            BadImage: it is missing, empty, too large or no regular file.
        """
        offset = int(self.offset[index])
        if offset == WHOLE:
            return read_file(self.path(index))
        return read_range(self.containers[self.container[index]], offset, int(self.size[index]))

    def take(self, indices: Sequence[int] | Int64[np.ndarray, " m"]) -> "ImageTable":
        """The images at ``indices``, in that order. ``formats`` stays as it was: it describes the whole source."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            start=self.start[rows],
            end=self.end[rows],
            container=self.container[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            true_size=None if self.true_size is None else self.true_size[rows],
        )

    @property
    def bytes(self) -> int:
        """Sum of the images' sizes."""
        return int(self.size.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and sizes in order: the same wherever the images lie, another if one changes."""
        digest = hashlib.sha256(self.source.encode())
        for index in range(0, len(self), 1 << 16):
            rows = slice(index, index + (1 << 16))
            pairs = zip(self.start[rows].tolist(), self.end[rows].tolist(), self.size[rows].tolist(), strict=True)
            digest.update(b"".join(self.blob[start:end] + b"\0%d\0" % size for start, end, size in pairs))
        return digest.hexdigest()


def from_names(
    container: str, names: Iterable[str], sizes: Iterable[int], formats: dict[str, int] | None = None
) -> ImageTable:
    """A table of files in one folder, or of absolute paths (then ``container`` is empty), in the given order."""
    encoded = [os.fsencode(name) for name in names]
    end = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    start = np.concatenate([[0], end[:-1]]).astype(np.int64) if encoded else end
    count = len(encoded)
    return ImageTable(
        b"".join(encoded),
        start,
        end,
        (container,),
        np.zeros(count, np.int32),
        np.full(count, WHOLE, np.int64),
        np.fromiter(sizes, np.int64, count),
        formats or {},
    )


def join(tables: Sequence[ImageTable]) -> ImageTable:
    """One table after another. Tables of prepared squares cannot be joined with others."""
    if len(tables) == 1:
        return tables[0]
    shifts = np.cumsum([0, *(len(table.blob) for table in tables)])
    firsts = np.cumsum([0, *(len(table.containers) for table in tables)])
    formats: dict[str, int] = {}
    for table in tables:
        for name, count in table.formats.items():
            formats[name] = formats.get(name, 0) + count
    return ImageTable(
        b"".join(table.blob for table in tables),
        np.concatenate([table.start + shift for table, shift in zip(tables, shifts, strict=False)]),
        np.concatenate([table.end + shift for table, shift in zip(tables, shifts, strict=False)]),
        tuple(container for table in tables for container in table.containers),
        np.concatenate([table.container + np.int32(first) for table, first in zip(tables, firsts, strict=False)]),
        np.concatenate([table.offset for table in tables]),
        np.concatenate([table.size for table in tables]),
        dict(sorted(formats.items())),
    )
