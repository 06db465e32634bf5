# SPDX-License-Identifier: Apache-2.0
"""What Pillow decodes: all common formats, and those JPEGs that are out of the ordinary.

Only seven formats are tried: Pillow knows many more, one of which starts a program.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from fastmim.data.decoding import tiff
from fastmim.data.decoding.resize import Region, resize_crop
from fastmim.data.decoding.stored import (
    Pixels,
    check_channels,
    check_size,
    fill_holes,
    only_bad_images,
    sixteen_to_eight,
    stretch,
    to_channels,
    too_deep,
)
from fastmim.data.read import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# In PNG the EXIF may stand behind the pixels, so that asking for it decodes them.
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# Modes whose bands are the picture's own; all others are brought to RGB.
PLAIN = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
TWELVE_BITS = 12


@dataclass(frozen=True)
class PillowPicture:
    """A picture that Pillow has opened and not decoded yet."""

    width: int
    height: int
    orientation: int
    image: Image.Image
    channels: int
    raw: bool
    deep: bool
    """Whether it has several channels of 16 bits, of which Pillow gives the upper 8."""
    content: bytes
    header: tiff.TiffHeader | None

    @classmethod
    def open(cls, content: bytes, channels: int, raw: bool, header: tiff.TiffHeader | None = None) -> "PillowPicture":
        """Read the header and judge it; ``header`` is what is known of a TIFF.

        Raises:
            BadImage: no image of a known format, too large, or without the wanted channels.
        """
        with _pillow():
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            check_size(width, height)
            if channels not in (1, 3):  # which Pillow makes of anything
                check_channels(*bands_of(image), channels)
            deep = is_deep_colour(image)  # before the orientation, which may decode
            if deep and channels not in (1, 3) and not raw:
                raise too_deep("uint16")
            return cls(width, height, orientation_of(image, content), image, channels, raw, deep, content, header)

    def crop(self, box: Region, size: int) -> Pixels:
        """The part inside ``box``, resized after decoding all of it."""
        return resize_crop(self.whole(), box, size)

    def whole(self) -> Pixels:
        """All pixels."""
        with _pillow():
            self.image.load()
            if self.image.mode.startswith(("I", "F")):
                return self._of_numbers()
            values = _pixels(self.image, self.channels)
            if not self.raw:
                return values
            values = values.to(torch.float32)
            return values * 256 + self._low_bytes(values) if self.deep else values

    def _of_numbers(self) -> Pixels:
        """One channel of more than 8 bits. Scaled here: Pillow's conversion cuts at 255, all white or all black."""
        values = np.array(self.image)
        bits = self.header.bits if self.header else 16
        if self.header and self.header.dtype == "uint32" and values.dtype == np.int32:
            values = values.view(np.uint32)  # Pillow has signed numbers only
        if self.raw:
            values = fill_holes(values.astype(np.float32))
        elif values.dtype.kind != "f" and values.min() >= 0 and values.max() <= 65535:
            values = sixteen_to_eight(values, 2**TWELVE_BITS - 1 if bits == TWELVE_BITS else 65535)
        else:
            values = stretch(values)
        return to_channels(torch.from_numpy(values)[None], False, self.channels)

    def _low_bytes(self, high: Float32[Tensor, "C H W"]) -> Float32[Tensor, "C H W"]:
        """The lower halves of 16-bit colour, of which Pillow keeps the upper ones.

        A PNG of colour is read a second time in the other byte order. Of grey with transparency, which Pillow cannot
        read so, the upper halves stand in for the lower ones: full white stays full white.
        """
        if self.image.format != "PNG" or not self.image.mode.startswith("RGB"):
            return high
        with Image.open(io.BytesIO(self.content), formats=("PNG",)) as other:
            other.tile = [part._replace(args=str(part.args).replace("16B", "16L")) for part in other.tile]
            return _pixels(other, self.channels).to(torch.float32)


def bands_of(image: Image.Image) -> tuple[int, bool]:
    """Number of channels, and whether the last of them is transparency; of the picture that a palette stands for."""
    if image.mode in PLAIN:
        return PLAIN[image.mode], image.mode.endswith("A")
    if image.mode in {"1", "La"} or image.mode.startswith(("I", "F")):
        return 1, False
    return 3, False


def is_deep_colour(image: Image.Image) -> bool:
    """Whether several channels of 16 bits are stored; asked before the pixels are decoded."""
    return len(image.getbands()) > 1 and any(";16" in str(part.args) for part in getattr(image, "tile", ()))


def orientation_of(image: Image.Image, content: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it cannot be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, and gives the upright size
    if image.format == "PNG":
        if not any(mark in content for mark in PNG_METADATA):
            return 1
        # Here a failure to decode is seen; after one inside getexif, the next load would give the half decoded
        # picture without a word.
        image.load()
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata says nothing against the pixels
        return 1
    return value if value in range(1, 9) else 1


@contextmanager
def _pillow() -> Iterator[None]:
    with only_bad_images():
        try:
            yield
        except UnidentifiedImageError as error:
            raise BadImage("not an image") from error
        except Image.DecompressionBombError as error:
            raise BadImage("too many pixels") from error


def _pixels(image: Image.Image, channels: int) -> Pixels:
    """8-bit channels of any kind of colour."""
    if image.mode not in PLAIN or channels in (1, 3):
        # Pillow's own conversions: of palettes, inks, one bit, Lab; transparency is dropped.
        grey = image.mode in {"L", "LA", "1", "La"}
        image = (image.convert("LA") if image.mode == "La" else image).convert("L" if grey else "RGB")
        if channels == 1 and not grey:
            image = image.convert("L")
    values = torch.from_numpy(np.array(image))
    pixels = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
    return to_channels(pixels, False, channels)
