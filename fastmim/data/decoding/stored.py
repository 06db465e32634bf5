# SPDX-License-Identifier: Apache-2.0
"""What a decoder offers, what it may take in, and how stored values become the wanted channels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Num, UInt8
from torch import Tensor

from fastmim.data.decoding.resize import Region
from fastmim.data.read import BadImage

MAX_PIXELS = 64_000_000
MAX_SIDE = 2**16
MAX_VALUES_BYTES = 2**29
# How much larger than the result a picture that is decoded at reduced size must still be: from 1.75 times on,
# antialiased resizing hides the difference to the full decode.
REDUCED_MARGIN = 1.75
LUMA = (0.299, 0.587, 0.114)

Pixels = UInt8[Tensor, "C H W"] | Float32[Tensor, "C H W"]


@runtime_checkable
class Stored(Protocol):
    """A picture as it lies in its file, maybe on its side; its size is known and its pixels are not decoded yet."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""

    def crop(self, box: Region, size: int) -> Pixels:
        """The part inside ``box`` (stored pixels) as a square of ``size`` pixels; raises ``BadImage``."""

    def whole(self) -> Pixels:
        """All pixels; raises ``BadImage``."""


def check_size(width: int, height: int) -> None:
    """Judge a size that a header claims, before anything of that size is made.

    Raises:
        BadImage: damaged (no pixels), or too many pixels.
    """
    if min(width, height) < 1:
        raise BadImage("damaged")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImage("too many pixels")


@contextmanager
def only_bad_images() -> Iterator[None]:
    """Turns whatever a decoder raises into ``BadImage``: a damaged file may raise TypeError as well as OSError.

    Warnings are silenced: they tell of odd metadata, of which a large folder has much, and of large pictures, which
    are judged here.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except BadImage:
            raise
        except Exception as error:
            cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise BadImage("truncated" if cut else "damaged") from error


def wrong_channels(found: int, wanted: int) -> BadImage:
    """The error for a file that cannot give ``wanted`` channels."""
    return BadImage(f"has {found} channel{'' if found == 1 else 's'}, not {wanted}")


def too_deep(dtype: str) -> BadImage:
    """The error for values that have no natural range of 0 to 255."""
    kind = "16-bit" if dtype in {"uint16", "int16"} else dtype
    return BadImage(f"{kind} values; read them with --values raw")


def check_channels(found: int, alpha: bool, wanted: int) -> None:
    """Whether ``to_channels`` can make ``wanted`` channels of ``found`` ones.

    Raises:
        BadImage: it cannot.
    """
    colours = found - alpha
    if found != wanted and not (wanted in (1, 3) and colours in (1, 3)):
        raise wrong_channels(found, wanted)


def to_channels(
    pixels: UInt8[Tensor, "stored H W"] | Float32[Tensor, "stored H W"], alpha: bool, wanted: int
) -> UInt8[Tensor, "{wanted} H W"] | Float32[Tensor, "{wanted} H W"]:
    """Grey is repeated for three channels, colour becomes its luma for one; the last channel is dropped if ``alpha``.

    Raises:
        BadImage: any other number of channels must be there as it is.
    """
    check_channels(len(pixels), alpha, wanted)
    if len(pixels) == wanted:
        return pixels
    colours = pixels[: len(pixels) - alpha]
    if len(colours) == wanted:
        return colours
    if wanted == 3:
        return colours.expand(3, -1, -1).contiguous()
    red, green, blue = colours.to(torch.float32)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return (luma.round_() if pixels.dtype == torch.uint8 else luma).to(pixels.dtype)[None]


def fill_holes(values: Float32[np.ndarray, "*shape"], nodata: float | None = None) -> Float32[np.ndarray, "*shape"]:
    """Values that are not finite, or equal ``nodata``, become the smallest of the others (0 if all are ``nodata``).

    Raises:
        BadImage: no value is finite.
    """
    valid = np.isfinite(values)
    if nodata is not None:
        declared = values == np.float32(nodata)
        if not valid.any() and not declared.any() and not np.isnan(nodata):
            raise BadImage("no finite values")
        valid &= ~declared
        lowest = values[valid].min() if valid.any() else np.float32(0)
    elif valid.any():
        lowest = values[valid].min()
    else:
        raise BadImage("no finite values")
    return values if valid.all() else np.where(valid, values, lowest)


def stretch(values: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """The picture's own smallest to largest value as 0 to 255; values that are not finite become the smallest.

    Raises:
        BadImage: no value is finite.
    """
    # In parts: doubles of a whole picture take much memory.
    parts = np.array_split(values.reshape(-1), values.size // 2**20 + 1)
    lows, highs = zip(*(_range(part) for part in parts), strict=True)
    low, high = min(lows), max(highs)
    if low > high:
        raise BadImage("no finite values")
    # Halves, because high - low of doubles may be beyond the largest one.
    span = (high / 2 - low / 2) or 1.0
    result = []
    for part in parts:
        filled = np.where(np.isfinite(part), part, low).astype(np.float64)
        result.append(np.rint((filled / 2 - low / 2) / span * 255).astype(np.uint8))
    return np.concatenate(result).reshape(values.shape)


def _range(values: Num[np.ndarray, "*shape"]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.inf, -np.inf)


def sixteen_to_eight(values: Num[np.ndarray, "*shape"], top: int = 65535) -> UInt8[np.ndarray, "*shape"]:
    """0 to ``top`` as 0 to 255, rounded (v / 257 for 65535)."""
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
