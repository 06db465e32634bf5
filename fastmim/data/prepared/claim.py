# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and of which one process at a time is the writer."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PAUSE = 0.05  # seconds between two looks at a lock


class Claim:
    """A scratch file that belongs to this process alone: write to ``file``, then ``finish``."""

    def __init__(self, scratch: Path, file: BinaryIO) -> None:
        self.file, self._scratch, self.finished = file, scratch, False

    def finish(self, final: Path) -> None:
        """Brings the content to the disk, then gives it its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._scratch.replace(final)
        self.finished = True


@contextmanager
def claimed(scratch: Path, patience: float | None = None) -> Iterator[Claim]:
    """An empty ``scratch`` file whose only writer is the block; removed after it, if it was not finished.

    The system lets go of the claim when a process dies, and the next claim takes over what it left.

    Args:
        scratch: in the folder of the final file.
        patience: seconds to wait for another process that has it; for ever when None.

    Raises:
        TimeoutError: another process still has it.
        OSError: the folder cannot be written to.
    """
    handle = _lock(scratch, None if patience is None else time.monotonic() + patience)
    with os.fdopen(handle, "r+b", buffering=1 << 20) as file:
        claim = Claim(scratch, file)
        try:
            file.truncate(0)
            yield claim
        finally:
            if not claim.finished:
                scratch.unlink(missing_ok=True)
            # In words, because a process that was forked meanwhile shares the lock, and would keep it.
            _unlock(handle)


def _lock(scratch: Path, until: float | None) -> int:
    while True:
        handle = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _try_lock(handle):
                if until is not None and time.monotonic() > until:
                    raise TimeoutError(f"{str(scratch)!r} is being written by another process")
                time.sleep(PAUSE)
            # Whoever had it may have finished: then this is the finished file, and not to be touched.
            if _is_at(handle, scratch):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    try:
        # flock, not lockf: threads of one process are to wait for each other too.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, as some clusters have: two writers write the same bytes
    return True


def _unlock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_UN)
    except OSError:
        return
