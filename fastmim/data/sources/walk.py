# SPDX-License-Identifier: Apache-2.0
"""Every image file below a folder. Made for a million files: one system call each, for the size, and no object kept."""

import os
import stat
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastmim.data.sources.rows import FORMAT_OF_SUFFIX, Rows, suffix_of
from fastmim.errors import UserError

_IMAGES = [b"." + suffix.encode() for name in FORMAT_OF_SUFFIX for suffix in (name, name.upper())]
_DOT = ord(".")
# What the files begin and end with that tell of a prepared set (fastmim.data.prepared.records); asking shards itself
# needs torch, which takes more memory than a million names.
_PREPARED = (b"prepared", b".json")

Visited = set[tuple[int, int]]
"""(device, inode) of folders."""


@dataclass
class Walked:
    """What was found beside images."""

    tars: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files, by suffix or by what they are."""
    repeated: bool = False
    """Folders were left out because they had been visited."""
    prepared: bool = False
    """The folder is a prepared set, and was not walked."""


@dataclass
class _Folder:
    """One folder: its names, each list sorted."""

    prefix: bytes
    """Its path relative to the root, with a slash at the end; empty for the root."""
    images: list[bytes] = field(default_factory=list)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    suffixes: dict[bytes, int] = field(default_factory=dict)
    """Number of images by suffix, with its dot."""
    folders: list[bytes] = field(default_factory=list)
    """With a slash at the end: so they are where their files will be among all paths in order."""


def walk(root: str, rows: Rows, visited: Visited) -> Walked:
    """Adds all images below ``root`` to ``rows``, in the order of their relative paths as bytes.

    Args:
        root: absolute path of a folder.
        rows: where to add them.
        visited: folders that are left out; grows.

    Raises:
        UserError: a folder cannot be read, or one inside of ``root`` is a prepared set.
    """
    found = Walked()
    top = _list(root, b"", found, visited)
    # A stack and no recursion: folders may be deeper than Python's calls.
    open_folders = [_parts(root, top, rows)] if top and not found.prepared else []
    while open_folders:
        prefix = next(open_folders[-1], None)
        if prefix is None:
            open_folders.pop()
        elif (folder := _list(root, prefix, found, visited)) is not None:
            open_folders.append(_parts(root, folder, rows))
    found.tars.sort(key=os.fsencode)
    found.parquet.sort(key=os.fsencode)
    return found


def _parts(root: str, folder: _Folder, rows: Rows) -> Iterator[bytes]:
    """Adds a folder's images, and stops with each folder in it where that is next in order."""
    first, images, sizes = 0, folder.images, folder.sizes
    for name in folder.folders:
        last = bisect_left(images, name, first)
        rows.add(root, images[first:last], sizes[first:last], prefix=folder.prefix)
        first = last
        yield folder.prefix + name
    # Most folders hold no others; then the suffixes were counted on the way.
    suffixes = None if folder.folders else folder.suffixes
    rows.add(root, images[first:], sizes[first:], prefix=folder.prefix, suffixes=suffixes)


def _list(root: str, prefix: bytes, found: Walked, visited: Visited) -> _Folder | None:
    """What a folder holds; None if it was visited before."""
    path = os.path.join(os.fsencode(root), prefix)  # noqa: PTH118 - bytes
    folder = _Folder(prefix)
    try:
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(number)
            if (status.st_dev, status.st_ino) in visited:
                found.repeated = True
                return None
            visited.add((status.st_dev, status.st_ino))
            if _sort_out(path, folder, found) and is_alone_prepared(root, os.fsdecode(path).rstrip("/")):
                found.prepared = True
            else:
                _measure(number, folder, found)
        finally:
            os.close(number)
    except OSError as error:
        raise UserError(f"folder {os.fsdecode(path).rstrip('/')!r} cannot be read: {error.strerror}") from None
    return folder


def _sort_out(path: bytes, folder: _Folder, found: Walked) -> bool:
    """Puts names into lists, by what the folder itself says of its entries; True if it may be a prepared set."""
    images = folder.images
    suffixes = folder.suffixes = dict.fromkeys(_IMAGES, 0)
    prepared = False
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            # A name without a dot gives its last letter, which is no suffix.
            suffix = name[name.rfind(b".") :]
            if suffix in suffixes and name[0] != _DOT and entry.is_file(follow_symlinks=False):
                images.append(name)
                suffixes[suffix] += 1
            else:
                prepared |= may_be_prepared(name)
                _judge(entry, path, folder, found)
    images.sort()
    folder.folders.sort()
    return prepared


def _judge(entry: "os.DirEntry[bytes]", path: bytes, folder: _Folder, found: Walked) -> None:
    """Everything that is not plainly an image file: folders, links, other files."""
    name, kind = entry.name, "hidden"
    try:
        if name[0] != _DOT:
            if entry.is_dir():
                folder.folders.append(name + b"/")
                return
            suffix = suffix_of(name)
            kind = f".{suffix}" if suffix else "without suffix"
            if suffix in (*FORMAT_OF_SUFFIX, "tar", "parquet"):
                if not stat.S_ISREG(entry.stat().st_mode):
                    kind = "special files"
                elif suffix in FORMAT_OF_SUFFIX:
                    folder.images.append(name)
                    end = name[name.rfind(b".") :]
                    folder.suffixes[end] = folder.suffixes.get(end, 0) + 1
                    return
                else:
                    places = found.tars if suffix == "tar" else found.parquet
                    places.append(os.fsdecode(os.path.join(path, name)))  # noqa: PTH118 - bytes
    except OSError:
        kind = "broken links"
    found.others[kind] += 1


def _measure(number: int, folder: _Folder, found: Walked) -> None:
    """Sizes of the images in the folder that is open as ``number``; those that have vanished are left out."""
    ask, images = os.stat, folder.images
    try:
        folder.sizes.extend([ask(name, dir_fd=number).st_size for name in images])
    except OSError:
        kept, folder.sizes = [], array("q")
        for name in images:
            try:
                folder.sizes.append(ask(name, dir_fd=number).st_size)
                kept.append(name)
            except OSError:
                found.others["broken links"] += 1
        folder.images, folder.suffixes = kept, Counter(name[name.rfind(b".") :] for name in kept)


def may_be_prepared(name: bytes) -> bool:
    """Whether a file of this name is worth asking ``is_alone_prepared`` about its folder."""
    return name.startswith(_PREPARED[0]) and name.endswith(_PREPARED[1])


def is_alone_prepared(root: str, folder: str) -> bool:
    """Whether ``folder`` is a prepared set; paths or URLs, of which ``root`` was given.

    Raises:
        UserError: it is one, but inside of ``root``.
    """
    from fastmim.data.prepared.shards import is_prepared

    if not is_prepared(folder):
        return False
    if folder != root.rstrip("/"):
        raise UserError(f"{folder!r}, inside of {root!r}, is a prepared set; give it alone, or move it out")
    return True
