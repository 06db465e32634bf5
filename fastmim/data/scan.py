# SPDX-License-Identifier: Apache-2.0
"""Which files are the images. Only names, kinds and sizes are read; nothing is opened."""

import difflib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmim.data.augment import centre_box
from fastmim.data.decode import BadImage, read_crop
from fastmim.errors import UserError

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
}
WANTED = ", ".join(f".{suffix}" for suffix in FORMAT_OF_SUFFIX)
FIRST_LOOK = 32

Found = tuple[str, int]
"""A file's name relative to its folder or list, with ``/``, and its size in bytes."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of a run."""

    files: tuple[str, ...]
    """Absolute paths, in an order that depends on names only. Names may be any bytes (surrogateescape)."""
    bytes: int
    """Sum of the files' sizes."""
    formats: dict[str, int]
    """Number of files by format, judged by suffix."""
    fingerprint: str
    """SHA-256 over the sorted (relative path, size): the same wherever the folder lies, another if a file changes."""


def scan(paths: Sequence[str]) -> ImageFiles:
    """All images in ``paths``: folders (any depth), image files, and .txt lists of paths (relative to the list).

    Hidden files and folders are left out, links are followed, and every folder is visited once, so that links in a
    circle end.

    Raises:
        UserError: a path is missing, cannot be read, or holds no image.
    """
    if not paths:
        raise UserError("no images given; name a folder, image files, or a .txt list of paths")
    visited: set[tuple[int, int]] = set()
    found: dict[str, Found] = {}
    for path in paths:
        base, names = _look_into(Path(path).expanduser().absolute(), visited)
        for name, size in sorted(names):
            found.setdefault(name if name.startswith("/") else f"{base}/{name}", (name, size))
    formats = Counter(FORMAT_OF_SUFFIX[_suffix(file)] for file in found)
    total = sum(size for _, size in found.values())
    return ImageFiles(tuple(found), total, dict(sorted(formats.items())), _fingerprint(found.values()))


def first_look(files: Sequence[str]) -> None:
    """Decode evenly spread files until one is good, so that a hopeless folder is known before anything is built.

    Raises:
        UserError: none of up to 32 files can be read.
    """
    count = min(FIRST_LOOK, len(files))
    chosen = [files[position * len(files) // count] for position in range(count)]
    first = ""
    for file in chosen:
        try:
            read_crop(file, centre_box, 8)
            return
        except BadImage as bad:
            first = first or f"{file!r}: {bad.reason}"
    raise UserError(f"none of {count} images that were tried (of {len(files)}) can be read; first {first}")


def _look_into(root: Path, visited: set[tuple[int, int]]) -> tuple[Path, list[Found]]:
    """The folder that names are relative to, and what was found at ``root``."""
    try:
        status = root.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(root)!r} does not exist{_neighbours(root)}") from None
    except OSError as error:
        raise UserError(f"{str(root)!r} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        return root, _walk(root, visited)
    if _suffix(root.name) == "txt":
        return root.parent, _read_list(root)
    if _suffix(root.name) not in FORMAT_OF_SUFFIX or not stat.S_ISREG(status.st_mode):
        raise UserError(f"{str(root)!r} is no image, folder or .txt list; wanted {WANTED}")
    return root.parent, [(root.name, status.st_size)]


def _walk(root: Path, visited: set[tuple[int, int]]) -> list[Found]:
    images: list[Found] = []
    others: Counter[str] = Counter()
    repeated = False
    pending = [""]
    while pending:
        prefix = pending.pop()
        folder = root / prefix
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                repeated = True
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                # Sorted, because of two links to one folder the first one visited gives the names.
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {str(folder)!r} cannot be read: {error.strerror}") from None
        for entry in ordered:
            size = _judge(entry)
            if size == "folder":
                pending.append(f"{prefix}{entry.name}/")
            elif isinstance(size, int):
                images.append((prefix + entry.name, size))
            else:
                others[size] += 1
    if not images and not repeated:
        seen = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)) or "nothing at all"
        raise UserError(f"no images in {str(root)!r}: found {seen}; wanted {WANTED}")
    return images


def _judge(entry: os.DirEntry[str]) -> int | str:
    """The size of an image, or "folder", or what else it is."""
    if entry.name.startswith("."):
        return "hidden"
    suffix = _suffix(entry.name)
    try:
        if entry.is_dir():
            return "folder"
        if suffix not in FORMAT_OF_SUFFIX:
            return f".{suffix}" if suffix else "without suffix"
        status = entry.stat()
    except OSError:
        return "broken links"
    return status.st_size if stat.S_ISREG(status.st_mode) else "special files"


def _read_list(path: Path) -> list[Found]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    found: list[Found] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = os.fsdecode(line)
        where = f"{str(path)!r}, line {number}: {name!r}"
        if _suffix(name) not in FORMAT_OF_SUFFIX:
            raise UserError(f"{where} is no image; wanted {WANTED}")
        try:
            status = (path.parent / name).stat()
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; lines are paths relative to the list's folder") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where} is not a regular file")
        found.append((name, status.st_size))
    if not found:
        raise UserError(f"no images in {str(path)!r}: the list is empty; wanted one path a line")
    return found


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition(".")
    return suffix.lower() if dot else ""


def _neighbours(path: Path) -> str:
    """An ending for an error line: the names nearest to the first part of ``path`` that is missing."""
    while not path.parent.is_dir():
        path = path.parent
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    return f"; {str(path.parent)!r} holds {', '.join(map(repr, near))}" if near else f"; {str(path.parent)!r} is empty"


def _fingerprint(found: Iterable[Found]) -> str:
    digest = hashlib.sha256()
    for name, size in sorted(found):
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
    return digest.hexdigest()
