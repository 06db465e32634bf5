# SPDX-License-Identifier: Apache-2.0
"""Local copies of the shards of an object store: downloaded whole, checked, shared by processes, bounded in bytes.

A copy is a file whose name begins with a digest of what it must be, so that a changed set never meets old copies. A
download that was cut short is a scratch file, which does not count, and which the next one takes over.
"""

import contextlib
import fcntl
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmim.data.prepared.claim import PAUSE, Claim, claimed
from fastmim.data.prepared.records import FileSum
from fastmim.data.read import BadImage
from fastmim.errors import UserError

PIECE = 8 * 2**20  # bytes of one request, and the memory that a download takes
PAUSES = (1.0, 3.0, 9.0)  # seconds to wait before an object store is asked again
GRACE = 30.0  # seconds since its last use after which a copy may be removed
TOUCH = 5.0  # seconds between two notes that a copy is in use
PATIENCE = 10.0  # seconds; copies are locked for moments only
THREADS = 4  # downloads ahead of time


class ShardCache:
    """A folder of copies, of which the least recently used go first.

    Args:
        folder: where copies lie; several runs and processes may share it.
        max_bytes: what copies may take together. More only while those in use need more.
        sums: length and SHA-256 of the shards that ``local`` and ``prefetch`` are asked for, by URL.
    """

    def __init__(self, folder: Path, max_bytes: int, sums: Mapping[str, FileSum] | None = None) -> None:
        self.folder, self.max_bytes, self.sums = folder, max_bytes, dict(sums or {})
        self._known: dict[str, tuple[str, float]] = {}
        self._begin(os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        """For processes that do not share memory: what it was made of."""
        return {"folder": self.folder, "max_bytes": self.max_bytes, "sums": self.sums}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def local(self, url: str) -> str:
        """The path of the copy of a shard that is in ``sums``; so quick that it may be asked for each image.

        Raises:
            UserError: as ``fetch``.
        """
        path, until = self._known.get(url, ("", 0.0))
        if time.monotonic() < until:
            return path
        return self.fetch(url, self.sums[url].bytes, self.sums[url].sha256)

    def fetch(self, url: str, size: int, sha256: str | None = None) -> str:
        """The path of a copy, which is downloaded if there is none, and stays for at least ``GRACE`` seconds.

        Args:
            url: of the shard.
            size: its length in bytes.
            sha256: its sum; not checked when None.

        Raises:
            UserError: it cannot be downloaded, is damaged there, or the folder cannot be written to.
        """
        digest = hashlib.sha256(f"{url} {size} {sha256}".encode()).hexdigest()[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._find(digest, size)
            while path is None:
                with claimed(self.folder / f"{digest}.tmp") as claim:
                    # Another process may have finished it between the look and the claim.
                    path = self._find(digest, size) or self._download(claim, digest, url, size, sha256)
        except OSError as error:
            where = str(self.folder)
            raise UserError(f"the shard cache {where!r} cannot be written to: {error.strerror or error}") from None
        self._known[url] = (path, time.monotonic() + TOUCH)
        return path

    def prefetch(self, urls: Iterable[str]) -> None:
        """Downloads shards of ``sums`` in the background, a few at a time; errors come when they are asked for."""
        if self._pid != os.getpid():
            self._begin(os.getpid())  # a forked process has none of its parent's threads
        now = time.monotonic()
        for url in urls:
            if url in self._asked or self._known.get(url, ("", 0.0))[1] > now:
                continue
            self._asked.add(url)
            self._queue.put(url)
            if len(self._threads) < THREADS:
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()

    def _begin(self, pid: int) -> None:
        self._pid = pid
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._asked: set[str] = set()
        self._threads: list[threading.Thread] = []

    def _serve(self) -> None:
        while True:
            url = self._queue.get()
            try:
                self.local(url)
            except (UserError, KeyError):
                pass
            finally:
                self._asked.discard(url)

    def _find(self, digest: str, size: int) -> str | None:
        """The copy, noted as just used."""
        for path in self.folder.glob(f"{digest}.*.tar"):
            with contextlib.suppress(FileNotFoundError), _held(path, fcntl.LOCK_SH, PATIENCE) as handle:
                if handle is None:
                    continue
                os.utime(handle)
                if os.fstat(handle).st_size == size:  # one that was removed is empty
                    return str(path)
        return None

    def _download(self, claim: Claim, digest: str, url: str, size: int, sha256: str | None) -> str:
        """Writes the shard to the claimed file, and gives that a name which no copy had before.

        A reader may still have an old copy open by its name; that copy is emptied when it is removed.
        """
        self._make_room(claim, size)
        for pause in (*PAUSES, None):
            claim.file.seek(0)
            found = self._copy(claim, url, size)
            if found == (sha256 or found):
                break
            if pause is None:
                raise UserError(f"{url!r} is damaged: its SHA-256 is {found}, not {sha256}; copy the set there again")
            time.sleep(pause)
        path = self.folder / f"{digest}.{time.time_ns():x}.tar"
        claim.finish(path)
        return str(path)

    def _copy(self, claim: Claim, url: str, size: int) -> str:
        """Downloads once; the SHA-256."""
        digest = hashlib.sha256()
        for offset in range(0, size, PIECE):
            content = _ask(url, offset, min(PIECE, size - offset))
            claim.file.write(content)
            digest.update(content)
        return digest.hexdigest()

    def _make_room(self, claim: Claim, size: int) -> None:
        """Removes the least recently used copies until ``size`` more bytes fit; what was just used stays."""
        with claimed(self.folder / ".room"):
            # The file takes its full length at once (but no blocks), so that others count it.
            os.ftruncate(claim.file.fileno(), size)
            files = []
            for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.tmp")):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime, status.st_size, path))
            total = sum(length for _, length, _ in files)
            for used, length, path in sorted(files):
                if total <= self.max_bytes or used > time.time() - GRACE:
                    return
                if _remove(path):
                    total -= length


def _remove(path: Path) -> bool:
    """Removes a copy, or what a dead process left of one; False where it is being written, or was just used."""
    if path.suffix == ".tmp":
        try:
            with claimed(path, patience=0):
                return True  # a claim that is not finished removes its file
        except TimeoutError:
            return False
    with contextlib.suppress(FileNotFoundError), _held(path, fcntl.LOCK_EX, patience=0.0) as handle:
        if handle is None or os.fstat(handle).st_mtime > time.time() - GRACE:
            return False
        # Emptied first: a process that once opened it holds its blocks as long as it lives.
        os.truncate(path, 0)
        path.unlink()
    return True


@contextlib.contextmanager
def _held(path: Path, kind: int, patience: float) -> Iterator[int | None]:
    """Keeps a copy from being removed between the look at it and the note that it is in use; None if that fails."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle if _lock(handle, kind, patience) else None
    finally:
        # In words, because a process that was forked meanwhile shares the lock, and would keep it.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(handle: int, kind: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(PAUSE)
        except OSError:
            return True  # a file system without locks


def _ask(url: str, offset: int, size: int) -> bytes:
    """A piece of an object.

    Raises:
        UserError: it cannot be had, after some attempts.
    """
    from fastmim.data.sources.remote import read_object

    for pause in (*PAUSES, None):
        try:
            return read_object(url, offset, size)
        except BadImage as error:
            if pause is None or error.reason != "unreadable":
                raise UserError(
                    f"{url!r} cannot be downloaded: {error.reason} (from byte {offset} on); what is done stays:"
                    " go on when the object store answers again"
                ) from None
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
