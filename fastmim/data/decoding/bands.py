# SPDX-License-Identifier: Apache-2.0
"""TIFFs that Pillow cannot show: many bands, deep colour, scenes larger than memory. By rasterio (extra ``geo``).

Only the wanted window is decoded, from the file's own reduced copies where these are large enough. GDAL, which is
inside of rasterio, knows a hundred formats, some of which name other files or hosts: it gets the bytes, the one driver
for TIFF, and nothing else.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from fastmim.data.decoding.resize import EXTRA, Region, resize_crop, whole_box
from fastmim.data.decoding.stored import (
    MAX_PIXELS,
    MAX_VALUES_BYTES,
    REDUCED_MARGIN,
    Pixels,
    check_channels,
    fill_holes,
    only_bad_images,
    sixteen_to_eight,
    stretch,
    to_channels,
    too_deep,
)
from fastmim.data.decoding.tiff import FLOAT, PALETTE, TiffHeader
from fastmim.data.read import BadImage
from fastmim.errors import UserError

SETTINGS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GDAL_NUM_THREADS": "1",
    "GDAL_CACHEMAX": 64 * 2**20,
    "GDAL_MAX_DATASET_POOL_SIZE": "2",
}
MAX_TILE = 2**24


@dataclass(frozen=True)
class BandsPicture:
    """A TIFF of any number of bands."""

    width: int
    height: int
    orientation: int
    content: bytes
    header: TiffHeader
    channels: int
    raw: bool

    def crop(self, box: Region, size: int) -> Pixels:
        """The part inside ``box``, from the smallest reduced copy that is still large enough."""
        if self._needs_all:
            return resize_crop(self.whole(), box, size)
        side = min(box[2] - box[0], box[3] - box[1])
        level, width, height = None, self.width, self.height
        with only_bad_images(), _opened(self.content, None) as dataset:
            for number, factor in enumerate(dataset.overviews(1)):
                if side >= REDUCED_MARGIN * size * factor:
                    level = number
            if level is None:
                return self._read(dataset, box, size)
        with only_bad_images(), _opened(self.content, level) as dataset:
            across, down = dataset.width / width, dataset.height / height
            return self._read(dataset, (box[0] * across, box[1] * down, box[2] * across, box[3] * down), size)

    def whole(self) -> Pixels:
        """All pixels, if they are not too many."""
        with only_bad_images(), _opened(self.content, None) as dataset:
            return self._read(dataset, (0, 0, self.width, self.height), None)

    @property
    def _needs_all(self) -> bool:
        """Whether the scale of values depends on all of them."""
        return not self.raw and self.header.dtype not in {"uint8", "uint16"}

    def _read(self, dataset: Any, box: Region, size: int | None) -> Pixels:
        # Reduced copies are larger than the result, and where the box cuts their pixels, some more are of use.
        more = 0 if size is None else EXTRA * max(box[2] - box[0], box[3] - box[1]) / size
        around = (box[0] - more, box[1] - more, box[2] + more, box[3] + more) if _between(box) else box
        left, top, right, bottom = whole_box(around, dataset.width, dataset.height)
        area, depth = (right - left) * (bottom - top), dataset.count * np.dtype(dataset.dtypes[0]).itemsize
        if area > MAX_PIXELS or area * depth > MAX_VALUES_BYTES:
            raise BadImage("too many pixels")
        values = dataset.read(window=((top, bottom), (left, right)))
        pixels = self._to_pixels(values, dataset.nodatavals)
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return pixels if size is None else resize_crop(pixels, inner, size)

    def _to_pixels(self, values: Shaped[np.ndarray, "stored H W"], nodata: tuple[float | None, ...]) -> Pixels:
        if values.dtype.kind not in "uif":
            raise BadImage("damaged")
        if self.raw:
            # Beyond the largest float32 is a hole too.
            with np.errstate(over="ignore"):
                single = values.astype(np.float32)
            chosen = np.stack([fill_holes(band, hole) for band, hole in zip(single, nodata, strict=True)])
        elif values.dtype == np.uint8:
            chosen = values
        elif values.dtype == np.uint16:
            chosen = sixteen_to_eight(values)
        else:
            chosen = stretch(values[0])[None]  # there is only one
        return to_channels(torch.from_numpy(chosen), self.header.alpha, self.channels)


def open_bands(content: bytes, header: TiffHeader, channels: int, raw: bool) -> BandsPicture:
    """A picture whose pixels are not decoded yet. Of its size, only the crops are limited.

    Values that the file declares as missing, and those that are not finite, become the smallest of the band within the
    window (raw values only).

    Raises:
        BadImage: the header makes no sense, or there are no such channels.
        UserError: rasterio is not installed.
    """
    _check(header)
    check_channels(header.samples, header.alpha, channels)
    if not raw and header.dtype != "uint8" and not (header.samples == 1 or header.dtype == "uint16"):
        raise too_deep(header.dtype)
    if not raw and header.dtype != "uint8" and channels not in (1, 3):
        raise too_deep(header.dtype)
    _rasterio()
    return BandsPicture(header.width, header.height, header.orientation, content, header, channels, raw)


def _check(header: TiffHeader) -> None:
    """What a hostile header could ask for: pixels, or the memory of one tile."""
    if min(header.width, header.height) < 1:
        raise BadImage("damaged")
    if header.kind not in range(1, FLOAT + 1):
        raise BadImage("complex numbers")
    if header.photometric == PALETTE and header.width * header.height > MAX_PIXELS:
        raise BadImage("too many pixels")
    width, height = header.tile or (header.width, 1)
    if width * height > MAX_TILE or width * height * header.samples * header.bits // 8 > MAX_VALUES_BYTES:
        raise BadImage("too many pixels")


@functools.cache
def _rasterio() -> ModuleType:
    try:
        import rasterio
        import rasterio.io
    except ImportError:
        raise UserError(
            "a TIFF of this kind (many bands, deep colour or a large scene) needs rasterio; pip install 'fastmim[geo]'"
        ) from None
    return rasterio


def _between(box: Region) -> bool:
    """Whether an edge lies between pixels."""
    return any(edge != round(edge) for edge in box)


@contextmanager
def _opened(content: bytes, level: int | None) -> Iterator[Any]:
    rasterio = _rasterio()
    options = {} if level is None else {"overview_level": level}
    with (
        rasterio.Env(**SETTINGS),
        rasterio.io.MemoryFile(content, ext=".tif") as memory,
        memory.open(driver="GTiff", sharing=False, **options) as dataset,
    ):
        yield dataset
