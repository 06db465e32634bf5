# SPDX-License-Identifier: Apache-2.0
"""What is found in one image, as a row of fixed size: a million of them fit in memory and in a file."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from fastmim.data.decoding.decode import Facts, facts
from fastmim.data.decoding.jpeg import read_header
from fastmim.data.inspection import duplicates, statistics
from fastmim.data.read import BadImage
from fastmim.data.table import ImageTable

CRASHED = "decoder crashed or hung"
WARM: set[bytes] = set()
"""Formats that this process has decoded."""
GREY = 1.5 / 255
"""Mean difference of two channels, as a share of the values' range, below which a colour picture is grey."""


def row_type(channels: int) -> np.dtype[Any]:
    """The columns of a row; ``channels`` are those that statistics are kept of."""
    return np.dtype(
        [
            ("key", "<u8", 2),  # which file it is, and in which state; see found.py
            ("hashed", "?"),
            ("digest", "u1", 32),  # SHA-256 of the bytes, where hashed
            ("seen", "?"),  # the header; the columns up to turned
            ("format", "S12"),
            ("dtype", "S12"),
            ("width", "<i4"),
            ("height", "<i4"),
            ("channels", "<i4"),
            ("frames", "<i4"),
            ("turned", "?"),  # by EXIF
            ("opened", "?"),  # the pixels were tried; the columns below
            ("reason", "S80"),  # empty if they could be decoded
            ("milliseconds", "<f4"),  # to read and decode
            ("grey", "?"),
            ("detail", "u1"),
            ("hash", "<u8"),
            ("thumb", "u1", (duplicates.THUMB, duplicates.THUMB)),
            ("summary", "<f8", (channels, 2 + statistics.NODES)),
        ]
    )


@dataclass(frozen=True)
class Look:
    """Reads and judges images of ``table``: what a worker holds."""

    table: ImageTable
    channels: int
    raw: bool

    def __call__(self, wanted: Sequence[tuple[int, bool, bool]]) -> Shaped[np.ndarray, " n"]:
        """A row each for (index, whether to hash the bytes, whether to open the picture)."""
        rows = np.zeros(len(wanted), row_type(self.channels))
        for row, (index, to_hash, to_open) in zip(rows, wanted, strict=True):
            self._fill(row, index, to_hash, to_open)
        return rows

    def _fill(self, row: np.void, index: int, to_hash: bool, to_open: bool) -> None:
        row["opened"] = to_open
        content = b""
        try:
            start = time.perf_counter()
            content = self.table.read(index)
            if to_open:
                see(row, self.table, content)
                if bytes(row["format"]) not in WARM:  # a library is loaded with the first image that needs it
                    WARM.add(bytes(row["format"]))
                    statistics.small_picture(self.table, content, self.channels, self.raw)
                    start = time.perf_counter()
                pixels = statistics.small_picture(self.table, content, self.channels, self.raw)
                row["milliseconds"] = 1000 * (time.perf_counter() - start)
                self._describe(row, pixels)
        except BadImage as bad:
            row["reason"] = bad.reason.encode()[:80]
        if to_hash and content:
            row["hashed"] = True
            row["digest"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)

    def _describe(self, row: np.void, pixels: Float64[np.ndarray, "C s s"]) -> None:
        row["summary"] = statistics.summary(pixels)
        finite = np.where(np.isfinite(pixels), pixels, 0.0)
        low, high = (float(finite.min()), float(finite.max())) if self.raw else (0.0, 1.0)
        scaled = (finite - low) / ((high - low) or 1.0)
        # A channel after the other: a picture of 200 bands stays small.
        row["grey"] = len(pixels) == 1 or all(np.abs(one - scaled[0]).mean() < GREY for one in scaled[1:])
        grey = 255 * scaled.mean(0)
        row["hash"], row["detail"] = duplicates.difference_hash(grey)
        row["thumb"] = duplicates.thumb(grey)


def see(row: np.void, table: ImageTable, content: bytes) -> None:
    """Fills in what the header says.

    Raises:
        BadImage: it is no image.
    """
    if table.squares is not None:
        squares = table.squares
        kind = "jpeg" if content[:2] == b"\xff\xd8" else "npy"
        found = Facts(kind, squares.side, squares.side, squares.channels, squares.dtype, 1)
    else:
        found = facts(content)
    row["format"], row["dtype"] = found.format.encode(), found.dtype.encode()
    row["width"], row["height"] = found.width, found.height
    row["channels"], row["frames"] = found.channels, found.frames
    row["turned"] = found.format == "jpeg" and _turned(content)
    row["seen"] = True


def crashed(wanted: Sequence[tuple[int, bool, bool]], channels: int) -> Shaped[np.ndarray, " n"]:
    """The rows of images at which the process died."""
    rows = np.zeros(len(wanted), row_type(channels))
    rows["opened"] = [to_open for _, _, to_open in wanted]
    rows["reason"] = CRASHED.encode()
    return rows


def _turned(content: bytes) -> bool:
    """Whether the EXIF of a JPEG says that the picture lies on its side or on its head, or is mirrored."""
    header = read_header(content)
    return header is not None and header.segments.orientation != 1
