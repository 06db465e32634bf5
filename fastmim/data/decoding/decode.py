# SPDX-License-Identifier: Apache-2.0
"""The bytes of one image -> upright pixels, or ``BadImage`` with the reason. Nothing else can come of any bytes.

A file of a large folder may be damaged, huge, or made to do harm. So: only a few formats are tried, the size is judged
from the header before any pixel is decoded, and whatever a decoder raises becomes ``BadImage``.
"""

import re
from dataclasses import dataclass

from jaxtyping import Float32, UInt8
from torch import Tensor

from fastmim.data.augment import Box
from fastmim.data.decoding import tiff
from fastmim.data.decoding.bands import open_bands
from fastmim.data.decoding.dicom import colours_of, is_dicom, open_dicom, read_dataset
from fastmim.data.decoding.jpeg import MAGIC as JPEG
from fastmim.data.decoding.jpeg import open_jpeg, read_header
from fastmim.data.decoding.pillow import PillowPicture, bands_of
from fastmim.data.decoding.resize import Region
from fastmim.data.decoding.stored import MAX_PIXELS, MAX_SIDE, Pixels, Stored, only_bad_images
from fastmim.data.read import BadImage

AXES_SWAPPED, X_MIRRORED, Y_MIRRORED = {5, 6, 7, 8}, {2, 3, 7, 8}, {3, 4, 6, 7}
GIF_FRAME = re.compile(rb"!\xf9\x04.{4}\x00", re.DOTALL)
LONG_GIF = 2**22
MAX_TILE = 2**24


@dataclass(frozen=True)
class UprightImage:
    """An image whose size is known and whose pixels are not decoded yet."""

    width: int
    """Pixels of the upright picture."""
    height: int
    """Pixels of the upright picture."""
    _stored: Stored

    def crop(self, box: Box, size: int) -> UInt8[Tensor, "C {size} {size}"] | Float32[Tensor, "C {size} {size}"]:
        """The part inside ``box`` (upright pixels), resized with antialiasing to a square of ``size`` pixels.

        Its memory may be laid out in any way.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        stored = self._stored
        # Turning comes last, because the result is small and the source may be large.
        return _turn(stored.crop(_stored_box(box, stored), size), stored.orientation)

    def whole(self) -> Pixels:
        """All pixels at full size.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        return _turn(self._stored.whole(), self._stored.orientation)


@dataclass(frozen=True)
class Facts:
    """What the header of an image says."""

    format: str
    """jpeg, png, webp, bmp, tiff, gif, avif or dicom."""
    width: int
    """Pixels of the upright picture."""
    height: int
    """Pixels of the upright picture."""
    channels: int
    """As stored, with transparency; a palette counts as the colours that it stands for."""
    dtype: str
    """Of the stored values: uint8, uint16, float32 ..."""
    frames: int
    """Pages or pictures of an animation; only the first is used."""


def open_image(content: bytes, channels: int = 3, raw: bool = False) -> UprightImage:
    """Read the header of an encoded image, and judge it.

    Args:
        content: the bytes of a file.
        channels: 3 for colour (grey is repeated), 1 for grey (the luma of colour), both without transparency; any
            other number must be the file's own, transparency included.
        raw: give the stored values as float32, those of a DICOM in the modality's units. Otherwise bytes: 16 bits are
            scaled by 1 / 257, one channel of floats or wider integers by its own smallest and largest value, and
            DICOM as a viewer would show it.

    Raises:
        BadImage: no image of a known format, too large, or without such channels.
        UserError: an extra that such files need is not installed.
    """
    stored = _open(content, channels, raw)
    width, height = stored.width, stored.height
    if stored.orientation in AXES_SWAPPED:
        width, height = height, width
    return UprightImage(width, height, stored)


def facts(content: bytes) -> Facts:
    """What the header says; no pixel is decoded, but those of a PNG that names an orientation.

    Raises:
        BadImage: no image of a known format, or too large (TIFF and DICOM may be of any size here).
        UserError: pydicom is needed and not installed.
    """
    if is_dicom(content):
        return _dicom_facts(content)
    if tiff.is_tiff(content):
        head = tiff.read_header(content)
        size = (head.height, head.width) if head.orientation in AXES_SWAPPED else (head.width, head.height)
        return Facts(
            "tiff",
            *size,
            3 if head.photometric == tiff.PALETTE else head.samples,
            head.dtype,
            tiff.count_pages(content),
        )
    header = read_header(content) if content.startswith(JPEG) else None
    if header is not None:
        swapped = header.segments.orientation in AXES_SWAPPED
        size = (header.height, header.width) if swapped else (header.width, header.height)
        return Facts("jpeg", *size, header.colours, "uint8", 1)
    return _pillow_facts(content)


