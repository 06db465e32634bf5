# SPDX-License-Identifier: Apache-2.0
"""JPEG at the size that the crop needs. Most images are JPEGs, and most of the loading is spent here.

libjpeg can leave out the high frequencies while it decodes, so that a large photograph comes out at a half, a quarter
or an eighth of its size in a fraction of the time (only these: other fractions are slower than the full size). Its
fast transform and fast upsampling of colours are not used: they gain 3 % each, and the first costs ten times the error
of all else here. What lies below the crop is not decoded at all: the height in a copy of the header is made smaller.
"""

from dataclasses import dataclass
from typing import NamedTuple

import simplejpeg
import torch
from jaxtyping import UInt8
from torch import Tensor

from fastmim.data.decoding.pillow import PillowPicture
from fastmim.data.decoding.resize import EXTRA, Region, resize_crop
from fastmim.data.decoding.stored import (
    MAX_PIXELS,
    REDUCED_MARGIN,
    Pixels,
    Stored,
    check_channels,
    check_size,
    to_channels,
)
from fastmim.data.decoding.tiff import exif_orientation
from fastmim.data.read import BadImage

MAGIC = b"\xff\xd8"
CHANNELS = {"Gray": 1, "YCbCr": 3, "RGB": 3}
BASELINE = {0xC0, 0xC1}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
END_OF_IMAGE = b"\xff\xd9"
BLOCK = 16
START_OF_SCAN = 0xDA
APP1 = 0xE1
MAX_SEGMENTS = 512
# A progressive file may go over all pixels as often as it likes, with a few bytes each time. Encoders do so some ten
# times.
MAX_SCANS = 500
MAX_SCANNED = 20 * MAX_PIXELS


class Segments(NamedTuple):
    """What stands before the pixels."""

    orientation: int
    """By EXIF, 1 to 8."""
    progressive: bool
    """Whether it is progressive, or might be."""
    height_at: int | None
    """Where the height stands, if fewer rows can be decoded."""


class Header(NamedTuple):
    """What is known before decoding; the size is as stored."""

    width: int
    height: int
    colours: int
    """Channels that are stored: 1 or 3."""
    segments: Segments


@dataclass(frozen=True)
class JpegPicture:
    """A JPEG of grey or colour."""

    content: bytes
    header: Header
    channels: int
    """Channels that are wanted: 1 or 3."""
    raw: bool

    @property
    def width(self) -> int:
        """As stored."""
        return self.header.width

    @property
    def height(self) -> int:
        """As stored."""
        return self.header.height

    @property
    def orientation(self) -> int:
        """By EXIF, 1 to 8."""
        return self.header.segments.orientation

    def crop(self, box: Region, size: int) -> Pixels:
        """The part inside ``box``, decoded at 1/1, 1/2, 1/4 or 1/8 and resized."""
        left, top, right, bottom = box
        side = min(right - left, bottom - top)
        shrink = next((s for s in (8, 4, 2) if side >= REDUCED_MARGIN * size * s), 1)
        # Of what is reduced, some rows below the box may be used too; and colours of low resolution reach over a block.
        beyond = EXTRA * (bottom - top) / size if shrink > 1 else 0
        pixels = self._decode(shrink, int(bottom + beyond) + BLOCK * shrink)
        if pixels is None:
            return self._by_pillow().crop(box, size)
        return self._finish(resize_crop(pixels, (left / shrink, top / shrink, right / shrink, bottom / shrink), size))

    def whole(self) -> Pixels:
        """All pixels."""
        pixels = self._decode(1, self.height)
        return self._by_pillow().whole() if pixels is None else self._finish(pixels)

    def _decode(self, shrink: int, rows: int) -> UInt8[Tensor, "C H W"] | None:
        """At least the upper ``rows`` at 1 / ``shrink`` of their size, a part of a pixel counting as one.

        None if anything is odd: of cut files, and of many that are usable.
        """
        content, rows, strict = self._upper(rows)
        height, width = -(-rows // shrink), -(-self.width // shrink)
        # Grey is resized as one channel and repeated afterwards.
        colourspace = "GRAY" if min(self.header.colours, self.channels) == 1 else "RGB"
        try:
            pixels = simplejpeg.decode_jpeg(content, colourspace, min_height=height, min_width=width, strict=strict)
        except ValueError:
            return None
        if pixels.shape[:2] != (height, width):
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _upper(self, rows: int) -> tuple[bytes, int, bool]:
        """The file with a smaller height, that height, and whether the decoder shall be strict.

        It cannot be, because it complains of the rows that are left over; so the file must not be cut, as its end
        shows. Other damage that libjpeg can go on with is let pass, as Pillow does too.
        """
        at = self.header.segments.height_at
        rows = -(-rows // BLOCK) * BLOCK
        if at is None or rows + 2 * BLOCK > self.height or not self.content.endswith(END_OF_IMAGE):
            return self.content, self.height, True
        return b"".join((self.content[:at], rows.to_bytes(2, "big"), self.content[at + 2 :])), rows, False

    def _finish(self, stored: UInt8[Tensor, "stored H W"]) -> Pixels:
        pixels = to_channels(stored, False, self.channels)
        return pixels.to(torch.float32) if self.raw else pixels

    def _by_pillow(self) -> PillowPicture:
        return PillowPicture.open(self.content, self.channels, self.raw)


def open_jpeg(content: bytes, channels: int, raw: bool) -> Stored:
    """A picture whose pixels are not decoded yet; by Pillow if it is not of grey or colour, or has an odd header.

    Raises:
        BadImage: too many pixels, or whatever Pillow says of an odd one.
    """
    header = read_header(content)
    if header is None:
        return PillowPicture.open(content, channels, raw)
    check_channels(header.colours, False, channels)
    return JpegPicture(content, header, channels, raw)


def read_header(content: bytes) -> Header | None:
    """The header; None for what Pillow should look at.

    Raises:
        BadImage: too many pixels or scans.
    """
    segments = _segments(content)
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        height, width, colourspace = 1, 1, ""
    check_size(width, height)
    if segments.progressive:
        scans = content.count(b"\xff\xda")
        if scans > MAX_SCANS or scans * width * height > MAX_SCANNED:
            raise BadImage("too many scans")
    return Header(width, height, CHANNELS[colourspace], segments) if colourspace in CHANNELS else None


def _segments(content: bytes) -> Segments:
    orientation, at, height_at = 1, 2, None
    for _ in range(MAX_SEGMENTS):
        if at + 9 > len(content) or content[at] != 0xFF:
            break
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in PROGRESSIVE:
            return Segments(orientation, True, None)
        if marker in BASELINE:
            height_at = at + 5
        if marker == START_OF_SCAN:
            return Segments(orientation, False, height_at)
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == APP1 and content[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(content[at + 10 : end])
        at = end
    return Segments(orientation, True, None)
