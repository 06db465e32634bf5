# SPDX-License-Identifier: Apache-2.0
"""The header of a TIFF: enough to judge its size and to choose its decoder before any of them sees it.

EXIF is a small TIFF too, so the orientation of a JPEG is read here as well.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fastmim.data.read import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE, ORIENTATION = 254, 274
WANTED = {SUBFILE, 256, 257, 258, 262, ORIENTATION, 277, 284, 322, 323, 338, 339}
PALETTE = 3
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
ALPHA = {1, 2}
MAX_SAMPLES = 4096
MAX_PAGES = 65536
REDUCED_OR_MASK = 0b101
# Of a value's type: its letter for struct, for the types that the tags below may have.
LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
NAMES = {UNSIGNED: "uint", SIGNED: "int", FLOAT: "float"}


@dataclass(frozen=True)
class TiffHeader:
    """What the first page of a TIFF says of itself; ``width`` and ``height`` are as stored."""

    width: int
    height: int
    orientation: int
    samples: int
    bits: int
    """Of the widest sample."""
    kind: int
    """UNSIGNED, SIGNED or FLOAT; anything else cannot be shown (complex numbers, unknown)."""
    photometric: int
    alpha: bool
    """Whether the last sample is transparency."""
    planar: bool
    tile: tuple[int, int] | None
    """Width and height of a tile; None if it has strips."""

    @property
    def dtype(self) -> str:
        """As numpy calls it, for the smallest type that holds the values."""
        width = max(8, 1 << (self.bits - 1).bit_length())
        return f"{NAMES.get(self.kind, 'complex')}{width}"


class _Layout(NamedTuple):
    order: str
    big: bool

    def number(self, content: bytes, at: int) -> int:
        """A place in the file; raises ``struct.error`` if it lies beyond."""
        place = int(struct.unpack_from(self.order + ("Q" if self.big else "I"), content, at)[0])
        if place > len(content):
            raise struct.error
        return place


def is_tiff(content: bytes) -> bool:
    """By its first four bytes."""
    return content[:4] in MAGIC


def read_header(content: bytes) -> TiffHeader:
    """The first page's header.

    Raises:
        BadImage: not an image (the header cannot be read, or says nothing of a picture).
    """
    try:
        layout, first = _start(content)
        tags = dict(_entries(content, layout, first))
        samples = tags.get(277, (1,))[0]
        bits = max(tags.get(258, (1,)))
        if not (0 < samples <= MAX_SAMPLES and 0 < bits <= 128):
            raise BadImage("not an image")
        extra = tags.get(338, ())
        return TiffHeader(
            width=tags[256][0],
            height=tags[257][0],
            orientation=orientation_of(tags),
            samples=samples,
            bits=bits,
            kind=tags.get(339, (UNSIGNED,))[0],
            photometric=tags.get(262, (1,))[0],
            # Four samples of colour without a word on the fourth: nearly always transparency.
            alpha=bool(extra and extra[-1] in ALPHA) or (tags.get(262) == (2,) and samples == 4 and not extra),
            planar=tags.get(284, (1,))[0] == 2,
            tile=(tags[322][0], tags[323][0]) if 322 in tags and 323 in tags else None,
        )
    except (struct.error, KeyError):
        raise BadImage("not an image") from None


def count_pages(content: bytes) -> int:
    """Number of pages; reduced copies of a page and masks are none."""
    pages = 0
    seen: set[int] = set()
    try:
        layout, at = _start(content)
        while at and at not in seen and len(seen) < MAX_PAGES:
            seen.add(at)
            # What kind of page it is, is its first entry, if it is there: entries are sorted.
            tag, values = next(_entries(content, layout, at, most=1), (0, (0,)))
            pages += not (tag == SUBFILE and values[0] & REDUCED_OR_MASK)
            at = layout.number(content, _after(content, layout, at))
    except struct.error:
        pass
    return max(pages, 1)


def exif_orientation(exif: bytes) -> int:
    """The orientation that EXIF (from its byte order on) tells, 1 to 8; 1 if it cannot be read."""
    try:
        layout, first = _start(exif)
        return orientation_of(dict(_entries(exif, layout, first)))
    except struct.error:
        return 1


def orientation_of(tags: dict[int, tuple[int, ...]]) -> int:
    """The orientation among ``tags``, 1 to 8; 1 where it makes no sense."""
    value = tags.get(ORIENTATION, (1,))[0]
    return value if 1 <= value <= 8 else 1


def _start(content: bytes) -> tuple[_Layout, int]:
    """The byte order, and where the first page's entries begin."""
    if content[:2] not in (b"II", b"MM"):
        raise struct.error
    order = "<" if content[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", content, 2)[0] == 43
    layout = _Layout(order, big)
    return layout, layout.number(content, 8 if big else 4)


def _count(content: bytes, layout: _Layout, at: int) -> tuple[int, int]:
    """Number of a page's entries, and where the first of them is."""
    letter, size = ("Q", 8) if layout.big else ("H", 2)
    return min(int(struct.unpack_from(layout.order + letter, content, at)[0]), 65535), at + size


def _after(content: bytes, layout: _Layout, at: int) -> int:
    count, first = _count(content, layout, at)
    return first + count * (20 if layout.big else 12)


def _entries(content: bytes, layout: _Layout, at: int, most: int = 65535) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The wanted tags among the first entries of the page at ``at``, each once, with at least one value."""
    count, first = _count(content, layout, at)
    step, room = (20, 8) if layout.big else (12, 4)
    wanted = set(WANTED)
    head = layout.order + ("HHQ" if layout.big else "HHI")
    for place in range(first, first + min(count, most) * step, step):
        if place + step > len(content):
            return
        tag, kind, number = struct.unpack_from(head, content, place)
        if tag not in wanted or kind not in LETTERS or not 0 < number <= MAX_SAMPLES:
            continue
        wanted.remove(tag)
        form = f"{layout.order}{number}{LETTERS[kind]}"
        values = place + step - room
        if struct.calcsize(form) > room:
            values = layout.number(content, values)
        if values + struct.calcsize(form) <= len(content):
            yield tag, struct.unpack_from(form, content, values)
