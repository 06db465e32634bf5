# SPDX-License-Identifier: Apache-2.0
"""Every kind of file becomes the right pixels or a reason, without hanging, and the fast way equals the slow way."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image, ImageOps

from fastmim.data.augment import Box, centre_box, random_box
from fastmim.data.decoding.decode import facts, open_image
from fastmim.data.decoding.stored import REDUCED_MARGIN
from fastmim.data.read import BadImage, read_file

HEIGHT, WIDTH = 60, 80
RGB = draw(1, 80)[:HEIGHT]
GREY = RGB[..., 0]
DEEP = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
FINE = np.linspace(-3.0, 7.0, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)


def read_image(path: str) -> np.ndarray:
    return open_image(read_file(path)).whole().permute(1, 2, 0).numpy()


def read_crop(path: str, box_of: Callable[[int, int], Box], size: int) -> np.ndarray:
    image = open_image(read_file(path))
    return image.crop(box_of(image.width, image.height), size).permute(1, 2, 0).numpy()


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


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


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


def raw(content: bytes, channels: int) -> np.ndarray:
    pixels = open_image(content, channels, raw=True).whole()
    assert pixels.dtype == torch.float32
    return pixels.permute(1, 2, 0).numpy()


def test_raw_values_are_the_stored_ones() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert np.array_equal(raw(png(7, 9, 16, 2, rows), 3), deep)
    assert np.array_equal(raw(encode(IMAGE, "PNG"), 3), RGB)
    for name, values in (("PNG", DEEP), ("TIFF", DEEP), ("TIFF", DEEP.astype(np.int32) * 99 - 7), ("TIFF", FINE)):
        assert np.array_equal(raw(encode(Image.fromarray(values), name), 1)[..., 0], values.astype(np.float32))
    assert np.array_equal(raw(encode(Image.fromarray(DEEP), "PNG"), 3), np.repeat(DEEP[..., None], 3, axis=2))
    jpeg = encode(IMAGE, "JPEG", quality=95)
    assert np.array_equal(raw(jpeg, 3), open_image(jpeg).whole().permute(1, 2, 0).numpy())


def test_holes_of_raw_floats_become_the_smallest_value() -> None:
    values = FINE.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels = raw(encode(Image.fromarray(values), "TIFF"), 1)[..., 0]
    assert np.all(pixels[0, :3] == values[0, 3]) and np.array_equal(pixels[1:], values[1:])
    with pytest.raises(BadImage, match="no finite values"):
        raw(encode(Image.fromarray(np.full((4, 4), np.inf, np.float32)), "TIFF"), 1)


def test_unsigned_values_beyond_the_signed_ones_stay_large() -> None:
    values = np.linspace(0, 2**32 - 2**9, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint32)
    content = encode(Image.fromarray(values.view(np.int32)), "TIFF")
    at = content.index(struct.pack("<HHI", 339, 3, 1)) + 8
    content = content[:at] + b"\1" + content[at + 1 :]  # the sample format: unsigned
    assert np.array_equal(raw(content, 1)[..., 0], values.astype(np.float32))
    assert psnr(open_image(content).whole().permute(1, 2, 0).numpy(), as_grey(DEEP / 257)) >= 50


LUMA = np.rint(RGB @ np.array([0.299, 0.587, 0.114]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "palette"])
def test_one_channel_is_the_luma(kind: str) -> None:
    image = Image.fromarray(RGB)
    lossy = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encode(image.quantize(256), "PNG") if kind == "palette" else encode(image, kind, **lossy)
    pixels = open_image(content, channels=1).whole()
    assert len(pixels) == 1 and psnr(pixels[0].numpy(), LUMA) >= (LOSSY if kind in ("JPEG", "palette") else 50)
    assert open_image(content, channels=1).crop(Box(0, 0, 40, 40), 20).shape == (1, 20, 20)


def test_other_numbers_of_channels_must_be_the_files_own() -> None:
    both = encode(Image.merge("RGBA", [*IMAGE.split(), ALPHA]), "PNG")
    assert np.array_equal(open_image(both, 4).whole()[3].numpy(), np.asarray(ALPHA))
    grey = encode(Image.merge("LA", [Image.fromarray(GREY), ALPHA]), "PNG")
    assert np.array_equal(open_image(grey, 2).whole().numpy(), np.stack([GREY, np.asarray(ALPHA)]))
    for content, channels, reason in (
        (both, 13, "has 4 channels, not 13"),
        (grey, 4, "has 2 channels, not 4"),
        (encode(IMAGE, "JPEG"), 2, "has 3 channels, not 2"),
        (encode(IMAGE.convert("CMYK"), "JPEG"), 5, "has 4 channels, not 5"),
        (encode(Image.fromarray(DEEP), "PNG"), 4, "has 1 channel, not 4"),
        (png(1, 1, 16, 6, b"\0" * 9), 4, "16-bit values; read them with --values raw"),
    ):
        with pytest.raises(BadImage) as bad:
            open_image(content, channels)
        assert bad.value.reason == reason


FACTS = {
    "baseline": ("jpeg", 3, "uint8", 1),
    "grey": ("jpeg", 1, "uint8", 1),
    "cmyk": ("jpeg", 4, "uint8", 1),
    "png": ("png", 3, "uint8", 1),
    "16 bit grey": ("png", 1, "uint16", 1),
    "rgb with alpha": ("png", 4, "uint8", 1),
    "palette": ("png", 3, "uint8", 1),
    "one bit": ("png", 1, "uint8", 1),
    "animated png": ("png", 3, "uint8", 2),
    "animated webp": ("webp", 4, "uint8", 2),
    "animated gif": ("gif", 3, "uint8", 2),
    "tiff of pages": ("tiff", 3, "uint8", 2),
    "float": ("tiff", 1, "float32", 1),
    "32 bit": ("tiff", 1, "int32", 1),
    "16 bit big endian tiff": ("tiff", 1, "uint16", 1),
    "avif": ("avif", 3, "uint8", 1),
    "bmp": ("bmp", 3, "uint8", 1),
}


@pytest.mark.parametrize("kind", FACTS)
def test_facts_come_from_the_header(kind: str, tmp_path: Path) -> None:
    name, image, options, _, _ = KINDS[kind]
    image.save(tmp_path / name, **options)
    found = facts((tmp_path / name).read_bytes())
    assert (found.format, found.channels, found.dtype, found.frames) == FACTS[kind]
    assert (found.width, found.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_facts_are_of_the_upright_picture(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = facts(encode(IMAGE, format, exif=exif))
    assert (found.width, found.height) == (HEIGHT, WIDTH)


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
    image = open_image(read_file(str(path)))
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    assert psnr(image.whole().permute(1, 2, 0).numpy(), RGB) >= LOSSY
    box = Box(3, 7, 43, 47)
    assert psnr(read_crop(str(path), lambda w, h: box, 40), RGB[7:47, 3:43]) >= LOSSY


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_when_a_jpeg_is_decoded_at_reduced_size(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(draw(3, 1000)[:701, :903])  # odd, so that the reduced size is rounded
    exif = Image.Exif()
    exif[0x0112] = orientation
    store(upright, orientation).save(tmp_path / "a.jpg", quality=95, exif=exif)
    for box in (Box(0, 0, 701, 701), Box(503, 101, 903, 701), Box(11, 301, 511, 700)):
        assert min(box.right - box.left, box.bottom - box.top) >= 2 * REDUCED_MARGIN * 32
        fast = read_crop(str(tmp_path / "a.jpg"), lambda w, h, box=box: box, 32)
        slow = upright.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        assert psnr(fast, np.asarray(slow)) >= 40


def test_broken_exif_says_nothing_against_the_pixels(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12\x01" * 9)
    assert psnr(read_image(str(tmp_path / "a.jpg")), RGB) >= LOSSY


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


def webp_header(width: int, height: int) -> bytes:
    """The header of a WebP whose canvas is of that size."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunks = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(chunks) + 40) + chunks + b"ANIM" + struct.pack("<I", 6) + b"\0" * 34


