# SPDX-License-Identifier: Apache-2.0
"""Which images there are, and where. Only names, kinds and sizes of files are read, and the headers of tar files.

The order depends on names only: that of the given paths, and within each the bytes of the names. The members of a tar
file stay in its order, the rows of a dataset in theirs.
"""

import difflib
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastmim.data.read import BadImage, is_remote
from fastmim.data.sources.archives import add_tars
from fastmim.data.sources.lists import LISTS, read_list
from fastmim.data.sources.rows import (
    COMPRESSED,
    FORMAT_OF_SUFFIX,
    WANTED,
    Rows,
    count_formats,
    is_hidden,
    is_image,
    suffix_of,
)
from fastmim.data.sources.walk import Visited, is_alone_prepared, may_be_prepared, walk
from fastmim.data.table import WHOLE, ImageTable
from fastmim.errors import UserError

__all__ = ["FORMAT_OF_SUFFIX", "WANTED", "first_look", "scan"]

FIRST_LOOK = 32
KINDS = "folder, .txt or .csv list, .tar or .parquet file"


def scan(paths: Sequence[str]) -> ImageTable:
    """All images in ``paths``, each once.

    A path is a folder (any depth), an image file, a list (.txt with one path a line, .csv with a column called path),
    a .tar file, a .parquet file, a folder that ``datasets`` or ``fastmim prepare`` wrote, or a URL of an object store.
    Tar files in a folder count as folders. Its .parquet files count if it holds neither images nor tar files, since
    beside images they hold labels. All splits of a dataset are taken: like the folders train/ and test/, each can be
    given alone.

    Hidden files and folders are left out, links are followed, and every folder is visited once, so that links in a
    circle end.

    Raises:
        UserError: a path is missing, cannot be read, or holds no image; or a prepared set is given with other paths.
    """
    if not paths:
        raise UserError(f"no images given; name an image, {KINDS}, or a URL")
    rows, visited = Rows(), Visited()
    for path in paths:
        place = place_of(path)
        prepared = _look_into_url(place, rows) if is_remote(place) else _look_into(Path(place), rows, visited)
        if prepared is not None:
            if len(paths) > 1:
                raise UserError(f"{place!r} is a prepared set, which cannot be mixed with others; give it alone")
            return prepared
    table = rows.table()
    return _each_once(table) if len(paths) > 1 else table


def place_of(path: str) -> str:
    """The URL, or the absolute path, that a person's word for a place means."""
    return path.rstrip("/") if is_remote(path) else str(Path(path).expanduser().absolute())


def first_look(table: ImageTable, channels: int = 3, raw: bool = False) -> None:
    """Decode evenly spread images until one is good, so that a hopeless folder is known before anything is built.

    Args:
        table: the images.
        channels: that training is to see.
        raw: it is to see stored values, not 8 bits.

    Raises:
        UserError: none of up to 32 images can be read.
    """
    count = min(FIRST_LOOK, len(table))
    first = ""
    for position in range(count):
        index = position * len(table) // count
        try:
            _decode(table, index, channels, raw)
            return
        except BadImage as bad:
            first = first or f"{table.path(index)!r}: {bad.reason}"
    raise UserError(f"none of {count} images that were tried (of {len(table)}) can be read; first {first}")


def _decode(table: ImageTable, index: int, channels: int, raw: bool) -> None:
    content = table.read(index)
    if table.squares is not None:
        from fastmim.data.prepared.shards import decode_square

        decode_square(content, table.squares)
        return
    from fastmim.data.augment import centre_box
    from fastmim.data.decoding.decode import open_image

    image = open_image(content, channels, raw)
    image.crop(centre_box(image.width, image.height), 8)


