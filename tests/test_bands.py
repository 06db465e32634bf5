# SPDX-License-Identifier: Apache-2.0
"""Pictures of many bands, large scenes and medical pictures: the right values, by windows, within bounds."""

import builtins
import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data.augment import Box
from fastmim.data.decoding import bands
from fastmim.data.decoding.decode import facts, open_image
from fastmim.data.decoding.resize import resize_crop
from fastmim.data.read import BadImage
from fastmim.errors import UserError

rasterio = pytest.importorskip("rasterio")
pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (13, 40, 50)).astype(np.uint8)


def geotiff(values: np.ndarray, overviews: tuple[int, ...] = (), **options: Any) -> bytes:
    """``values`` (C H W) as a tiled, deflated GeoTIFF with reduced copies."""
    count, height, width = values.shape
    profile = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"} | options
    with rasterio.io.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, **profile
        ) as file:
            file.write(values)
            if overviews:
                file.build_overviews(overviews, rasterio.enums.Resampling.average)
        return memory.read()


def smooth(count: int, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (x * (1 + c) + y * 2)) * np.cos(3 * np.pi * y) for c in range(count)]
    return (5000 + 4000 * np.stack(waves)).astype(np.uint16)


def reason_of(content: bytes, channels: int, raw: bool = False) -> str:
    with pytest.raises(BadImage) as bad:
        open_image(content, channels, raw).whole()
    return bad.value.reason


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_thirteen_bands_come_as_they_are(interleave: str) -> None:
    content = geotiff(SMALL, interleave=interleave)
    image = open_image(content, 13)
    assert (image.width, image.height) == (50, 40)
    assert np.array_equal(image.whole().numpy(), SMALL)
    assert np.array_equal(image.crop(Box(5, 3, 35, 33), 30).numpy(), SMALL[:, 3:33, 5:35])
    assert image.crop(Box(0, 0, 40, 40), 16).shape == (13, 16, 16)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_raw_values_of_all_types(dtype: str, count: int) -> None:
    span = (0, 200) if dtype == "uint8" else (-100, 100) if dtype.startswith(("int", "float")) else (0, 60000)
    values = (RNG.random((count, 20, 30)) * (span[1] - span[0]) + span[0]).astype(dtype)
    content = geotiff(values, photometric="MINISBLACK")
    pixels = open_image(content, count, raw=True).whole()
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels.numpy(), values.astype(np.float32))
    found = facts(content)
    assert (found.format, found.channels, found.dtype, found.width) == ("tiff", count, dtype, 30)


def test_colour_of_sixteen_bits() -> None:
    values = RNG.integers(0, 65536, (3, 20, 30)).astype(np.uint16)
    content = geotiff(values, photometric="RGB")
    assert np.abs(open_image(content).whole().numpy() - values / 257).max() <= 1
    assert np.array_equal(open_image(content, raw=True).whole().numpy(), values.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "channels", "reason"),
    [
        (SMALL, 3, "has 13 channels, not 3"),
        (SMALL, 1, "has 13 channels, not 1"),
        (SMALL[:4], 3, "has 4 channels, not 3"),
        (SMALL.astype(np.uint16), 13, "16-bit values; read them with --values raw"),
        (SMALL.astype(np.float32), 13, "float32 values; read them with --values raw"),
        (SMALL[:3].astype(np.float32), 3, "float32 values; read them with --values raw"),
        (SMALL[:1].astype(np.complex64), 1, "complex numbers"),
    ],
)
def test_what_does_not_fit_has_a_reason(values: np.ndarray, channels: int, reason: str) -> None:
    assert reason_of(geotiff(values, photometric="MINISBLACK"), channels) == reason


def test_transparency_is_dropped_or_kept() -> None:
    content = geotiff(SMALL[:4], photometric="RGB", alpha="yes")
    assert np.array_equal(open_image(content, 3).whole().numpy(), SMALL[:3])
    assert np.array_equal(open_image(content, 4).whole().numpy(), SMALL[:4])


def test_missing_values_become_the_smallest_of_the_band() -> None:
    values = RNG.random((5, 20, 30)).astype(np.float32) + 3
    expected = values.copy()
    values[1, 0, :4] = -9999, np.nan, np.inf, -np.inf
    expected[1, 0, :4] = np.delete(values[1].ravel(), range(4)).min()
    values[4] = -9999
    expected[4] = 0
    pixels = open_image(geotiff(values, nodata=-9999), 5, raw=True).whole()
    assert np.array_equal(pixels.numpy(), expected)
    assert reason_of(geotiff(np.full((5, 8, 8), np.nan, np.float32)), 5, raw=True) == "no finite values"


@pytest.mark.parametrize("dtype", ["uint16", "float64"])
def test_one_deep_band_is_scaled(dtype: str) -> None:
    values = np.linspace(0, 65535, 20 * 30).reshape(1, 20, 30).astype(dtype)
    content = geotiff(values)
    pixels = open_image(content, 3).whole().numpy()
    assert pixels.shape == (3, 20, 30) and np.abs(pixels - values / 257).max() <= 1
    assert np.array_equal(open_image(content, 1).crop(Box(4, 4, 12, 12), 8).numpy(), pixels[:1, 4:12, 4:12])


