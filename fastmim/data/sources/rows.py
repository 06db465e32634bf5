# SPDX-License-Identifier: Apache-2.0
"""Rows of an ``ImageTable`` while they are found: columns that grow, no object for each image."""

import io
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fastmim.data.table import WHOLE, ImageTable

FORMAT_OF_SUFFIX = {
    "jpg": "jpeg",
    "jpeg": "jpeg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tif": "tiff",
    "tiff": "tiff",
    "gif": "gif",
    "avif": "avif",
    "dcm": "dicom",
    "dicom": "dicom",
}
WANTED = ", ".join(f".{suffix}" for suffix in FORMAT_OF_SUFFIX)
COMPRESSED = ("gz", "tgz", "bz2", "tbz2", "xz", "txz", "zst", "zip", "7z", "rar")
"""Suffixes of files in which images may lie, but not so that one can be read without the others."""


def suffix_of(name: bytes) -> str:
    """What follows the last dot of the last part of a path, in lower case; empty where there is no dot."""
    _, dot, suffix = name.rpartition(b"/")[2].rpartition(b".")
    return os.fsdecode(suffix).lower() if dot else ""


def is_image(name: bytes) -> bool:
    """Whether the suffix is one of an image."""
    return suffix_of(name) in FORMAT_OF_SUFFIX


def is_hidden(name: bytes) -> bool:
    """Whether a part of a relative path begins with a dot, as those that macOS adds (``._x.jpg``) do."""
    if not name.startswith(b".") and b"/." not in name:
        return False
    return any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def count_formats(names: Iterable[bytes]) -> dict[str, int]:
    """Number of names by format; "other" are those without a known suffix."""
    found = Counter(FORMAT_OF_SUFFIX.get(suffix_of(name), "other") for name in names)
    return dict(sorted(found.items()))


class Rows:
    """Where images lie, in the order in which they are added."""

    def __init__(self) -> None:
        self._names = io.BytesIO()
        self._ends, self._sizes, self._offsets = array("q"), array("q"), array("q")
        self._container = array("i")
        self._containers: dict[str, int] = {}
        self._suffixes: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._ends)

    def add(
        self,
        container: str,
        names: Sequence[bytes],
        sizes: Iterable[int],
        offsets: Sequence[int] | None = None,
        prefix: bytes = b"",
        suffixes: Mapping[bytes, int] | None = None,
    ) -> None:
        """Adds images of one container.

        Args:
            container: a folder or a larger file, absolute; or empty, where names are whole paths or URLs.
            names: what follows ``prefix`` in the names of the rows.
            sizes: number of bytes of each.
            offsets: where each begins in the container; files of their own when not given.
            prefix: what all names begin with.
            suffixes: number of names by suffix (with its dot), if it is known; it costs as much as all the rest.
        """
        if not names:
            return
        lengths = np.fromiter(map(len, names), np.int64, len(names)) + len(prefix)
        self._ends.frombytes((np.cumsum(lengths) + self._names.tell()).tobytes())
        self._names.write(prefix + prefix.join(names))
        self._sizes.extend(sizes)
        self._offsets.extend(array("q", [WHOLE]) * len(names) if offsets is None else offsets)
        self._suffixes.update([name[name.rfind(b".") :] for name in names] if suffixes is None else suffixes)
        number = self._containers.setdefault(container, len(self._containers))
        self._container.extend(array("i", [number]) * len(names))

    def table(self) -> ImageTable:
        """All rows. Nothing can be added any more."""
        end = np.frombuffer(self._ends, np.int64)
        start = np.zeros_like(end)
        start[1:] = end[:-1]
        formats: Counter[str] = Counter()
        for suffix, count in self._suffixes.items():
            if count:
                formats[FORMAT_OF_SUFFIX.get(suffix_of(suffix), "other")] += count
        return ImageTable(
            self._names.getvalue(),  # no copy: BytesIO hands its own memory out
            start,
            end,
            tuple(self._containers),
            np.frombuffer(self._container, np.int32),
            np.frombuffer(self._offsets, np.int64),
            np.frombuffer(self._sizes, np.int64),
            dict(sorted(formats.items())),
        )
