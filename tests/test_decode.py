# SPDX-License-Identifier: Apache-2.0
"""Every kind of file becomes the right pixels or a reason, without hanging, and the fast way equals the slow way."""

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image, ImageOps

from fastmim.data.augment import Box, centre_box, random_box
from fastmim.data.decode import DRAFT_MARGIN, BadImage, open_image, read_crop, read_image

HEIGHT, WIDTH = 60, 80
RGB = draw(1, 80)[:HEIGHT]
GREY = RGB[..., 0]
DEEP = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
FINE = np.linspace(-3.0, 7.0, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def as_grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values).astype(np.uint8)[..., None], 3, axis=2)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def transparent_palette() -> Image.Image:
    image = Image.fromarray(RGB).quantize(64)
    image.info["transparency"] = bytes(range(0, 256, 4))
    return image


IMAGE = Image.fromarray(RGB)
ALPHA = Image.fromarray(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
LOSSY = 30.0  # dB; a wrong channel order, inversion or scale is below 20
KINDS: dict[str, tuple[str, Image.Image, dict, np.ndarray, float]] = {
    "baseline": ("a.jpg", IMAGE, {"quality": 95}, RGB, LOSSY),
    "progressive": ("a.jpg", IMAGE, {"quality": 95, "progressive": True}, RGB, LOSSY),
    "cmyk": ("a.jpg", IMAGE.convert("CMYK"), {"quality": 95}, RGB, LOSSY),
    "grey": ("a.jpg", Image.fromarray(GREY), {"quality": 95}, as_grey(GREY), LOSSY),
    "two pictures": ("a.mpo", IMAGE, {"quality": 95, "save_all": True, "append_images": [IMAGE]}, RGB, LOSSY),
    "png": ("a.png", IMAGE, {}, RGB, np.inf),
    "one bit": ("a.png", Image.fromarray(GREY > 128), {}, as_grey((GREY > 128) * 255), np.inf),
    "palette": ("a.png", IMAGE.quantize(64), {}, np.array(IMAGE.quantize(64).convert("RGB")), np.inf),
    "palette with transparency": (
        "a.png",
        transparent_palette(),
        {},
        np.array(IMAGE.quantize(64).convert("RGB")),
        np.inf,
    ),
    "grey with alpha": ("a.png", Image.merge("LA", [Image.fromarray(GREY), ALPHA]), {}, as_grey(GREY), np.inf),
    "rgb with alpha": ("a.png", Image.merge("RGBA", [*IMAGE.split(), ALPHA]), {}, RGB, np.inf),
    "16 bit grey": ("a.png", Image.fromarray(DEEP), {}, as_grey(DEEP / 257), np.inf),
    "16 bit grey tiff": ("a.tif", Image.fromarray(DEEP), {}, as_grey(DEEP / 257), np.inf),
    "16 bit big endian tiff": ("a.tif", Image.fromarray(DEEP.astype(">u2")), {}, as_grey(DEEP / 257), np.inf),
    "32 bit within 16": ("a.tif", Image.fromarray(DEEP.astype(np.int32)), {}, as_grey(DEEP / 257), np.inf),
    "32 bit": ("a.tif", Image.fromarray(DEEP.astype(np.int32) * 999 - 7), {}, as_grey(DEEP / 257), 50.0),
    "float": ("a.tif", Image.fromarray(FINE), {}, as_grey((FINE + 3) * 25.5), 50.0),
    "webp": ("a.webp", IMAGE, {"lossless": True}, RGB, np.inf),
    "animated webp": (
        "a.webp",
        IMAGE,
        {"lossless": True, "save_all": True, "append_images": [IMAGE.rotate(180)]},
        RGB,
        np.inf,
    ),
    "bmp": ("a.bmp", IMAGE, {}, RGB, np.inf),
    "tiff": ("a.tiff", IMAGE, {"compression": "tiff_lzw"}, RGB, np.inf),
    "tiff of pages": ("a.tiff", IMAGE, {"save_all": True, "append_images": [IMAGE.rotate(180)]}, RGB, np.inf),
    "lab tiff": ("a.tiff", IMAGE.convert("LAB"), {}, RGB, LOSSY),
    "animated gif": (
        "a.gif",
        Image.fromarray(GREY),
        {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]},
        as_grey(GREY),
        np.inf,
    ),
    "animated png": ("a.png", IMAGE, {"save_all": True, "append_images": [IMAGE.rotate(180)]}, RGB, np.inf),
    "avif": ("a.avif", IMAGE, {"quality": 95}, RGB, LOSSY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_the_right_pixels(kind: str, tmp_path: Path) -> None:
    name, image, options, expected, least = KINDS[kind]
    path = tmp_path / name
    image.save(path, **options)
    pixels = read_image(str(path))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    assert psnr(pixels, expected) >= least
    assert psnr(read_crop(str(path), centre_box, 60), pixels[:, 10:70]) >= 40


def test_sixteen_bit_colour_keeps_its_brightness(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(7, 9, 16, 2, rows))
    assert np.abs(read_image(str(tmp_path / "a.png")) - values / 257).max() <= 1


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(str(tmp_path / "a.jpg")), RGB)


def test_float_picture_with_holes(tmp_path: Path) -> None:
    values = FINE.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = read_image(str(tmp_path / "a.tif"))
    assert np.all(pixels[0, :3] == 0) and pixels.max() == 255 and np.unique(pixels).size > 200


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_shapes(width: int, height: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(str(tmp_path / "a.png")), pixels)
    rng = random.Random(0)
    for _ in range(20):
        crop = read_crop(str(tmp_path / "a.png"), lambda w, h: random_box(w, h, rng, (0.2, 1.0)), 16)
        assert crop.shape == (16, 16, 3)


def store(upright: Image.Image, orientation: int) -> Image.Image:
    """What a camera held in that way would have stored, found by trying: exif_transpose must undo it."""
    for method in (None, *Image.Transpose):
        stored = upright if method is None else upright.transpose(method)
        stored.getexif()[0x0112] = orientation
        if np.array_equal(np.asarray(ImageOps.exif_transpose(stored)), np.asarray(upright)):
            return upright if method is None else upright.transpose(method)
    raise AssertionError(orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_orientation_makes_pictures_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "avif": {"quality": 95}, "webp": {"lossless": True}}
    store(IMAGE, orientation).save(path, exif=exif, **options.get(suffix, {}))
    image = open_image(str(path))
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    assert psnr(image.whole(), RGB) >= LOSSY
    box = Box(3, 7, 43, 47)
    assert psnr(read_crop(str(path), lambda w, h: box, 40), RGB[7:47, 3:43]) >= LOSSY


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_when_a_jpeg_is_decoded_at_reduced_size(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(draw(3, 1000)[:701, :903])  # odd, so that the reduced size is rounded
    exif = Image.Exif()
    exif[0x0112] = orientation
    store(upright, orientation).save(tmp_path / "a.jpg", quality=95, exif=exif)
    for box in (Box(0, 0, 701, 701), Box(503, 101, 903, 701), Box(11, 301, 511, 700)):
        assert min(box.right - box.left, box.bottom - box.top) >= 2 * DRAFT_MARGIN * 32
        fast = read_crop(str(tmp_path / "a.jpg"), lambda w, h, box=box: box, 32)
        slow = upright.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        assert psnr(fast, np.asarray(slow)) >= 40


def test_broken_exif_says_nothing_against_the_pixels(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12\x01" * 9)
    assert psnr(read_image(str(tmp_path / "a.jpg")), RGB) >= LOSSY


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_crop_equals_full_decode(mode: str, tmp_path: Path) -> None:
    """Detail as in a photograph (spectrum 1/f): at least 40 dB for every crop; one pixel of shift is below 30 dB."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(900), np.fft.fftfreq(700)))
    frequency[0, 0] = 1
    light, *colour = np.fft.ifft2(np.fft.fft2(rng.normal(size=(4, 700, 900))) / frequency).real
    noise = np.stack([light + 0.3 * part for part in colour], axis=-1)
    picture = (128 + 50 * noise / noise.std()).clip(0, 255).astype(np.uint8)
    path = str(tmp_path / "a.jpg")
    Image.fromarray(picture).convert(mode).save(path, quality=92)
    full = Image.open(path).convert("RGB")
    draws = random.Random(0)
    reduced = 0
    shifted_was_seen = False
    for size in (32, 96, 128):
        for _ in range(12):
            box = random_box(900, 700, draws, (0.05, 1.0))
            fast = read_crop(path, lambda w, h, box=box: box, size)
            slow = np.asarray(full.crop(box).resize((size, size), Image.Resampling.BICUBIC))
            shifted = np.asarray(full.crop([edge + 1 for edge in box]).resize((size, size), Image.Resampling.BICUBIC))
            assert psnr(fast, slow) >= 40
            shifted_was_seen = shifted_was_seen or psnr(shifted, slow) < 35
            reduced += min(box.right - box.left, box.bottom - box.top) >= 2 * DRAFT_MARGIN * size
    assert shifted_was_seen and 10 < reduced < 36


def bad_files(folder: Path) -> dict[str, str]:
    """Name -> reason, for files that cannot be used."""
    Image.fromarray(draw(5, 256)).save(folder / "whole.jpg", quality=90)
    whole = (folder / "whole.jpg").read_bytes()
    start = whole.index(b"\xff\xda")
    for place, share in enumerate((0.05, 0.25, 0.5, 0.75, 0.95)):
        (folder / f"cut{place}.jpg").write_bytes(whole[: start + 20 + int(share * (len(whole) - start - 20))])
    (folder / "header.jpg").write_bytes(whole[:start])
    IMAGE.save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "broken.png").write_bytes(content[:600] + b"\xff" * 16 + content[616:])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a picture\n" * 50)
    (folder / "noise.png").write_bytes(random.Random(0).randbytes(4096))
    (folder / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    (folder / "bomb.png").write_bytes(png(65500, 65500, 8, 2, b""))
    (folder / "large.png").write_bytes(png(9500, 9500, 8, 2, b""))  # Pillow itself would only warn
    (folder / "long.png").write_bytes(png(70000, 1, 8, 2, b""))
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "nan.tif")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    with (folder / "sparse.tif").open("wb") as file:
        file.truncate(300 * 2**20)
    (folder / "broken.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 600)
    return {
        **{f"cut{place}.jpg": "truncated" for place in range(5)},
        "header.jpg": "damaged",
        "cut.png": "truncated",
        "broken.png": "damaged",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "noise.png": "not an image",
        "eps.jpg": "not an image",
        "bomb.png": "too many pixels",
        "large.png": "too many pixels",
        "long.png": "too many pixels",
        "nan.tif": "no finite values",
        "folder.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "missing",
        "circle.jpg": "unreadable",
        "sparse.tif": "too many bytes",
        "broken.tif": "not an image",
    }


@pytest.mark.timeout(20)
def test_bad_files_have_a_reason(tmp_path: Path) -> None:
    expected = bad_files(tmp_path)
    reasons = {}
    for name in expected:
        with pytest.raises(BadImage) as of_crop:
            read_crop(str(tmp_path / name), centre_box, 16)
        with pytest.raises(BadImage) as of_whole:
            read_image(str(tmp_path / name))
        assert of_crop.value.reason == of_whole.value.reason
        reasons[name] = of_crop.value.reason
    assert reasons == expected


def test_any_damage_is_a_picture_or_a_bad_image(tmp_path: Path) -> None:
    """600 files with random bytes changed: whatever Pillow makes of them, only BadImage comes out."""
    rng = random.Random(0)
    path = tmp_path / "mutant"
    bad = 0
    for suffix, options in (("jpg", {}), ("png", {}), ("webp", {}), ("bmp", {}), ("tif", {}), ("gif", {})):
        Image.fromarray(draw(2, 24)).save(tmp_path / f"seed.{suffix}", **options)
        seed = (tmp_path / f"seed.{suffix}").read_bytes()
        for _ in range(100):
            content = bytearray(seed)
            for _ in range(rng.randrange(1, 12)):
                # Headers decide most, so half of the changes are there.
                content[rng.randrange(rng.choice((64, len(content))))] = rng.randrange(256)
            path.write_bytes(content)
            try:
                assert read_crop(str(path), centre_box, 8).shape == (8, 8, 3)
            except BadImage:
                bad += 1
    assert 100 < bad < 600


def test_random_boxes_follow_the_law() -> None:
    rng = random.Random(0)
    boxes = [random_box(400, 300, rng, (0.2, 1.0)) for _ in range(4000)]
    widths = np.array([box.right - box.left for box in boxes])
    heights = np.array([box.bottom - box.top for box in boxes])
    shares, ratios = widths * heights / 120_000, widths / heights
    assert all(0 <= b.left < b.right <= 400 and 0 <= b.top < b.bottom <= 300 for b in boxes)
    assert shares.min() > 0.19 and shares.max() <= 1
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    small = shares[shares < 0.5]  # these always fit, so the law is not bent by what does not
    assert abs(small.mean() - 0.35) < 0.01
    narrow = [box.left for box in boxes if box.right - box.left < 210]
    assert min(narrow) < 10 and max(narrow) > 190 and abs(np.mean(narrow) - 105) < 10


def test_boxes_of_shapes_that_never_fit() -> None:
    rng = random.Random(0)
    assert random_box(1, 5000, rng, (0.2, 1.0)) == Box(0, 2499, 1, 2500)
    assert random_box(5000, 3, rng, (0.9, 1.0)) == Box(2498, 0, 2502, 3)
    assert random_box(1, 1, rng, (0.2, 1.0)) == Box(0, 0, 1, 1)
    assert centre_box(10, 4) == Box(3, 0, 7, 4)