def test_reduced_copies_are_used_where_they_are_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    values = smooth(5, 512)
    content = geotiff(values, overviews=(2, 4, 8))
    levels: list[int | None] = []
    opened = bands._opened

    def watched(content: bytes, level: int | None) -> Any:
        levels.append(level)
        return opened(content, level)

    monkeypatch.setattr(bands, "_opened", watched)
    for box, last in ((Box(0, 0, 512, 512), 2), (Box(100, 50, 400, 350), 1), (Box(10, 10, 60, 60), None)):
        levels.clear()
        fast = open_image(content, 5, raw=True).crop(box, 32)
        slow = resize_crop(torch.from_numpy(values.astype(np.float32)), box, 32)
        assert levels[-1] == last
        assert (fast - slow).abs().max() < 100  # of a range of 8000; half a pixel of shift is 400 to 800


def test_a_scene_beyond_the_caps_is_read_by_windows() -> None:
    """80 000 x 1 000 pixels, of which most tiles are not stored."""
    with rasterio.io.MemoryFile() as memory:
        options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True, "compress": "deflate"}
        with memory.open(driver="GTiff", count=5, height=1000, width=80_000, dtype="uint8", **options) as file:
            file.write(SMALL[:5], window=((500, 540), (70_000, 70_050)))
        content = memory.read()
    image = open_image(content, 5)
    assert (image.width, image.height) == (80_000, 1000)
    assert np.array_equal(image.crop(Box(70_000, 500, 70_040, 540), 40).numpy(), SMALL[:5, :, :40])
    with pytest.raises(BadImage, match="too many pixels"):
        image.whole()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_many_bands(orientation: int) -> None:
    content = geotiff(SMALL)
    plain = open_image(content, 13).whole()
    with_tag = set_tag(content, 284, 274, orientation)  # what was there (pixels together) is the default
    image = open_image(with_tag, 13)
    turned = {
        1: plain,
        2: plain.flip(2),
        3: plain.flip(1, 2),
        4: plain.flip(1),
        5: plain.transpose(1, 2),
        6: plain.rot90(-1, (1, 2)),
        7: plain.flip(1, 2).transpose(1, 2),
        8: plain.rot90(1, (1, 2)),
    }[orientation]
    assert (image.width, image.height) == (turned.shape[2], turned.shape[1])
    assert torch.equal(image.whole(), turned)
    assert torch.equal(image.crop(Box(2, 3, 32, 33), 30), turned[:, 3:33, 2:32])


def set_tag(content: bytes, old: int, new: int, value: int) -> bytes:
    """One entry of the first page turned into another; the order of tags is not looked at by readers."""
    first = struct.unpack_from("<I", content, 4)[0]
    for place in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", content, first)[0], 12):
        if struct.unpack_from("<H", content, place)[0] == old:
            return content[:place] + struct.pack("<HHII", new, 3, 1, value) + content[place + 12 :]
    raise AssertionError(old)


def test_tiles_far_larger_than_the_picture_are_refused() -> None:
    content = geotiff(SMALL)
    for tag in (322, 323):
        content = set_tag(content, tag, tag, 65520)
    assert reason_of(content, 13) == "too many pixels"
    small = set_tag(set_tag(geotiff(SMALL[:1]), 322, 322, 65520), 323, 323, 65520)
    assert reason_of(small, 1) == "too many pixels"


def test_cut_scenes_are_bad() -> None:
    content = geotiff(RNG.integers(0, 256, (5, 300, 300)).astype(np.uint8))
    for share in (0.3, 0.6, 0.9):
        assert reason_of(content[: int(share * len(content))], 5) in {"damaged", "truncated", "not an image"}