def large_headers() -> dict[str, bytes]:
    """Small files that claim many pixels, or hold far more text than they look."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 200_000_000, 9))
    whole = png(4, 4, 8, 0, b"\0" * 20)
    jpeg = encode(Image.fromarray(RGB), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    tiff = bytearray(encode(Image.fromarray(GREY), "TIFF"))
    for tag in (256, 257):
        place = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff[place : place + 4] = struct.pack("<I", 60000)
    return {
        "png": png(15000, 15000, 8, 2, b""),
        "wide png": png(65500, 65500, 16, 6, b""),
        "text": whole[:33] + text + whole[33:],
        "jpeg": jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :],
        "webp": webp_header(16383, 16383),
        "bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
        + b"\0" * 99,
        "tiff": bytes(tiff),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65500, 65500, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    }


MEASURE = """
import resource, sys
import fastmim.data.decoding.decode as decode
from fastmim.data.read import BadImage
from PIL import Image
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect")
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in FORBIDDEN else None)
Image.init()
for name in sys.argv[1:]:
    content = open(name, "rb").read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode.open_image(content).whole()
        reason = "decoded"
    except BadImage as bad:
        reason = bad.reason
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(reason, grown, len(started), sep=";")
"""


def test_what_asks_for_much_gets_little_memory_and_no_process(tmp_path: Path) -> None:
    cases = large_headers() | {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"}
    wanted = dict.fromkeys(cases, "too many pixels") | {"text": "damaged", "eps": "not an image"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *cases], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path
    )
    for name, line in zip(cases, done.stdout.splitlines(), strict=True):
        reason, grown, started = line.split(";")
        assert (reason, started) == (wanted[name], "0"), name
        assert int(grown) <= 50, name


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
