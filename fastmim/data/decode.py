# SPDX-License-Identifier: Apache-2.0
"""One image file -> upright RGB pixels, or ``BadImage`` with the reason. Nothing else can come of any file.

A file of a large folder may be damaged, huge, a pipe, or made to do harm. So: only regular files are opened, only
eight formats are tried (Pillow knows many more, one of which starts a program), and the size is judged from the header
before any pixel is decoded.
"""

import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from fastmim.data.augment import Box

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000
MAX_SIDE = 2**16
# How much larger than the result a JPEG that is decoded at reduced size must still be: from 1.5 times on, antialiased
# resizing hides the difference to the full decode (measured by tests/test_decode.py).
DRAFT_MARGIN = 1.5

# EXIF orientation -> what makes the stored picture upright, and how upright coordinates go back to stored ones.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AXES_SWAPPED, X_MIRRORED, Y_MIRRORED = {5, 6, 7, 8}, {2, 3, 7, 8}, {3, 4, 6, 7}


class BadImage(Exception):  # noqa: N818 - the fault is the image's
    """A file that cannot be used as an image.

    ``reason`` is one of: missing, unreadable, not a regular file, empty, too many bytes, not an image,
    too many pixels, truncated, damaged, no finite values.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class UprightImage:
    """An image whose size is known and whose pixels are not decoded yet. ``crop`` or ``whole`` may be called once."""

    width: int
    height: int
    _stored: Image.Image
    _orientation: int

    def crop(self, box: Box, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The part inside ``box`` (upright pixels), resized with antialiasing; writable.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        shrink = next((s for s in (8, 4, 2) if min(_sides(box)) >= DRAFT_MARGIN * size * s), 1)
        with _pillow():
            left, top, right, bottom = _stored_box(box, self._orientation, *self._stored.size)
            if shrink > 1:
                width, height = self._stored.size
                # JPEG only (libjpeg leaves out high frequencies); the other formats answer None and stay as they are.
                drafted = self._stored.draft(None, (width // shrink, height // shrink))
                shrink = shrink if drafted else 1
            pixels = _to_rgb(self._stored)
            scaled = (left / shrink, top / shrink, right / shrink, bottom / shrink)
            # Turning comes last, because the result is small and the source may be large.
            result = pixels.resize((size, size), Image.Resampling.BICUBIC, box=scaled)
            return np.array(self._turn(result))

    def whole(self) -> UInt8[np.ndarray, "H W 3"]:
        """All pixels at full size; writable.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        with _pillow():
            return np.array(self._turn(_to_rgb(self._stored)))

    def _turn(self, image: Image.Image) -> Image.Image:
        method = UPRIGHT.get(self._orientation)
        return image if method is None else image.transpose(method)


def open_image(path: str) -> UprightImage:
    """Read the bytes and the header of ``path``, and judge both.

    Raises:
        BadImage: not a regular file, too large, or no image of a known format.
    """
    content = io.BytesIO(_read_bytes(Path(path)))
    with _pillow():
        stored = Image.open(content, formats=FORMATS)
        width, height = stored.size
        if min(width, height) < 1:
            raise BadImage("damaged")
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise BadImage("too many pixels")
        orientation = _orientation(stored)
    if orientation in AXES_SWAPPED:
        width, height = height, width
    return UprightImage(width, height, stored, orientation)


def read_crop(path: str, box_of: Callable[[int, int], Box], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A square of ``size`` pixels from ``path``: ``box_of(width, height)`` chooses the part, in upright pixels.

    A JPEG that is much larger than needed is decoded at a half, a quarter or an eighth of its size.

    Raises:
        BadImage: the file cannot be used.
    """
    image = open_image(path)
    return image.crop(box_of(image.width, image.height), size)


def read_image(path: str) -> UInt8[np.ndarray, "H W 3"]:
    """All of ``path``, upright, at full size.

    Raises:
        BadImage: the file cannot be used.
    """
    return open_image(path).whole()


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        # Before opening: opening a pipe waits for ever, and a device may do anything.
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size == 0:
            raise BadImage("empty")
        if status.st_size > MAX_BYTES:
            raise BadImage("too many bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError as error:
        raise BadImage("unreadable") from error


@contextmanager
def _pillow() -> Iterator[None]:
    """Turns whatever Pillow raises into ``BadImage``: a damaged file may raise TypeError as well as OSError.

    Warnings are silenced: they tell of odd metadata, of which a large folder has much, and of large pictures, which
    are judged here.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage("not an image") from error
        except Image.DecompressionBombError as error:
            raise BadImage("too many pixels") from error
        except Exception as error:
            cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise BadImage("truncated" if cut else "damaged") from error


def _orientation(stored: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it cannot be read."""
    if stored.format == "TIFF":
        return 1  # Pillow turns TIFF itself, and gives the upright size
    if stored.format == "PNG":
        # In PNG the EXIF may stand behind the pixels, so that getexif decodes them. Here a failure is seen; after a
        # failure inside getexif, the next load would give the half decoded picture without a word.
        stored.load()
    try:
        value = stored.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata says nothing against the pixels
        return 1
    return value if value in UPRIGHT else 1


def _sides(box: Box) -> tuple[int, int]:
    return box.right - box.left, box.bottom - box.top


def _stored_box(box: Box, orientation: int, width: int, height: int) -> tuple[int, int, int, int]:
    """``box`` of the upright picture, as a box of the stored one, which is ``width`` x ``height``."""
    left, top, right, bottom = box
    if orientation in AXES_SWAPPED:
        left, top, right, bottom = top, left, bottom, right
    if orientation in X_MIRRORED:
        left, right = width - right, width - left
    if orientation in Y_MIRRORED:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode, and bring any kind of colour to 8-bit RGB; transparency is dropped.

    Grey of more than 8 bits is scaled here, because Pillow's own conversion cuts at 255: all white, or all black.
    """
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        image = Image.fromarray(_stretch(np.asarray(image)))
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        sixteen_bit = values.min() >= 0 and values.max() <= 65535
        image = Image.fromarray(
            ((values.astype(np.uint32) + 128) // 257).astype(np.uint8) if sixteen_bit else _stretch(values)
        )
    return image.convert("RGB")


def _stretch(values: Num[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """The picture's own smallest to largest value as 0 to 255; values that are not finite become the smallest."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        raise BadImage("no finite values")
    low, high = finite.min(), finite.max()
    scaled = (np.where(np.isfinite(values), values, low).astype(np.float64) - low) * (255 / ((high - low) or 1.0))
    return np.rint(scaled).astype(np.uint8)
