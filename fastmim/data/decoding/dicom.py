# SPDX-License-Identifier: Apache-2.0
"""DICOM: the first frame of a medical picture. By pydicom and its plugins (extra ``medical``)."""

import io
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Num, UInt8

from fastmim.data.decoding.resize import Region, resize_crop
from fastmim.data.decoding.stored import Pixels, check_channels, check_size, fill_holes, only_bad_images, to_channels
from fastmim.data.read import BadImage
from fastmim.errors import UserError

MARK_AT, MARK = 128, b"DICM"
# All of such a file is one zlib stream, which may be a thousand times larger than it looks.
DEFLATED = b"1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
MAX_RLE_BYTES = 2**24
PERCENTILES = (0.5, 99.5)
SOF = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
JPEG2000 = re.compile(rb"\xff\x4f\xff\x51.{4}", re.DOTALL)
STANDALONE = {0x01, *range(0xD0, 0xD9)}


@dataclass(frozen=True)
class DicomPicture:
    """A DICOM file whose pixels are not decoded yet."""

    width: int
    height: int
    orientation: int
    dataset: Any
    """What pydicom read."""
    channels: int
    raw: bool

    def crop(self, box: Region, size: int) -> Pixels:
        """The part inside ``box``, resized after decoding all of it."""
        return resize_crop(self.whole(), box, size)

    def whole(self) -> Pixels:
        """All pixels of the first frame."""
        with only_bad_images():
            return self._decode()

    def _decode(self) -> Pixels:
        from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
        from pydicom.pixels.utils import pixel_array

        _check_codec(self.dataset)
        _check_frame(self.dataset)
        values = pixel_array(self.dataset, index=0)
        if self.dataset.PhotometricInterpretation == "PALETTE COLOR":
            values = apply_color_lut(values, self.dataset)
        if values.shape[:2] != (self.height, self.width):
            raise BadImage("damaged")
        if values.ndim == 3:
            bits = 8 * values.dtype.itemsize if values.dtype != np.uint16 else int(self.dataset.BitsStored)
            colour = values if self.raw or bits <= 8 else values * np.float32(255 / (2**bits - 1))
            colour = colour.astype(np.float32) if self.raw else np.rint(colour).astype(np.uint8)
            return to_channels(torch.from_numpy(np.ascontiguousarray(colour)).permute(2, 0, 1), False, self.channels)
        stored = values
        values = apply_modality_lut(values, self.dataset)
        grey = fill_holes(values.astype(np.float32)) if self.raw else self._to_bytes(stored, values)
        return to_channels(torch.from_numpy(grey)[None], False, self.channels)

    def _to_bytes(self, stored: Num[np.ndarray, "H W"], values: Num[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
        """What a viewer would show at first: the file's own window, else all but the outermost values."""
        from pydicom.pixels.processing import apply_voi

        dataset = self.dataset
        if dataset.get("VOILUTSequence") and values.dtype.kind in "iu":
            bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            shown = apply_voi(values, dataset).astype(np.float32) / (2**bits - 1)
        elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
            shown = _window(values, dataset)
        else:
            shown = _between_percentiles(fill_holes(values.astype(np.float32)))
        shown = np.clip(np.nan_to_num(shown), 0, 1)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            shown = 1 - shown
        return np.rint(shown * 255).astype(np.uint8)


def is_dicom(content: bytes) -> bool:
    """By the mark behind the preamble."""
    return content[MARK_AT : MARK_AT + 4] == MARK


def open_dicom(content: bytes, channels: int, raw: bool) -> DicomPicture:
    """The header of a DICOM file, judged.

    ``raw`` gives the modality's values (Hounsfield units of a CT); otherwise bytes as a viewer would show them.

    Raises:
        BadImage: no picture, too large, damaged, or without the wanted channels.
        UserError: pydicom is not installed.
    """
    dataset = read_dataset(content)
    with only_bad_images():
        width, height, found = int(dataset.Columns), int(dataset.Rows), colours_of(dataset)
        check_size(width, height)
        check_channels(found, False, channels)
        if "PixelData" not in dataset:
            raise BadImage("not an image")
    return DicomPicture(width, height, 1, dataset, channels, raw)


def read_dataset(content: bytes) -> Any:
    """All elements; large ones are not looked into.

    Raises:
        BadImage: damaged, or no picture.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError("a DICOM file needs pydicom; pip install 'fastmim[medical]'") from None
    if DEFLATED in content:
        raise BadImage("a deflated DICOM file")
    with only_bad_images():
        dataset = pydicom.dcmread(io.BytesIO(content))
        if "Rows" not in dataset or "Columns" not in dataset:
            raise BadImage("not an image")
        return dataset


def colours_of(dataset: Any) -> int:
    """Number of channels that are shown: three for a palette."""
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        return 3
    return int(dataset.get("SamplesPerPixel", 1))


def _window(values: Num[np.ndarray, "H W"], dataset: Any) -> Float32[np.ndarray, "H W"]:
    """The first of the file's windows as 0 to 1 (DICOM PS3.3 C.11.2.1.2)."""
    centre, width = (float(_first(dataset[name].value)) for name in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    values = values.astype(np.float32)
    if function == "SIGMOID":
        # Far outside of the window the exponential is infinite, and the result rightly 0.
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-4 * (values - centre) / max(width, 1e-6)))).astype(np.float32)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return ((values - centre) / max(width, 1e-6) + 0.5).astype(np.float32)


def _between_percentiles(values: Float32[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:
        low, high = values.min(), values.max()
    return ((values - low) / ((high - low) or 1)).astype(np.float32)


def _first(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else value[0]


def _check_codec(dataset: Any) -> None:
    """Raises BadImage where no installed plugin can decode the pixels."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        # Its licence (GPL) is not one to bring along unasked.
        raise BadImage(f"{syntax.name}; decoded with pip install pylibjpeg-libjpeg")


def _check_frame(dataset: Any) -> None:
    """Compressed pixels have a size of their own, which their decoder believes; it must be the file's."""
    from pydicom.encaps import get_frame

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    if syntax == RLE:
        if len(frame) > MAX_RLE_BYTES:
            raise BadImage("too many bytes")
        return
    if _coded_size(frame) != (int(dataset.Columns), int(dataset.Rows)):
        raise BadImage("damaged")


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height by the header of a JPEG, JPEG-LS or JPEG 2000 stream."""
    starts = [found.end() for found in re.finditer(JPEG2000, frame)]  # within boxes, or without
    if starts and not frame.startswith(b"\xff\xd8"):
        sizes = {struct.unpack_from(">4I", frame + b"\0" * 16, at) for at in starts}
        right, bottom, left, top = sizes.pop()
        # Which of several a decoder would take is not known here.
        return None if sizes else (right - left, bottom - top)
    at = 2
    for _ in range(256):
        if at + 9 > len(frame) or frame[at] != 0xFF:
            break
        marker = frame[at + 1]
        if marker in SOF:
            return int.from_bytes(frame[at + 7 : at + 9], "big"), int.from_bytes(frame[at + 5 : at + 7], "big")
        at += 2 if marker in STANDALONE else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
