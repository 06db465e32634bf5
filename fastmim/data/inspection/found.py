# SPDX-License-Identifier: Apache-2.0
"""Remembers what was found in each file, so that the next scan opens only those that are new or have changed.

Files that could not be read are tried again: a disk may have been away, or an extra not installed.

One file for each set of folders, below the user's cache folder. It holds plain columns, no names and no pixels but
grey pictures of 16 x 16; it may be deleted at any time, and is left alone when it is damaged or of another version.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from fastmim import __version__
from fastmim.data.inspection.look import row_type
from fastmim.data.read import is_remote
from fastmim.data.table import WHOLE, ImageTable

VERSION = f"1 of {__version__}"
"""Of the file; another version of the package may see other things in a picture."""
HEADER = ("seen", "format", "dtype", "width", "height", "channels", "frames", "turned")
SUM = ("hashed", "digest")


def place(paths: Sequence[str]) -> Path:
    """The file for what the user named, in any order: $FASTMIM_CACHE, or fastmim in $XDG_CACHE_HOME or ~/.cache."""
    own, common = os.environ.get("FASTMIM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(common or "~/.cache") / "fastmim"
    roots = sorted({path if is_remote(path) else str(Path(path).expanduser().absolute()) for path in paths})
    name = hashlib.sha256(b"\0".join(os.fsencode(root) for root in roots)).hexdigest()[:32]
    return folder.expanduser() / "scan" / f"{name}.npz"


def keys(table: ImageTable, indices: Int64[np.ndarray, " m"]) -> UInt64[np.ndarray, "m 2"]:
    """Which file each image is and in which state: path, place in it, size and time of last change, as a hash.

    Zero where that cannot be known, because the file is gone or lies in an object store.
    """
    result = np.zeros((len(indices), 2), np.uint64)
    states = [_state(container) if table.squares is None else table.source for container in table.containers]
    for row, index in enumerate(indices.tolist()):
        offset, container = int(table.offset[index]), int(table.container[index])
        state = _state(table.path(index)) if offset == WHOLE else states[container]
        if state:
            text = f"{table.path(index)}\0{offset}\0{int(table.size[index])}\0{state}"
            digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
            result[row] = np.frombuffer(digest, "<u8")
    return result


class Memory:
    """What earlier scans found.

    Sums and headers hold whatever training is to see; what was found in pixels only for the same channels and values.
    """

    def __init__(self, known: Shaped[np.ndarray, " old"] | None = None, channels: int = 0, raw: bool = False) -> None:
        self.known = np.zeros(0, row_type(channels)) if known is None else known
        self.channels, self.raw = channels, raw
        self.places = {tuple(key): place for place, key in enumerate(self.known["key"].tolist())}
        self.places.pop((0, 0), None)

    @classmethod
    def load(cls, file: Path) -> "Memory":
        """What ``file`` holds; nothing if it is missing, damaged or of another version."""
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                channels, raw = arrays["settings"].tolist()
                known = arrays["rows"]
                if str(arrays["version"]) == VERSION and known.ndim == 1 and known.dtype == row_type(channels):
                    return cls(known, channels, bool(raw))
        except Exception:  # whatever is wrong with it: everything is looked at anew
            return cls()
        return cls()

    def rows(self, keys: UInt64[np.ndarray, "m 2"], channels: int, raw: bool) -> Shaped[np.ndarray, " m"]:
        """A row for each key, filled in as far as it is known."""
        rows = np.zeros(len(keys), row_type(channels))
        place = np.array([self.places.get(tuple(key), -1) for key in keys.tolist()], dtype=np.int64)
        there = place >= 0
        if (channels, raw) == (self.channels, self.raw):
            rows[there] = self.known[place[there]]
        else:
            for name in (*SUM, *HEADER):
                rows[name][there] = self.known[name][place[there]]
        rows["key"] = keys
        return rows

    def store(self, file: Path, rows: Shaped[np.ndarray, " m"], channels: int, raw: bool, most: int) -> bool:
        """Writes ``rows``, and what is known of other images, up to ``most`` in all. Whether that was possible."""
        rows = rows[rows["key"].any(1) & (rows["reason"] == b"")]
        now = {tuple(key) for key in rows["key"].tolist()}
        if (channels, raw) == (self.channels, self.raw):
            other = [place for key, place in self.places.items() if key not in now]
            rows = np.concatenate([rows, self.known[other[: max(most - len(rows), 0)]]])
        temporary = ""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as target:
                temporary = target.name
                np.savez(target, version=np.array(VERSION), settings=np.array([channels, int(raw)]), rows=rows)
            Path(temporary).replace(file)
        except OSError:
            if temporary:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()
            return False
        return True


def _state(path: str) -> str:
    """The time of the last change and the size of a file; empty if they cannot be known."""
    if is_remote(path):
        return ""
    try:
        status = os.stat(path)  # noqa: PTH116 - any bytes are a name
    except OSError:
        return ""
    return f"{status.st_mtime_ns} {status.st_size}"