def _look_into(root: Path, rows: Rows, visited: Visited) -> ImageTable | None:
    """Adds what is at a path; or gives the table of a prepared set."""
    try:
        status = root.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(root)!r} does not exist{_neighbours(root)}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise UserError(f"{str(root)!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    if stat.S_ISDIR(status.st_mode):
        return _look_into_folder(str(root), rows, visited)
    name = os.fsencode(root.name)
    suffix = suffix_of(name)
    if not stat.S_ISREG(status.st_mode) or not _look_into_file(str(root), suffix, rows):
        if suffix not in FORMAT_OF_SUFFIX or not stat.S_ISREG(status.st_mode):
            raise UserError(f"{str(root)!r} is no image, {KINDS}; wanted {WANTED}")
        rows.add(str(root.parent), [name], [status.st_size])
    return None


def _look_into_file(place: str, suffix: str, rows: Rows) -> bool:
    """Adds the images in a file or object that holds or names some; False if it is of no such kind."""
    if suffix in COMPRESSED:
        raise UserError(f"{place!r} is compressed, so that no image in it can be read alone; unpack it")
    if suffix in LISTS:
        read_list(place, rows)
    elif suffix == "tar":
        before, others = len(rows), Counter[str]()
        add_tars([place], rows, others)
        if len(rows) == before:
            raise _nothing(place, others)
    elif suffix == "parquet" and not is_remote(place):
        from fastmim.data.sources.arrow import read_parquet

        read_parquet(place, [place], rows)
    else:
        return False
    return True


def _look_into_folder(root: str, rows: Rows, visited: Visited) -> ImageTable | None:
    files = {name for name in ("dataset_dict.json", "dataset_info.json", "state.json") if (Path(root) / name).is_file()}
    if "dataset_dict.json" in files or len(files) == 2:
        from fastmim.data.sources.arrow import read_saved

        read_saved(root, rows)
        return None
    before = len(rows)
    found = walk(root, rows, visited)
    if found.prepared:
        from fastmim.data.prepared.shards import load_prepared

        return load_prepared(root)
    add_tars(found.tars, rows, found.others)
    if len(rows) == before and found.parquet:
        from fastmim.data.sources.arrow import read_parquet

        read_parquet(root, found.parquet, rows)
    if len(rows) == before and not (found.repeated and before):
        raise _nothing(root, found.others)
    return None


def _look_into_url(url: str, rows: Rows) -> ImageTable | None:
    """Adds what is at a URL; or gives the table of a prepared set."""
    from fastmim.data.sources import remote

    name = os.fsencode(url)
    if _look_into_file(url, suffix_of(name), rows):
        return None
    if is_image(name):
        folder, _, last = url.rpartition("/")
        rows.add(folder, [last.encode()], remote.object_sizes([url]))
        return None
    before = len(rows)
    tars: list[str] = []
    others: Counter[str] = Counter()
    marked = set[str]()
    objects = ((os.fsencode(name), size) for name, size in remote.list_objects(url))
    while batch := list(itertools.islice(objects, 4096)):
        images = [(name, size) for name, size in batch if is_image(name) and not is_hidden(name)]
        rows.add(url, [name for name, _ in images], [size for _, size in images])
        for name, _ in batch:
            if is_hidden(name):
                others["hidden"] += 1
            elif suffix_of(name) == "tar":
                tars.append(f"{url}/{os.fsdecode(name)}")
            elif not is_image(name):
                others[f".{suffix_of(name)}"] += 1
                folder, _, last = f"{url}/{os.fsdecode(name)}".rpartition("/")
                if may_be_prepared(os.fsencode(last)):
                    marked.add(folder)
    if any(is_alone_prepared(url, folder) for folder in sorted(marked)):
        from fastmim.data.prepared.shards import load_prepared

        return load_prepared(url)
    add_tars(tars, rows, others)
    if len(rows) == before:
        raise _nothing(url, others)
    return None


def _nothing(place: str, others: Counter[str]) -> UserError:
    seen = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)) or "nothing at all"
    hint = "; of .arrow files, give the folder that save_to_disk wrote" if others[".arrow"] else ""
    return UserError(f"no images in {place!r}: found {seen}; wanted {WANTED}{hint}")


def _each_once(table: ImageTable) -> ImageTable:
    """Without the rows whose bytes an earlier row has: paths may overlap, also through links to folders."""
    real = lru_cache(maxsize=1 << 14)(os.path.realpath)
    hashes = np.fromiter((hash(_place(table, row, real)) for row in range(len(table))), np.int64, len(table))
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    seen: set[tuple[str, int]] = set()
    dropped = set[int]()
    for row in sorted({*order[same].tolist(), *order[same + 1].tolist()}):  # equal hashes are looked at again
        place = _place(table, row, real)
        if place in seen:
            dropped.add(row)
        seen.add(place)
    if not dropped:
        return table
    kept = table.take(np.delete(np.arange(len(table)), sorted(dropped)))
    names = (os.fsencode(kept.name(row)) for row in range(len(kept)))
    return replace(kept, formats=count_formats(names))


def _place(table: ImageTable, row: int, real: Callable[[str], str]) -> tuple[str, int]:
    """The file (its folder without links) and the offset."""
    offset = int(table.offset[row])
    file = table.path(row) if offset == WHOLE else table.containers[table.container[row]]
    folder, _, name = file.rpartition("/")
    return (file if is_remote(file) else f"{real(folder)}/{name}"), offset


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
