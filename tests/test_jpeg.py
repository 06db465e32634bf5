# SPDX-License-Identifier: Apache-2.0
"""The fast way through a JPEG gives what the slow one gives, within stated bounds, and refuses what Pillow refuses."""

import dataclasses
import io
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from fastmim.data.augment import Box, random_box
from fastmim.data.decoding import jpeg
from fastmim.data.decoding.decode import open_image
from fastmim.data.decoding.pillow import PillowPicture
from fastmim.data.decoding.resize import resize_crop, whole_box
from fastmim.data.decoding.stored import REDUCED_MARGIN
from fastmim.data.read import BadImage
from fastmim.mim.targets import HOG


def photograph(width: int, height: int, seed: int = 0, slope: float = 1.0) -> Image.Image:
    """Noise with the spectrum of photographs (1 / f), whose colours go along with the light.

    At full size, a camera's pixels are less sharp than that: a larger ``slope``.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    light, *colour = np.fft.ifft2(np.fft.fft2(rng.normal(size=(4, height, width))) / frequency**slope).real
    noise = np.stack([light + 0.3 * part for part in colour], axis=-1)
    return Image.fromarray((128 + 50 * noise / noise.std()).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def psnr(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    error = float(((one.float() - other.float()) ** 2).mean())
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def hog_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean squared difference of the HOGs over the variance of the second ones."""
    ours, theirs = (HOG()(torch.stack(side).float() / 255) for side in zip(*pairs, strict=True))
    return float(((ours - theirs) ** 2).mean() / theirs.var())


