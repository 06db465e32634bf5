# SPDX-License-Identifier: Apache-2.0
"""Where the members of a tar file lie. Only headers are read; nothing is ever extracted.

Python's own ``tarfile`` is not used: it takes three times as long, keeps an object for each member, and a made-up
size can send it in circles (CVE-2025-8194). Understood are the formats v7, ustar, GNU and pax.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastmim.data.read import is_remote
from fastmim.data.sources.rows import Rows, is_hidden, is_image, suffix_of
from fastmim.errors import UserError

BLOCK = 512
MAX_NAME_BYTES = 2**20
# A request for a header of a tar in an object store brings this much along: the next header may be in it.
REMOTE_BLOCK = 2**16
AT_ONCE = 16
"""Tar files in an object store that are looked into at the same time: each header is a request of its own."""

Member = tuple[bytes, int, int]
"""Name (any bytes; it is only a name, never a path), offset of the data, and its number of bytes."""
Read = Callable[[int, int], bytes]
"""(offset, size) -> the bytes, fewer only where the file ends."""

_REGULAR = {b"0", b"\0", b"7"}
_NO_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}
_MAGIC_OF_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4", b"7z\xbc\xaf", b"Rar!")


def add_tars(places: Sequence[str], rows: Rows, others: Counter[str]) -> None:
    """Adds the images in tar files, each one's in its own order, and counts what else is in them.

    Links, devices, folders and sparse files are left out, and what is hidden.

    Args:
        places: paths or URLs.
        rows: where to add the images.
        others: number of other members by suffix; grows.

    Raises:
        UserError: a tar file is damaged, cut short or compressed, or cannot be read.
    """
    if not places or not is_remote(places[0]):
        for place in places:
            for members in _batches(tar_members(place)):
                _add(place, members, rows, others)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for place, every in zip(places, pool.map(lambda place: list(tar_members(place)), places), strict=True):
            _add(place, every, rows, others)


def _batches(members: Iterator[Member]) -> Iterator[list[Member]]:
    while batch := list(itertools.islice(members, 4096)):
        yield batch


def _add(place: str, members: Sequence[Member], rows: Rows, others: Counter[str]) -> None:
    images: list[Member] = []
    for member in members:
        name = member[0].removeprefix(b"./")
        if is_hidden(name):
            others["hidden"] += 1
        elif is_image(name):
            images.append((name, *member[1:]))
        else:
            others[f".{suffix_of(name)}"] += 1
    rows.add(place, [name for name, _, _ in images], [size for *_, size in images], [at for _, at, _ in images])


def tar_members(place: str) -> Iterator[Member]:
    """The regular files in a tar file, in its order. ``place`` is a path or a URL.

    Raises:
        UserError: it is damaged, cut short or compressed, or cannot be read.
    """
    if is_remote(place):
        from fastmim.data.sources.remote import open_object

        with open_object(place, REMOTE_BLOCK) as remote:
            yield from _members(_read_by_seeking(remote), remote.seek(0, os.SEEK_END), place)
        return
    try:
        with open(place, "rb", buffering=0) as file:  # noqa: PTH123 - any bytes may be a name
            number = file.fileno()
            size = os.fstat(number).st_size
            yield from _members(lambda offset, count: os.pread(number, count, offset), size, place)
    except OSError as error:
        raise UserError(f"{place!r} cannot be read: {error.strerror}") from None


def _read_by_seeking(file: Any) -> Read:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return bytes(file.read(size))

    return read


def _members(read: Read, size: int, place: str) -> Iterator[Member]:
    try:
        if read(0, 8).startswith(_MAGIC_OF_COMPRESSED):
            raise UserError(f"{place!r} is compressed, so that no image in it can be read alone; unpack it")
        yield from _walk(read, size)
    except ValueError as error:
        raise UserError(f"{place!r} is a damaged tar file: {error}; copy or make it again") from None


def _walk(read: Read, size: int) -> Iterator[Member]:
    """Raises ``ValueError`` where the file is damaged."""
    if size == 0:
        raise ValueError("it is empty")
    position = 0
    long_name, extended = b"", dict[bytes, bytes]()
    while position < size:
        header = _exactly(read, position, BLOCK)
        if not any(header):
            return
        _check(header, position)
        kind = header[156:157]
        length = int(extended.get(b"size", b"")) if b"size" in extended else _number(header[124:136], position)
        data = position + BLOCK
        if kind == b"S":
            data = _after_sparse_map(read, header, data)
        if length < 0 or (kind not in _NO_DATA and data + length > size):
            raise ValueError(f"it ends inside of what begins at byte {position}")
        position = data if kind in _NO_DATA else data + -(-length // BLOCK) * BLOCK
        if kind in b"LKxXg":
            content = _text(read, data, length)
            if kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif kind in b"xX":
                extended = _parse_extended(content)
            continue
        name = extended.get(b"path") or long_name or _short_name(header)
        sparse = any(key.startswith(b"GNU.sparse") for key in extended)
        if kind in _REGULAR and not sparse:
            if kind == b"\0" and name.endswith(b"/"):
                position = data  # a folder, as v7 wrote them
            else:
                yield name, data, length
        long_name, extended = b"", {}


def _exactly(read: Read, offset: int, size: int) -> bytes:
    content = read(offset, size)
    if len(content) < size:
        raise ValueError(f"it ends inside of a header at byte {offset}")
    return content


def _check(header: bytes, position: int) -> None:
    """The sum of all bytes of a header stands in it; old programs took bytes for signed numbers."""
    stored = _number(header[148:156], position)
    rest = header[:148] + b" " * 8 + header[156:]
    if stored != sum(rest) and stored != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        raise ValueError(f"no header at byte {position}")


def _number(field: bytes, position: int) -> int:
    """Octal digits; or, behind a first byte of 0x80, a binary number (0xff marks a negative one)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError(f"no header at byte {position}")
    return int(digits or b"0", 8)


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU's magic has a space there, and keeps times where POSIX has the first part of a long name.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(read: Read, offset: int, length: int) -> bytes:
    if length > MAX_NAME_BYTES:
        raise ValueError(f"a name of {length} bytes at byte {offset}")
    return _exactly(read, offset, length)


def _parse_extended(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: each is its own length, a space, key=value, and the end of a line."""
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 8 or not len(digits) < int(digits) <= len(content):
            raise ValueError("an extended header makes no sense")
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        records[key] = value
    size = records.get(b"size")
    if size is not None and not (size.isdigit() and len(size) < 20):
        raise ValueError("an extended header makes no sense")
    return records


def _after_sparse_map(read: Read, header: bytes, data: int) -> int:
    """Where the data of an old GNU sparse file begin: behind blocks that go on with the map of its holes."""
    more = header[482]
    while more:
        more = _exactly(read, data, BLOCK)[504]
        data += BLOCK
    return data
