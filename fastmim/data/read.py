# SPDX-License-Identifier: Apache-2.0
"""The bytes of one image, or ``BadImage`` with the reason. Nothing is decoded here."""

import contextlib
import functools
import os
import stat
from collections.abc import Iterator, Sequence

MAX_BYTES = 256 * 2**20


class BadImage(Exception):  # noqa: N818 - the fault is the image's
    """A file that cannot be used as an image.

    ``reason`` is one of: missing, unreadable, not a regular file, empty, too many bytes, not an image, too many pixels,
    too many scans, truncated, damaged, no finite values, complex numbers; or says which channels or values were found
    and what would read them.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_remote(place: str) -> bool:
    """Whether ``place`` is a URL of an object store, and not a path."""
    return "://" in place


def read_file(path: str) -> bytes:
    """All of a file or of an object.

    Raises:
        BadImage: missing, not a regular file, empty or too large.
    """
    if is_remote(path):
        from fastmim.data.sources.remote import read_object

        return read_object(path)
    with _reasons():
        # Before opening: opening a pipe waits for ever, and a device may do anything.
        _judge(os.stat(path))  # noqa: PTH116 - a Path costs as much as the reading
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, of a file that stays open for the next call.

    Raises:
        BadImage: the file is missing or ends before.
    """
    if size > MAX_BYTES:
        raise BadImage("too many bytes")
    if size == 0:
        raise BadImage("empty")
    if is_remote(path):
        from fastmim.data.sources.remote import read_object

        return read_object(path, offset, size)
    with _reasons():
        content = os.pread(_opened(path), size, offset)
    if len(content) < size:
        raise BadImage("truncated")
    return content


def read_into(path: str, offset: int, buffers: Sequence[memoryview]) -> None:
    """Fills ``buffers``, one after another, from ``offset`` on; nothing is copied on the way.

    Raises:
        BadImage: the file is missing or ends before.
    """
    wanted = sum(buffer.nbytes for buffer in buffers)
    if is_remote(path) or not hasattr(os, "preadv"):
        content = memoryview(read_range(path, offset, wanted))
        for buffer in buffers:
            buffer[:], content = content[: buffer.nbytes], content[buffer.nbytes :]
        return
    with _reasons():
        found = os.preadv(_opened(path), buffers, offset)
    if found < wanted:
        raise BadImage("truncated")


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """What the system says, in our words."""
    try:
        yield
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError as error:
        raise BadImage("unreadable") from error


def _judge(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    if status.st_size == 0:
        raise BadImage("empty")
    if status.st_size > MAX_BYTES:
        raise BadImage("too many bytes")


class _Open:
    """A file descriptor that is closed with its last owner."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=256)
def _kept(path: str) -> _Open:
    return _Open(path)


def _opened(path: str) -> int:
    return _kept(path).number