def _open(content: bytes, channels: int, raw: bool) -> Stored:
    if content.startswith(JPEG):
        return open_jpeg(content, channels, raw)
    if is_dicom(content):  # before TIFF: some have the header of one in front, for readers of either kind
        return open_dicom(content, channels, raw)
    if tiff.is_tiff(content):
        return _open_tiff(content, channels, raw)
    return PillowPicture.open(content, channels, raw)


def _open_tiff(content: bytes, channels: int, raw: bool) -> Stored:
    """By Pillow if it shows what is asked for, as it is; else by rasterio."""
    header = tiff.read_header(content)
    width, height = header.width, header.height
    small = width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE
    tile_width, tile_height = header.tile or (1, 1)
    if tile_width * tile_height > max(MAX_TILE, 4 * width * height):
        raise BadImage("too many pixels")  # of which nearly all are outside of the picture
    deep_colour = header.samples > 1 and header.bits > 8 and (raw or channels not in (1, 3))
    signed_bytes = header.dtype == "int8"  # which Pillow takes for unsigned ones
    if small and header.samples <= 4 and not deep_colour and not signed_bytes:
        try:
            picture = PillowPicture.open(content, channels, raw, header)
        except BadImage as bad:
            if bad.reason == "not an image" or channels not in (1, 3):  # for Pillow
                return open_bands(content, header, channels, raw)
            raise
        if header.samples in (1, bands_of(picture.image)[0]) or channels in (1, 3):
            return picture
    return open_bands(content, header, channels, raw)


def _dicom_facts(content: bytes) -> Facts:
    dataset = read_dataset(content)
    with only_bad_images():
        sign = "int" if int(dataset.get("PixelRepresentation", 0)) else "uint"
        return Facts(
            "dicom",
            int(dataset.Columns),
            int(dataset.Rows),
            colours_of(dataset),
            f"{sign}{max(8, int(dataset.BitsAllocated))}",
            int(dataset.get("NumberOfFrames") or 1),
        )


def _pillow_facts(content: bytes) -> Facts:
    with only_bad_images():
        picture = PillowPicture.open(content, 3, False)
        image = picture.image
        channels = bands_of(image)[0]
        swapped = picture.orientation in AXES_SWAPPED
        name = "jpeg" if image.format == "MPO" else str(image.format).lower()
        # Pillow counts the frames of a GIF by going through all of them, which may be millions.
        many = name == "gif" and len(content) > LONG_GIF
        frames = len(GIF_FRAME.findall(content)) if many else int(getattr(image, "n_frames", 1))
        deep = picture.deep or image.mode.startswith("I")
        size = (picture.height, picture.width) if swapped else (picture.width, picture.height)
        return Facts(name, *size, channels, "uint16" if deep else "uint8", max(frames, 1))


def _stored_box(box: Region, stored: Stored) -> Region:
    """``box`` of the upright picture, as a box of the stored one."""
    left, top, right, bottom = box
    if stored.orientation in AXES_SWAPPED:
        left, top, right, bottom = top, left, bottom, right
    if stored.orientation in X_MIRRORED:
        left, right = stored.width - right, stored.width - left
    if stored.orientation in Y_MIRRORED:
        top, bottom = stored.height - bottom, stored.height - top
    return left, top, right, bottom


def _turn(
    stored: UInt8[Tensor, "C H W"] | Float32[Tensor, "C H W"], orientation: int
) -> UInt8[Tensor, "C _ _"] | Float32[Tensor, "C _ _"]:
    """The stored picture made upright: the way back of ``_stored_box``."""
    flipped = [axis for axis, mirrored in ((2, X_MIRRORED), (1, Y_MIRRORED)) if orientation in mirrored]
    pixels = stored.flip(flipped) if flipped else stored
    return pixels.transpose(1, 2) if orientation in AXES_SWAPPED else pixels
