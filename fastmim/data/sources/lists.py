# SPDX-License-Identifier: Apache-2.0
"""Lists of images: .txt with a path in each line, .csv with a column of paths. URLs may stand in them too."""

import csv
import io
import itertools
import os
import stat
from collections.abc import Iterator

from fastmim.data.read import BadImage, is_remote, read_file
from fastmim.data.sources.rows import WANTED, Rows, is_image, suffix_of
from fastmim.errors import UserError

LISTS = ("txt", "csv")
COLUMNS = ("path", "file", "filename", "image")
"""Names of the column of paths in a .csv file; the first that is there is taken."""

MARK = b"\xef\xbb\xbf"
"""What Windows writes in front of a text."""
Line = tuple[int, bytes]
"""Number of a line, and the path or URL that stands there."""


def read_list(place: str, rows: Rows) -> None:
    """Adds the images of a list, sorted by what stands in it, each once.

    Args:
        place: absolute path or URL of the list. Paths in it are relative to its folder.
        rows: where to add them.

    Raises:
        UserError: the list, or a file that it names, is missing, cannot be read, or is no image.
    """
    try:
        content = read_file(place).removeprefix(MARK)
    except BadImage as bad:
        if bad.reason != "empty":
            raise UserError(f"{place!r} cannot be read: {bad.reason}") from None
        content = b""
    lines = list(_csv_lines(place, content) if suffix_of(os.fsencode(place)) == "csv" else _text_lines(content))
    for number, name in lines:
        if not is_image(name):
            raise UserError(f"{_where(place, number, name)} is no image; wanted {WANTED}")
    if not lines:
        raise UserError(f"no images in {place!r}: the list is empty; wanted one path a line")
    base = place.rpartition("/")[0]
    found = {name: number for number, name in reversed(lines)}
    remote = [name for name in found if is_remote(_resolve(base, name))]
    sizes = _remote_sizes(base, remote)
    for name, number in found.items():
        if name not in sizes:
            sizes[name] = _local_size(base, name, _where(place, number, name))
    for whole, group in itertools.groupby(sorted(found), _is_whole):
        names = list(group)
        rows.add("" if whole else base, names, [sizes[name] for name in names])


def _is_whole(name: bytes) -> bool:
    """Whether a path or URL needs no folder before it."""
    return name.startswith(b"/") or b"://" in name


def _resolve(base: str, name: bytes) -> str:
    return os.fsdecode(name) if _is_whole(name) else f"{base}/{os.fsdecode(name)}"


def _where(place: str, number: int, name: bytes) -> str:
    return f"{place!r}, line {number}: {os.fsdecode(name)!r}"


def _text_lines(content: bytes) -> Iterator[Line]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield number, line


def read_csv(place: str, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells) of each row of a table that is not empty; the first names the columns.

    Raises:
        UserError: it is no table.
    """
    text = content.removeprefix(MARK).decode("utf-8", "surrogateescape")
    # Spreadsheets write semicolons where a comma stands in numbers.
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        yield 1, [cell.strip() for cell in next(table, [])]
        yield from ((table.line_num, cells) for cells in table if any(cells))
    except csv.Error as error:
        raise UserError(f"{place!r}, line {table.line_num}: {error}; wanted comma-separated values") from None


def _csv_lines(place: str, content: bytes) -> Iterator[Line]:
    rows = read_csv(place, content)
    _, header = next(rows)
    column = _column(place, header)
    for number, cells in rows:
        if len(cells) <= column or not cells[column]:
            raise UserError(f"{place!r}, line {number}: nothing in column {header[column]!r}")
        yield number, cells[column].encode("utf-8", "surrogateescape")


def _column(place: str, header: list[str]) -> int:
    if any(is_image(os.fsencode(cell)) for cell in header):
        raise UserError(f"{place!r}: the first row must name the columns, such as path, but holds an image")
    lower = [cell.lower() for cell in header]
    for name in COLUMNS:
        if name in lower:
            return lower.index(name)
    if len(header) == 1:
        return 0
    found = ", ".join(map(repr, header)) or "nothing at all"
    raise UserError(f"{place!r} has no column of paths: found {found}; wanted one called {', '.join(COLUMNS)}")


def _local_size(base: str, name: bytes, where: str) -> int:
    try:
        status = os.stat(_resolve(base, name))  # noqa: PTH116 - a Path costs as much again
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {reason}; lines are paths relative to the list's folder") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where} is not a regular file")
    return status.st_size


def _remote_sizes(base: str, names: list[bytes]) -> dict[bytes, int]:
    sizes: dict[bytes, int] = {}
    if names:
        from fastmim.data.sources.remote import object_sizes

        # The bucket decides which store answers.
        stores: dict[str, list[bytes]] = {}
        for name in names:
            stores.setdefault("/".join(_resolve(base, name).split("/")[:3]), []).append(name)
        for group in stores.values():
            sizes.update(zip(group, object_sizes([_resolve(base, name) for name in group]), strict=True))
    return sizes
