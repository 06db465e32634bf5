# SPDX-License-Identifier: Apache-2.0
"""Squares of pictures that were decoded once, in memory or in a file, shared by all workers.

Every crop is taken from the square, in the first epoch too: so what is learnt does not depend on what is in the cache,
and a run that goes on with an empty one sees the same pixels.
"""

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import psutil
import torch
from jaxtyping import Num
from torch import Tensor

from fastmim.errors import UserError

# What a cache in memory may take of what is free when it is made; the rest is for the network and its neighbours.
SHARE = 0.5
_SIZES = 8  # bytes of width and height of a picture, in one number; 0 before its square is there


class SquareCache:
    """Room for the squares of the first ``capacity`` images; the others are decoded each time.

    Args:
        count: images of the run.
        side: of a square in pixels.
        channels: of the pixels.
        raw: float32 values, not uint8.
        path: a file to keep the squares in; in memory when not given.
        fingerprint: what the images are; a file with other ones is begun anew.
        share: of the free memory that it may take.

    Raises:
        UserError: the disk has no room for the file.
    """

    def __init__(
        self,
        count: int,
        side: int,
        channels: int,
        raw: bool = False,
        path: Path | None = None,
        fingerprint: str = "",
        share: float = SHARE,
    ) -> None:
        self.side, self.channels = side, channels
        self.dtype = torch.float32 if raw else torch.uint8
        self._record = side * side * channels * self.dtype.itemsize
        if path is None:
            self.capacity = min(count, int(share * psutil.virtual_memory().available) // (self._record + _SIZES))
            # Anonymous, not in /dev/shm, of which containers have little. Forked workers share it.
            memory: mmap.mmap = mmap.mmap(-1, max(1, self.capacity * (self._record + _SIZES)))
        else:
            self.capacity = count
            memory = _open_file(path, count * (self._record + _SIZES), f"{fingerprint} {side} {channels} {raw}")
        sizes = self.capacity * _SIZES
        self._sizes = np.frombuffer(memory, np.int64, self.capacity)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=sizes) if self.capacity else None

    def get(self, index: int) -> tuple[int, int, Num[Tensor, "C N N"]] | None:
        """(width, height, square) of an image, or None if it is not there (yet)."""
        if index >= self.capacity:
            return None
        size = int(self._sizes[index])
        return (size >> 32, size & 0xFFFFFFFF, self._square(index)) if size else None

    def put(self, index: int, width: int, height: int, pixels: Num[Tensor, "C N N"]) -> None:
        """Keeps the square of an image of ``width`` x ``height`` pixels, if there is room."""
        if index < self.capacity:
            self._square(index).copy_(pixels)
            # The size comes last, and at once: it says that the square is whole.
            self._sizes[index] = width << 32 | height

    def __len__(self) -> int:
        """Number of squares that are there."""
        return int(np.count_nonzero(self._sizes))

    def _square(self, index: int) -> Num[Tensor, "C N N"]:
        assert self._bytes is not None
        record = self._bytes[index * self._record : (index + 1) * self._record]
        # Colours side by side: antialiased resizing of bytes is fastest so.
        return record.view(self.dtype).view(self.side, self.side, self.channels).permute(2, 0, 1)


def _open_file(path: Path, size: int, content: str) -> mmap.mmap:
    """A shared mapping of a file of ``size`` bytes, which is zeros unless it was written for the same ``content``.

    A killed process loses nothing of such a file, a machine that stops may; so what was written before the last start
    of the machine is not trusted.
    """
    label = path.with_suffix(".txt")
    wanted = f"{content} {_boot()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # of several ranks, one makes it
        fits = path.exists() and path.stat().st_size == size
        if not (fits and label.exists() and label.read_text(encoding="utf-8") == wanted):
            label.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            _make_file(path, size)
            label.write_text(wanted, encoding="utf-8")
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)


def _make_file(path: Path, size: int) -> None:
    """All of its room is taken at once: a mapping that finds no room later kills the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        free = psutil.disk_usage(str(path.parent)).free
        raise UserError(
            f"--cache disk needs {size / 1e9:.1f} GB in {str(path.parent)!r}, where {free / 1e9:.1f} GB are free"
            f" ({error.strerror}); use fastmim prepare (about an eighth of that), or --cache none"
        ) from None


def _boot() -> str:
    """What tells one start of the machine from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{psutil.boot_time():.0f} {os.getpid()}"  # elsewhere: never trusted twice