@pytest.mark.parametrize(("module", "extra"), [("rasterio", "geo"), ("pydicom", "medical")])
def test_a_missing_extra_is_named(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == module:
            raise ImportError(name)
        return real(name, *rest, **options)

    content = geotiff(SMALL) if extra == "geo" else dicom(SLICE)
    monkeypatch.setattr(builtins, "__import__", missing)
    bands._rasterio.cache_clear()
    with pytest.raises(UserError, match=rf"pip install 'fastmim\[{extra}\]'"):
        open_image(content, 13 if extra == "geo" else 1)


SLICE = np.linspace(0, 4095, 40 * 50).reshape(40, 50).astype(np.uint16)


def dicom(values: np.ndarray, compress: str | None = None, **elements: Any) -> bytes:
    """A DICOM file of ``values`` (H W, H W 3, or frames of them)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["fastmim"])
    colours = values.shape[-1] if values.shape[-1] == 3 else 1
    dataset.Rows, dataset.Columns = values.shape[-3:-1] if colours == 3 else values.shape[-2:]
    dataset.SamplesPerPixel = colours
    dataset.PhotometricInterpretation = "RGB" if colours == 3 else "MONOCHROME2"
    if colours == 3:
        dataset.PlanarConfiguration = 0
    bits = 8 * values.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset["PixelData"] = pydicom.DataElement("PixelData", "OW" if bits > 8 else "OB", values.tobytes())
    if compress:
        dataset.compress(pydicom.uid.UID(compress), encoding_plugin="")
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def test_a_slice_in_hounsfield_units() -> None:
    content = dicom(SLICE, RescaleSlope="2", RescaleIntercept="-1024")
    assert np.array_equal(open_image(content, 1, raw=True).whole()[0].numpy(), SLICE * 2.0 - 1024)
    found = facts(content)
    assert (found.format, found.width, found.height, found.channels, found.dtype) == ("dicom", 50, 40, 1, "uint16")


def test_signed_values() -> None:
    values = (SLICE.astype(np.int16) - 2000).astype(np.int16)
    content = dicom(values)
    assert np.array_equal(open_image(content, 1, raw=True).whole()[0].numpy(), values)
    assert facts(content).dtype == "int16"


def test_the_files_window_is_shown() -> None:
    windowed = open_image(dicom(SLICE, WindowCenter=["2000", "9"], WindowWidth=["1000", "9"]), 1).whole()[0].numpy()
    expected = (((SLICE - 1999.5) / 999 + 0.5) * 255).clip(0, 255)
    assert np.abs(windowed - expected).max() <= 0.51
    shown = open_image(dicom(SLICE), 3).whole().numpy()
    assert shown.shape == (3, 40, 50) and shown.min() == 0 and shown.max() == 255
    assert np.abs(shown[0].astype(float) - SLICE / 4095 * 255).max() < 3


def test_monochrome1_is_turned_over() -> None:
    usual = open_image(dicom(SLICE), 1).whole()[0].numpy()
    inverted = open_image(dicom(SLICE, PhotometricInterpretation="MONOCHROME1"), 1).whole()[0].numpy()
    assert np.array_equal(inverted, 255 - usual)


def test_colour_and_frames() -> None:
    rgb = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    assert np.array_equal(open_image(dicom(rgb), 3).whole().numpy(), rgb.transpose(2, 0, 1))
    frames = np.stack([SLICE, SLICE[::-1]])
    content = dicom(frames, NumberOfFrames="2")
    assert facts(content).frames == 2
    assert np.array_equal(open_image(content, 1, raw=True).whole()[0].numpy(), SLICE)
    assert reason_of(content, 3 + 1) == "has 1 channel, not 4"


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_compressed_slices(syntax: str) -> None:
    content = dicom(SLICE, compress=syntax)
    assert np.array_equal(open_image(content, 1, raw=True).whole()[0].numpy(), SLICE)
    for cut in (0.5, 0.9):
        assert reason_of(content[: int(cut * len(content))], 1) in {"damaged", "truncated", "not an image"}


def test_a_stream_of_another_size_than_the_file_says_is_refused() -> None:
    content = bytearray(dicom(SLICE, compress="1.2.840.10008.1.2.4.90"))
    at = content.index(b"\xff\x4f\xff\x51") + 8
    content[at : at + 4] = struct.pack(">I", 2**31 - 1)
    with pytest.raises(BadImage, match="damaged") as bad:
        open_image(bytes(content), 1).whole()
    assert bad.value.__cause__ is None  # our own judgement: no decoder has seen it


def test_a_slice_behind_the_header_of_a_tiff() -> None:
    """Files of two natures are usual: pathology viewers read them as TIFF."""
    content = b"II*\0\x08\0\0\0" + dicom(SLICE)[8:]
    assert facts(content).format == "dicom"
    assert np.array_equal(open_image(content, 1, raw=True).whole()[0].numpy(), SLICE)


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_gdcm", "MR_small_jpeg_ls_lossless", "GDCMJ2K_TextGBR", "examples_ybr_color"]
)
def test_files_that_pydicom_brings_along(name: str) -> None:
    """Lossless JPEG, JPEG-LS, JPEG 2000 in boxes, and colours as brightness and differences."""
    pytest.importorskip("libjpeg")
    path = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
    found = facts(path.read_bytes())
    image = open_image(path.read_bytes(), found.channels)
    pixels = image.whole()
    assert pixels.shape == (found.channels, found.height, found.width) and pixels.float().std() > 10


def test_dicoms_that_cannot_be_used() -> None:
    good = dicom(SLICE)
    deflated = good.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    assert reason_of(deflated, 1) == "a deflated DICOM file"
    assert reason_of(good[:-2000], 1) in {"damaged", "truncated"}
    assert reason_of(dicom(SLICE, Rows=65535, Columns=65535), 1) == "too many pixels"
    assert reason_of(good[:132], 1) in {"damaged", "not an image"}
    assert reason_of(b"\0" * 128 + b"DICM" + random.Random(0).randbytes(2000), 1) in {"damaged", "not an image"}


def test_a_jpeg_inside_of_a_tiff_is_pillows() -> None:
    stream = io.BytesIO()
    Image.fromarray(SMALL[:3].transpose(1, 2, 0).copy()).save(stream, "TIFF", compression="jpeg", quality=95)
    assert open_image(stream.getvalue()).whole().shape == (3, 40, 50)
