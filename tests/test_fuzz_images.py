# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every format: only pixels or ``BadImage`` may come out; no crash, no hang, no great memory.

A short round is part of the tests. ``FASTMIM_FUZZ_SECONDS=300 pytest tests/test_fuzz_images.py`` runs a long one, with
another seed each time (or that of ``FASTMIM_FUZZ_SEED``). The work is done in a process of its own, which writes each
file down before it opens it, so that one that ends the process is found.
"""

import contextlib
import faulthandler
import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from fastmim.data.augment import centre_box
from fastmim.data.decoding.decode import facts, open_image
from fastmim.data.read import BadImage

SECONDS = float(os.environ.get("FASTMIM_FUZZ_SECONDS", "8"))
SLOW = 5.0
MORE_MEMORY = 1500  # MB over the start; a picture of 64 million pixels takes 200 to 800


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def seeds() -> dict[str, tuple[bytes, int]]:
    """Name -> a good file, and its number of channels."""
    colour = Image.fromarray(draw(2, 40))
    grey = colour.convert("L")
    deep = Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "jpeg": (encode(colour, "JPEG", exif=exif), 3),
        "420": (encode(colour, "JPEG", subsampling=2), 3),
        "progressive": (encode(colour, "JPEG", progressive=True), 3),
        "restarts": (encode(Image.fromarray(draw(2, 160)), "JPEG", restart_marker_rows=1), 3),
        "grey jpeg": (encode(grey, "JPEG"), 1),
        "cmyk": (encode(colour.convert("CMYK"), "JPEG"), 4),
        "png": (encode(colour, "PNG", exif=exif), 3),
        "palette": (encode(colour.quantize(16), "PNG"), 3),
        "deep png": (encode(deep, "PNG"), 1),
        "apng": (encode(colour, "PNG", save_all=True, append_images=[colour.rotate(90)]), 3),
        "webp": (encode(colour, "WEBP"), 3),
        "lossless": (encode(colour, "WEBP", lossless=True, exif=exif), 3),
        "animated webp": (encode(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)]), 3),
        "avif": (encode(colour, "AVIF"), 3),
        "bmp": (encode(colour, "BMP"), 3),
        "gif": (encode(grey, "GIF", save_all=True, append_images=[grey.rotate(90)]), 3),
        "float": (encode(Image.fromarray(np.float32(np.asarray(grey))), "TIFF"), 1),
        "deep tiff": (encode(deep, "TIFF", compression="tiff_adobe_deflate"), 1),
    }
    for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        found[name] = (encode(colour, "TIFF", compression=name), 3)
    return found | scenes() | slices()


def scenes() -> dict[str, tuple[bytes, int]]:
    try:
        from test_bands import geotiff
    except pytest.skip.Exception:
        return {}
    values = np.random.default_rng(0).integers(0, 256, (6, 70, 80)).astype(np.uint8) // 16
    smooth = {"blockxsize": 32, "blockysize": 32}
    return {
        f"scene {name}": (geotiff(values.astype(dtype), **(smooth | options)), 6)
        for name, dtype, options in (
            ("deflate", "uint8", {"compress": "deflate", "predictor": 2}),
            ("lzw", "uint16", {"compress": "lzw", "interleave": "band"}),
            ("zstd", "float32", {"compress": "zstd", "predictor": 3}),
            ("lerc", "float32", {"compress": "lerc"}),
            ("lzma", "uint16", {"compress": "lzma"}),
            ("raw", "int16", {"compress": "none", "bigtiff": "yes"}),
            ("overviews", "uint8", {"overviews": (2,)}),
            ("webp", "uint8", {"compress": "jpeg", "interleave": "band"}),
        )
    }


def slices() -> dict[str, tuple[bytes, int]]:
    try:
        from test_bands import dicom
    except pytest.skip.Exception:
        return {}
    values = (np.arange(1600).reshape(40, 40) * 2).astype(np.uint16)
    syntaxes = {"plain": None, "rle": "1.2.840.10008.1.2.5", "j2k": "1.2.840.10008.1.2.4.90"}
    found = {f"dicom {name}": (dicom(values, compress=uid, RescaleSlope="2"), 1) for name, uid in syntaxes.items()}
    # A JPEG inside, which no encoder of pydicom makes: the stream of RLE replaced by one of libjpeg.
    jpeg = encode(Image.fromarray((values // 16).astype(np.uint8)), "JPEG")
    return found | {"dicom jpeg": (wrapped(jpeg, values), 1)}


def wrapped(stream: bytes, values: np.ndarray) -> bytes:
    """A DICOM file around a JPEG of 8-bit grey."""
    import pydicom
    from pydicom.encaps import encapsulate
    from test_bands import dicom

    dataset = pydicom.dcmread(io.BytesIO(dicom((values // 16).astype(np.uint8))))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bits flipped, numbers replaced, parts cut, doubled, left out or taken from another file; headers above all."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        if not changed:
            break
        # Headers decide most, so half of the changes are there.
        at = rng.randrange(min(rng.choice((64, 400, 2**30)), len(changed)))
        length = rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(8)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32)))
            width = rng.choice("HI")
            packed = struct.pack(rng.choice("<>") + width, number & (0xFFFF if width == "H" else 0xFFFFFFFF))
            changed[at : at + len(packed)] = packed
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[at : at + length] = other[start : start + length]
        elif kind == 6:
            changed[at : at + length] = rng.randbytes(length)
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def use(content: bytes, channels: int, raw: bool) -> bool:
    """Whether it could be read in all ways that a run would read it."""
    with contextlib.suppress(BadImage):
        facts(content)
    try:
        image = open_image(content, channels, raw)
        crop = image.crop(centre_box(image.width, image.height), 8)
        assert crop.shape == (channels, 8, 8)
        whole = image.whole()
        assert whole.shape == (channels, image.height, image.width)
        return True
    except BadImage:
        return False


def fuzz(note: Path, seconds: float, seed: int) -> dict[str, list[int]]:
    """Counts of [tried, readable] by format."""
    files = seeds()
    contents = [content for content, _ in files.values()]
    rng = random.Random(seed)
    for name, (content, channels) in files.items():
        assert use(content, channels, raw=True), name
    counts = {name: [0, 0] for name in files}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, (content, own) in files.items():
            changed = mutate(content, contents, rng)
            note.write_bytes(changed)
            channels, raw = rng.choice((1, 3, own, own, own)), rng.random() < 0.6
            began = time.monotonic()
            faulthandler.dump_traceback_later(60, exit=True)  # also of what holds the interpreter's lock
            readable = use(changed, channels, raw)
            faulthandler.cancel_dump_traceback_later()
            counts[name][0] += 1
            counts[name][1] += readable
            assert time.monotonic() - began < SLOW, f"{name}: slow"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            assert grown < MORE_MEMORY, f"{name}: {grown} MB"
    return counts


@pytest.mark.timeout(int(SECONDS) + 300)
def test_damaged_files_end_well(tmp_path: Path) -> None:
    note = tmp_path / "last"
    seed = int(os.environ.get("FASTMIM_FUZZ_SEED", "0" if SECONDS < 60 else str(time.time_ns() % 2**32)))
    here = str(Path(__file__).parent)
    script = (
        f"import sys; sys.path.insert(0, {here!r}); import test_fuzz_images as t; from pathlib import Path; "
        f"print(t.fuzz(Path({str(note)!r}), {SECONDS}, {seed}))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        capture_output=True,
        text=True,
        timeout=SECONDS + 200,
        check=False,
    )
    if done.returncode:
        kept = Path(os.environ.get("FASTMIM_FUZZ_KEEP", tmp_path)) / f"finding-{seed}"
        kept.write_bytes(note.read_bytes())
        pytest.fail(f"seed {seed}: exit code {done.returncode}; the file is {kept}\n{done.stderr[-3000:]}")
    print(done.stdout)


def far_offset() -> tuple[bytes, int]:
    """A large TIFF whose page begins where no file ends: an OverflowError once."""
    return b"II+\0\x08\0\0\0" + b"\xff" * 8 + b"\0" * 64, 3


def wide_float() -> tuple[bytes, int]:
    """A header of 62 million floats over none at all: 1.5 GB once."""
    content = bytearray(encode(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF"))
    for tag in (256, 257):
        at = content.index(struct.pack("<HHI", tag, 4, 1)) + 8
        content[at : at + 4] = struct.pack("<I", 7900)
    return bytes(content), 1


def page_in_a_circle() -> tuple[bytes, int]:
    """A page that is followed by itself."""
    content = bytearray(encode(Image.fromarray(draw(2, 40)), "TIFF"))
    first = struct.unpack_from("<I", content, 4)[0]
    after = first + 2 + 12 * struct.unpack_from("<H", content, first)[0]
    content[after : after + 4] = struct.pack("<I", first)
    return bytes(content), 3


def tall_float() -> tuple[bytes, int]:
    """A header of many short rows over none at all: 4 s once."""
    content = bytearray(encode(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF"))
    at = content.index(struct.pack("<HHI", 257, 4, 1)) + 8
    content[at : at + 4] = struct.pack("<I", 1_000_000)
    return bytes(content), 1


REGRESSIONS = {"tall float": tall_float, "far offset": far_offset, "wide float": wide_float, "circle": page_in_a_circle}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_found_stays_mended(name: str) -> None:
    content, channels = REGRESSIONS[name]()
    began = time.monotonic()
    for raw in (False, True):
        use(content, channels, raw)
    assert time.monotonic() - began < SLOW