def by_pillow(image: Image.Image, box: Any, size: int) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def crops(content: bytes, size: int, count: int = 12) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Fast crop, slow crop, slow crop a pixel aside, and whether the fast one was decoded at reduced size."""
    full = Image.open(io.BytesIO(content)).convert("RGB")
    draws = random.Random(size)
    for _ in range(count):
        box = random_box(full.width, full.height, draws, (0.1, 1.0))
        aside = [max(edge - 1, 0) for edge in box]
        reduced = min(box.right - box.left, box.bottom - box.top) >= 2 * REDUCED_MARGIN * size
        yield open_image(content).crop(box, size), by_pillow(full, box, size), by_pillow(full, aside, size), reduced


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_crops_of_usual_pictures_are_those_of_a_full_decode(quality: int, subsampling: int) -> None:
    """500 x 375 to 128 px, as in ImageNet: an error of HOG of at most 0.02 of its variance (a pixel of shift: 0.2)."""
    found = list(crops(encode(photograph(500, 375), quality=quality, subsampling=subsampling), 128))
    assert np.mean([psnr(fast, slow) for fast, slow, _, _ in found]) >= 50
    assert hog_error([(fast, slow) for fast, slow, _, _ in found]) <= 0.02
    assert hog_error([(aside, slow) for _, slow, aside, _ in found]) > 0.1


@pytest.mark.parametrize(
    ("width", "height", "size"), [(900, 700, 64), (1601, 1203, 96), (1601, 1203, 32), (700, 1100, 160)]
)
@pytest.mark.parametrize("subsampling", [0, 2])
def test_crops_of_large_pictures_are_close_to_a_full_decode(
    width: int, height: int, size: int, subsampling: int
) -> None:
    """Where most crops are decoded at reduced size: an error of HOG of at most 0.055 of its variance."""
    content = encode(photograph(width, height, 1, slope=1.4), quality=92, subsampling=subsampling)
    found = list(crops(content, size))
    qualities = [psnr(fast, slow) for fast, slow, _, _ in found]
    assert np.mean(qualities) >= 48 and min(qualities) >= 43
    assert hog_error([(fast, slow) for fast, slow, _, _ in found]) <= 0.055
    assert sum(reduced for *_, reduced in found) >= 4


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 2}, {"subsampling": 1}, {}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_leaving_out_the_rows_below_changes_no_pixel(options: dict[str, Any], mode: str) -> None:
    content = encode(photograph(203, 309).convert(mode), quality=90, **options)
    picture = open_image(content)._stored
    assert isinstance(picture, jpeg.JpegPicture)
    assert (picture.header.segments.height_at is None) == ("progressive" in options)
    for shrink in (1, 2, 4, 8):
        whole = picture._decode(shrink, 309)
        for bottom in (1, 15, 16, 17, 100, 255, 256, 290, 309):
            part = picture._decode(shrink, bottom + jpeg.BLOCK * shrink)
            assert whole is not None and part is not None
            rows = -(-bottom // shrink)
            assert torch.equal(part[:, :rows], whole[:, :rows])
            assert part.shape[1] < whole.shape[1] or bottom > 140 or "progressive" in options


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [16, 40, 90])
def test_crops_are_the_same_without_the_rows_below(subsampling: int, size: int) -> None:
    content = encode(photograph(400, 700), quality=90, subsampling=subsampling)
    picture = open_image(content)._stored
    assert isinstance(picture, jpeg.JpegPicture)
    segments = picture.header.segments._replace(height_at=None)
    strict = dataclasses.replace(picture, header=picture.header._replace(segments=segments))
    for bottom in range(300, 480, 7):
        assert torch.equal(picture.crop((50, 20, 350, bottom), size), strict.crop((50, 20, 350, bottom), size))


def test_whole_pictures_are_pillows() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": 2}):
        content = encode(photograph(203, 309), **options)
        slow = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
        assert psnr(open_image(content).whole(), slow) >= 48  # libjpegs of other versions round colours otherwise


def exif(value: int, order: str, before: int = 0) -> bytes:
    """An APP1 segment with an orientation, behind ``before`` other tags."""
    entries = b"".join(struct.pack(order + "HHII", 200 + n, 4, 1, 9) for n in range(before))
    entries += struct.pack(order + "HHIHH", 274, 3, 1, value, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, before + 1)
    body = b"Exif\0\0" + head + entries + b"\0\0\0\0"
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("value", [0, 1, 3, 6, 9])
def test_the_orientation_is_the_one_that_pillow_reads(order: str, value: int) -> None:
    plain = encode(photograph(64, 48))
    for prefix in (b"", b"\xff\xe2\0\4ab", b"\xff\xff\xff"[:0], b"\xff\xed" + struct.pack(">H", 60002) + b"x" * 60000):
        content = plain[:2] + prefix + exif(value, order, before=5) + plain[2:]
        told = Image.open(io.BytesIO(content)).getexif().get(274, 1)
        assert told == value
        assert open_image(content)._stored.orientation == (value if 1 <= value <= 8 else 1)


def test_broken_exif_is_no_orientation() -> None:
    plain = encode(photograph(64, 48))
    whole = exif(6, "<", before=3)
    rng = random.Random(0)
    for _ in range(200):
        broken = bytearray(whole)
        for _ in range(rng.randrange(1, 9)):
            broken[rng.randrange(10, len(broken))] = rng.randrange(256)
        image = open_image(plain[:2] + bytes(broken) + plain[2:])
        assert 1 <= image._stored.orientation <= 8 and image.crop(Box(0, 0, 40, 40), 8).shape == (3, 8, 8)


def test_usable_oddities_are_read_and_cut_files_are_not() -> None:
    """Bytes between segments, junk behind the end: read. Whatever is cut: refused."""
    content = encode(photograph(300, 200), quality=90)
    plain = open_image(content).whole()
    scan = content.index(b"\xff\xda")
    for odd in (
        content + b"junk" * 50,
        content[:scan] + b"\0\0\0" + content[scan:],  # a warning of libjpeg: extraneous bytes
    ):
        assert psnr(open_image(odd).whole(), plain) >= 48
        assert open_image(odd).crop(Box(0, 0, 90, 90), 30).shape == (3, 30, 30)
    for length in (scan + 400, (scan + len(content)) // 2, len(content) - 200, len(content) - 2):
        cut = content[:length]
        for attempt in (lambda image: image.whole(), lambda image: image.crop(Box(0, 0, 90, 90), 30)):
            with pytest.raises(BadImage, match="truncated"):
                attempt(open_image(cut))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_inks_go_to_pillow() -> None:
    image = open_image(encode(photograph(64, 48).convert("CMYK")))
    assert isinstance(image._stored, PillowPicture) and image.crop(Box(0, 0, 48, 48), 16).shape == (3, 16, 16)


def test_colours_stored_as_such() -> None:
    picture = photograph(64, 48)
    content = encode(picture, quality=95, keep_rgb=True)
    slow = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert psnr(open_image(content).whole(), slow) >= 35
    assert psnr(open_image(content, 1).whole()[0], torch.from_numpy(np.array(picture.convert("L")))) >= 35


def test_endless_scans_are_refused() -> None:
    content = encode(photograph(64, 48), progressive=True)
    first = content.index(b"\xff\xda")
    second = content.index(b"\xff\xda", first + 2)
    bomb = content[:second] + content[second:-2] * 200 + content[-2:]
    with pytest.raises(BadImage, match="too many scans"):
        open_image(bomb)
    assert open_image(content).whole().shape == (3, 48, 64)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resizing_is_pillows(channels: int, dtype: torch.dtype) -> None:
    bands = torch.cat([torch.from_numpy(np.array(photograph(90, 70, n))).permute(2, 0, 1) for n in range(5)])[:channels]
    for layout in (bands, bands.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        for box in ((3, 4, 67, 68), (10, 10, 30, 25), (0, 0, 90, 70), (5, 60, 6, 61)):
            fast = resize_crop(layout.to(dtype), box, 32)
            assert fast.shape == (channels, 32, 32) and fast.dtype == dtype
            for band, result in zip(bands, fast, strict=True):
                part = Image.fromarray(band.numpy()).crop(box)
                slow = torch.from_numpy(np.array(part.resize((32, 32), Image.Resampling.BICUBIC)))
                assert psnr(result.clamp(0, 255), slow) >= 50


def test_a_box_of_the_wanted_size_is_copied() -> None:
    pixels = torch.from_numpy(np.array(photograph(90, 70))).permute(2, 0, 1)
    copy = resize_crop(pixels, (7, 9, 39, 41), 32)
    assert torch.equal(copy, pixels[:, 9:41, 7:39])
    copy.zero_()
    assert pixels.max() > 0


def test_edges_between_pixels_are_kept_to() -> None:
    """The mean distance to Pillow's exact box is far below the one to the box on whole pixels."""
    picture = photograph(300, 300, 2)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    rng = random.Random(0)
    near, rounded = [], []
    for _ in range(40):
        left, top, side = rng.uniform(40, 60), rng.uniform(40, 60), rng.uniform(120, 180)
        box = (left, top, left + side, top + side)
        exact = by_pillow(picture, box, 64)
        near.append(psnr(resize_crop(pixels, box, 64), exact))
        rounded.append(psnr(by_pillow(picture, whole_box(box, 300, 300), 64), exact))
    assert np.mean(near) > np.mean(rounded) + 8 and np.mean(near) >= 44


def test_boxes_beyond_the_picture_are_brought_inside() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    assert whole_box((-5.0, 1.2, 99.0, 1.4), 4, 3) == (0, 1, 4, 2)
    assert whole_box((9.0, 9.0, 12.0, 12.0), 4, 3) == (3, 2, 4, 3)
    for box in ((-5.0, 1.2, 99.0, 1.4), (9.0, 9.0, 12.0, 12.0), (2.0, 1.0, 2.0, 1.0), (3.0, 2.0, 1.0, 0.0)):
        assert resize_crop(pixels, box, 2).shape == (1, 2, 2)
    assert torch.equal(resize_crop(pixels, (3.6, 2.6, 4.0, 3.0), 2), torch.full((1, 2, 2), 11, dtype=torch.uint8))
