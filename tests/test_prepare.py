# SPDX-License-Identifier: Apache-2.0
"""Prepared sets: the same bytes however they are made, readable by others, and every damage told in one line."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import simplejpeg
import torch
from conftest import draw
from PIL import Image

import fastmim
from fastmim.cli import main
from fastmim.data.augment import Box
from fastmim.data.decoding.decode import open_image
from fastmim.data.prepared import pool as prepare_pool
from fastmim.data.prepared import writer as shard_writer
from fastmim.data.prepared.plan import Options, parse_part, plan_of
from fastmim.data.prepared.prepare import merge, prepare, prepare_images
from fastmim.data.prepared.records import MANIFEST, FileSum
from fastmim.data.prepared.shards import (
    decode_square,
    decode_square_into,
    is_prepared,
    load_manifest,
    load_prepared,
    load_sums,
    npy_header,
)
from fastmim.data.read import BadImage
from fastmim.data.table import ImageTable, Squares, from_names, join
from fastmim.errors import UserError

ROOT = Path(fastmim.__file__).parents[1]
SMALL = Options(size=32, shard_images=8)


def table_of(folder: Path) -> ImageTable:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return from_names(str(folder), names, [(folder / name).stat().st_size for name in names])


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_index(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 40 images in five shards."""
    out = tmp_path_factory.mktemp("made") / "set"
    prepare(table_of(photos), out, SMALL, workers=0, quiet=True)
    return out


# ---- The same bytes


def test_any_number_of_workers_makes_the_same_bytes(photos: Path, made: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        done = prepare(table_of(photos), tmp_path / str(workers), SMALL, workers=workers, quiet=True)
        assert (done.images, done.bad, done.shards, done.complete) == (40, 0, 5, True)
        assert content_of(tmp_path / str(workers)) == content_of(made)


def test_parts_and_merge_make_the_same_bytes(photos: Path, made: Path, tmp_path: Path) -> None:
    first = prepare(table_of(photos), tmp_path, SMALL, part=(1, 2), workers=0, quiet=True)
    assert (first.shards, first.images, first.complete) == (3, 24, False)
    with pytest.raises(UserError, match=r"^2 of 5 shards in .* are not there or not whole: 1, 3;"):
        merge(tmp_path)
    with pytest.raises(UserError, match=r"not finished; run the same fastmim prepare again"):
        load_prepared(str(tmp_path))
    prepare(table_of(photos), tmp_path, SMALL, part=(2, 2), workers=0, quiet=True)
    merge(tmp_path)
    assert content_of(tmp_path) == content_of(made)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures that take some 20 ms each."""
    folder = tmp_path_factory.mktemp("slow")
    content = io.BytesIO()
    Image.fromarray(np.kron(draw(0), np.ones((24, 24, 1), np.uint8))).save(content, "JPEG")
    for index in range(60):
        (folder / f"{index}.jpg").write_bytes(content.getvalue())
    return folder


def start(data: Path, out: Path) -> subprocess.Popen[str]:
    words = ["prepare", str(data), "--out", str(out), "--size", "64", "--shard-images", "6", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastmim", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for_a_shard(process: subprocess.Popen[str], out: Path) -> list[psutil.Process]:
    """Waits until one shard is whole; the workers."""
    until = time.monotonic() + 60
    while not list(out.glob("shard-*.json")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.002)
    return psutil.Process(process.pid).children()


@pytest.fixture(scope="module")
def whole(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes of ``slow``."""
    out = tmp_path_factory.mktemp("whole") / "set"
    prepare_images([str(slow)], out, size=64, shard_images=6, workers=0, quiet=True)
    return content_of(out)


def test_a_killed_run_goes_on_to_the_same_bytes(slow: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = start(slow, out)
    workers = wait_for_a_shard(process, out)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert done and not (out / "prepared.json").exists()
    summary = prepare_images([str(slow)], out, size=64, shard_images=6, workers=0, quiet=True)
    assert summary.made == 60 - 6 * len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished shards were made again"
    assert content_of(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_line(slow: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "set"
    process = start(slow, out)
    workers = wait_for_a_shard(process, out)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    whole = len(list(out.glob("shard-*.json")))
    assert error.splitlines()[-1] == (
        f"fastmim: interrupted; {whole} of 10 shards are whole; to go on, run the same command again"
    )
    assert not any(worker.is_running() for worker in workers)
    assert not list(out.glob("*.tmp"))


def test_a_complete_set_is_left_as_it_is(photos: Path, made: Path) -> None:
    before = content_of(made)
    done = prepare(table_of(photos), made, SMALL, workers=0, quiet=True)
    assert (done.made, done.complete) == (0, True)
    assert content_of(made) == before


def test_a_lost_or_shortened_shard_is_made_again(photos: Path, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "set")
    (out / "shard-00001.npz").unlink()
    os.truncate(out / "shard-00003.tar", 1000)
    (out / "shard-00004.json").write_text("{")
    (out / "shard-00003.tar.tmp").write_bytes(bytes(10**6))  # of a killed process
    assert prepare(table_of(photos), out, SMALL, workers=0, quiet=True).made == 24
    assert content_of(out) == content_of(made)


# ---- What is stored


def test_tar_and_webdataset_read_it(photos: Path, made: Path) -> None:
    rows = []
    for number in range(5):
        index = load_index(made / f"shard-{number:05d}.npz")
        with tarfile.open(made / f"shard-{number:05d}.tar") as tar:
            members = tar.getmembers()
            assert {(one.mtime, one.uid, one.gid, one.uname, one.mode) for one in members} == {(0, 0, 0, "", 0o644)}
            for place, (picture, note) in enumerate(zip(members[::2], members[1::2], strict=True)):
                # webdataset: the key is what stands before the first dot, and members of a key follow each other.
                assert picture.name.partition(".")[0] == note.name.partition(".")[0] == f"{index['key'][place]:09d}"
                assert (picture.offset_data, picture.size) == (index["offset"][place], index["size"][place])
                content = tar.extractfile(picture).read()
                rows.append((json.loads(tar.extractfile(note).read()), content))
    names = sorted(path.name for path in photos.iterdir())
    assert [note["name"] for note, _ in rows] == [name for shard in range(5) for name in names[shard::5]]
    assert all((note["width"], note["height"]) == (48, 48) for note, _ in rows)
    assert Image.open(io.BytesIO(rows[0][1])).size == (32, 32)


def test_squares_equal_the_decoded_images(photos: Path, made: Path) -> None:
    source, table = table_of(photos), load_prepared(str(made))
    assert len(table) == 40 and table.squares == Squares(32, 3, "uint8") and table.formats == {"jpeg": 40}
    assert table.source == json.loads((made / "prepared.json").read_text())["digest"]
    for row in (0, 17, 39):
        assert table.name(row) == source.name(row)
        assert table.path(row).endswith(f"shard-{row // 8:05d}.tar::{source.name(row)}")
        wanted = open_image(source.read(row)).crop(Box(0, 0, 48, 48), 32)
        pixels = decode_square(table.read(row), table.squares)
        assert (pixels.float() - wanted.float()).abs().mean() < 6


@pytest.mark.parametrize(("quality", "subsampling"), [(94, "420"), (95, "444")])
def test_quality_decides_subsampling(photos: Path, tmp_path: Path, quality: int, subsampling: str) -> None:
    prepare(table_of(photos), tmp_path, Options(size=32, quality=quality), workers=0, quiet=True)
    content = load_prepared(str(tmp_path)).read(0)
    assert simplejpeg.decode_jpeg_header(content) == (32, 32, "YCbCr", subsampling)
    wanted = io.BytesIO()
    Image.fromarray(draw(0, 32)).save(wanted, "JPEG", quality=quality)
    quantization = Image.open(io.BytesIO(content)).quantization
    assert quantization == Image.open(wanted).quantization


def test_one_channel_is_stored_as_grey(photos: Path, tmp_path: Path) -> None:
    prepare(table_of(photos), tmp_path, Options(size=32, channels=1), workers=0, quiet=True)
    table = load_prepared(str(tmp_path))
    assert table.squares is not None and simplejpeg.decode_jpeg_header(table.read(0))[2] == "Gray"
    assert decode_square(table.read(0), table.squares).shape == (1, 32, 32)


def test_thirteen_channels_of_floats_come_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 1e4, (13, 20, 20)).astype(np.float32)
    squares = Squares(20, 13, "float32")
    plan = plan_of(from_names("x", ["a"], [1]), Options(size=20, channels=13, values="raw"))
    assert (plan.stored, plan.dtype, plan.quality) == ("npy", "float32", None)
    content = shard_writer.encode(torch.from_numpy(values), plan)
    np.testing.assert_array_equal(np.load(io.BytesIO(content), allow_pickle=False), values.transpose(1, 2, 0))
    assert (len(content) - values.nbytes) % 64 == 0
    np.testing.assert_array_equal(decode_square(content, squares).numpy(), values)


def test_raw_values_are_stored_as_they_are(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    values = np.random.default_rng(1).integers(0, 2**16, (16, 16), dtype=np.uint16)
    Image.fromarray(values).save(data / "deep.png")
    prepare(table_of(data), tmp_path / "set", Options(size=16, channels=1, values="raw"), workers=0, quiet=True)
    table = load_prepared(str(tmp_path / "set"))
    assert table.squares == Squares(16, 1, "float32") and table.formats == {"npy": 1}
    np.testing.assert_array_equal(decode_square(table.read(0), table.squares)[0].numpy(), values.astype(np.float32))
    # Values lie at multiples of 64 in the tar, so that they can be mapped.
    assert (table.offset[0] + len(npy_header(table.squares))) % 64 == 0


def test_true_sizes_are_upright_and_small_pictures_grow(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(draw(0)[:20]).save(data / "turned.jpg", exif=turned)
    Image.fromarray(draw(1)[:, :10]).save(data / "narrow.png")
    prepare(table_of(data), tmp_path / "set", Options(size=64), workers=0, quiet=True)
    table = load_prepared(str(tmp_path / "set"))
    assert table.true_size is not None and table.squares is not None
    assert table.true_size.tolist() == [[10, 48], [20, 48]]  # narrow, turned
    assert decode_square(table.read(0), table.squares).shape == (3, 64, 64)


def test_any_name_survives(tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = [
        b"new\nline.jpg",
        b"not-utf8-\xff\xfe.jpg",
        "\U0001f600 ü.jpg".encode(),
        b'comma, "quote".jpg',
        b"a.b.c.jpg",
    ]
    picture = io.BytesIO()
    Image.fromarray(draw(3)).save(picture, "JPEG")
    (data / "class").mkdir(parents=True)
    for name in names:
        (data / "class" / os.fsdecode(name)).write_bytes(picture.getvalue())
    (data / os.fsdecode(b"bad\n\xff.jpg")).write_bytes(b"no image")
    prepare(table_of(data), tmp_path / "set", SMALL, workers=1, max_bad=0.5, quiet=True)
    table = load_prepared(str(tmp_path / "set"))
    assert {os.fsencode(table.name(row)) for row in range(5)} == {b"class/" + name for name in names}
    with tarfile.open(tmp_path / "set" / "shard-00000.tar") as tar:
        notes = [json.loads(tar.extractfile(one).read()) for one in tar.getmembers()[1::2]]
    assert [note["name"] for note in notes] == [table.name(row) for row in range(5)]
    listed = (tmp_path / "set" / "bad_images.csv").read_bytes()
    assert b"bad\n\xff.jpg" in listed and listed.startswith(b"path,reason\r\n")


def test_images_may_come_from_several_containers(photos: Path, tmp_path: Path) -> None:
    other = shutil.copytree(photos, tmp_path / "other")
    table = join([table_of(photos), table_of(other)])
    assert prepare(table, tmp_path / "set", SMALL, workers=0, quiet=True).images == 80


# ---- Bad images


def test_bad_images_are_left_out_and_listed(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "005.jpg").write_bytes((data / "005.jpg").read_bytes()[:500])
    (data / "020.jpg").write_bytes(b"")
    done = prepare(table_of(data), tmp_path / "one", SMALL, workers=0, quiet=True)
    assert (done.images, done.bad) == (38, 2)
    table = load_prepared(str(tmp_path / "one"))
    assert len(table) == 38 and table.name(5) == "006.jpg"
    assert load_index(tmp_path / "one" / "shard-00000.npz")["key"].tolist() == [0, 10, 15, 25, 30, 35]
    rows = (tmp_path / "one" / "bad_images.csv").read_text().splitlines()
    assert rows == ["path,reason", f"{data / '005.jpg'},truncated", f"{data / '020.jpg'},empty"]
    prepare(table_of(data), tmp_path / "two", SMALL, workers=2, quiet=True)
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


def test_too_many_bad_images_end_it_and_more_can_be_allowed(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    for index in (10, 11, 12):
        (data / f"{index:03d}.jpg").write_bytes(b"no image")
    out = tmp_path / "set"
    with pytest.raises(
        UserError, match=r"^3 of 40 images \(7.5%\) cannot be read; first .*010.jpg.*allow more"
    ) as error:
        prepare(table_of(data), out, SMALL, workers=0, max_bad=0.05, quiet=True)
    assert "\n" not in str(error.value)
    assert (out / "shard-00000.json").exists() and not (out / "prepared.json").exists()
    assert len((out / "bad_images.csv").read_text().splitlines()) == 4
    done = prepare(table_of(data), out, SMALL, workers=0, max_bad=0.1, quiet=True)
    assert (done.images, done.bad, done.made) == (37, 3, 24)  # two of five shards were there


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 1 images can be read"):
        prepare(table_of(tmp_path / "data"), tmp_path / "set", SMALL, workers=0, max_bad=1.0, quiet=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the fault reaches the workers by fork")
@pytest.mark.parametrize(("fault", "reason"), [("crash", "crashes its decoder"), ("hang", "takes too long")])
def test_an_image_that_fells_its_decoder_is_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    table = table_of(photos)
    deadly = table.read(13)

    def decode(content: bytes, channels: int, raw: bool) -> Any:
        if content == deadly and fault == "crash":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if content == deadly:
            time.sleep(600)
        return open_image(content, channels, raw)

    monkeypatch.setattr(shard_writer, "open_image", decode)
    monkeypatch.setattr(prepare_pool, "LIMIT", 1.0)
    monkeypatch.setattr("fastmim.data.prepared.prepare.store", shard_writer.store)
    monkeypatch.setattr("fastmim.data.prepared.prepare.MEASURED", 1)
    done = prepare(table, tmp_path, SMALL, workers=2, quiet=True)
    assert (done.images, done.bad) == (39, 1)
    assert (tmp_path / "bad_images.csv").read_text().splitlines()[1] == f"{table.path(13)},{reason}"


# ---- Refusals, in one line


def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "set")


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost tar": (lambda out: (out / "shard-00002.tar").unlink(), "shard-00002.tar is missing"),
    "lost shards": (
        lambda out: [path.unlink() for path in out.glob("shard-0000[13].*")],
        "shard-00001.npz is missing, and 3 more",
    ),
    "short tar": (lambda out: os.truncate(out / "shard-00002.tar", 99), "shard-00002.tar has 99 bytes and not"),
    "other index": (
        lambda out: (out / "shard-00002.npz").write_bytes(bytes((out / "shard-00002.npz").stat().st_size)),
        "shard-00002.npz' is damaged",
    ),
    "unknown version": (
        lambda out: change_json(out / "prepared.json", lambda content: content["plan"].update(version=2)),
        "has format version 2, but this fastmim reads 1",
    ),
    "unknown key": (
        lambda out: change_json(out / "prepared.json", lambda content: content.update(crop="yes")),
        "prepared.json: crop: Extra inputs are not permitted",
    ),
    "missing key": (
        lambda out: change_json(out / "prepared.json", lambda content: content.pop("count")),
        "prepared.json: count: Field required",
    ),
    "wrong kind": (
        lambda out: change_json(out / "prepared.json", lambda content: content["plan"].update(side="64")),
        "prepared.json: plan.side: Input should be a valid integer",
    ),
    "changed": (
        lambda out: change_json(out / "prepared.json", lambda content: content["plan"].update(side=64)),
        "prepared.json has been changed",
    ),
    "shorter list": (
        lambda out: change_json(out / "prepared.json", lambda content: content["shards"].pop()),
        "prepared.json has been changed",
    ),
    "no JSON": (lambda out: os.truncate(out / "prepared.json", 100), "prepared.json is no JSON"),
    "another JSON": (lambda out: (out / "prepared.json").write_text("[]"), "prepared.json: : "),
    "deep JSON": (lambda out: (out / "prepared.json").write_text("[" * 10**6), "prepared.json is no JSON"),
    "binary": (lambda out: (out / "prepared.json").write_bytes(b"\xff\xfe\x00"), "prepared.json is no JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_one_line(made: Path, tmp_path: Path, name: str) -> None:
    out = copied(made, tmp_path)
    damage, wanted = DAMAGES[name]
    damage(out)
    assert is_prepared(str(out))
    with pytest.raises(UserError) as error:
        load_prepared(str(out))
    assert wanted in str(error.value) and "\n" not in str(error.value)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("column", ["offset", "size", "width", "ends", "names", "key", "extra", "kind", "object"])
def test_an_index_that_cannot_be_true_is_damaged(made: Path, tmp_path: Path, column: str) -> None:
    """Whoever makes sets can also make sums; what an index says is still not believed."""
    out = copied(made, tmp_path)
    arrays = load_index(out / "shard-00000.npz")
    if column == "extra":
        arrays["more"] = arrays["key"]
    elif column == "kind":
        arrays["key"] = arrays["key"].astype(np.float64)
    elif column == "object":
        arrays["key"] = np.array([Harm(tmp_path / "harm")] * 8, dtype=object)
    else:
        arrays[column] = arrays[column][:-1] if column in ("names", "key") else arrays[column] * -1
    path = out / "shard-00000.npz"
    np.savez(path, allow_pickle=True, **arrays)
    content = path.read_bytes()
    prepared = load_manifest(str(out))
    total = FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    shards = [prepared.shards[0].model_copy(update={"index": total}), *prepared.shards[1:]]
    forged = prepared.model_copy(update={"shards": shards}).sealed()
    (out / MANIFEST).write_text(json.dumps(forged.model_dump()))
    with pytest.raises(UserError, match=r"shard-00000.npz' is damaged"):
        load_prepared(str(out))
    assert not (tmp_path / "harm").exists()


def test_what_is_no_set(tmp_path: Path) -> None:
    assert not is_prepared(str(tmp_path)) and not is_prepared(str(tmp_path / "none"))
    (tmp_path / "prepared.json").mkdir()
    assert not is_prepared(str(tmp_path))
    with pytest.raises(UserError, match="holds no prepared set"):
        load_prepared(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no part of a prepared set"):
        merge(tmp_path / "none")


def test_other_options_or_images_are_refused(photos: Path, made: Path, tmp_path: Path) -> None:
    out, table = copied(made, tmp_path), table_of(photos)
    with pytest.raises(UserError, match=r"was begun with size 32 \(now 64\), quality 90 \(now 80\); ask for the same"):
        prepare(table, out, Options(size=64, quality=80, shard_images=8), workers=0, quiet=True)
    with pytest.raises(UserError, match=r"was begun with other images \(40 then, 39 now\)"):
        prepare(table.take(range(39)), out, SMALL, workers=0, quiet=True)


def test_shards_of_another_set_are_not_merged(photos: Path, made: Path, tmp_path: Path) -> None:
    out, other = copied(made, tmp_path), tmp_path / "other"
    prepare(table_of(photos), other, Options(size=32, shard_images=8, quality=50), workers=0, quiet=True)
    for path in other.glob("shard-00002.*"):
        shutil.copy(path, out)
    with pytest.raises(UserError, match=r"^1 of 5 shards in .* are not there or not whole: 2;"):
        merge(out)


def test_folders_that_are_not_ours_are_refused(photos: Path, made: Path, tmp_path: Path) -> None:
    table = table_of(photos)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "orphans").mkdir()
    shutil.copy(made / "shard-00000.tar", tmp_path / "orphans")
    for out, wanted in [
        (tmp_path / "mine", r"holds other things, such as 'thesis.tex'"),
        (tmp_path / "file", r"is a file; prepare needs a folder"),
        (tmp_path / "file" / "below", r"cannot be made"),
        (tmp_path / "orphans", r"of which nobody knows how they were made"),
        (photos / "set", r"is inside of the images in"),
        ("s3://bucket/set", r"prepare writes to a folder, not to 's3://bucket/set'"),
    ]:
        with pytest.raises(UserError, match=wanted):
            prepare(table, out, SMALL, workers=0, quiet=True)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["thesis.tex"]


def test_options_that_do_not_fit(photos: Path, made: Path, tmp_path: Path) -> None:
    table = table_of(photos)
    for options, wanted in [
        (Options(format="jpeg", values="raw"), "format jpeg cannot store raw values"),
        (Options(format="jpeg", channels=4), "format jpeg cannot store 4 channels"),
    ]:
        with pytest.raises(UserError, match=wanted):
            prepare(table, tmp_path / "set", options, workers=0, quiet=True)
    with pytest.raises(UserError, match="prepared already"):
        prepare(load_prepared(str(made)), tmp_path / "set", SMALL, workers=0, quiet=True)
    with pytest.raises(UserError, match="prepared already"):
        prepare_images([str(made)], tmp_path / "set", quiet=True)
    for text in ("0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", ""):
        with pytest.raises(UserError, match="give it as 2/8"):
            parse_part(text)
    assert not (tmp_path / "set").exists()


def test_shards_of_large_squares_hold_fewer(photos: Path) -> None:
    table = table_of(photos)
    assert plan_of(table, Options()).shard_images == 4096
    assert plan_of(table, Options(format="raw")).shard_images == 1024
    assert plan_of(table, Options(channels=13, values="raw")).shard_images == 64


def test_a_full_disk_is_foreseen(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    for options in (SMALL, Options(size=32, format="raw")):
        with pytest.raises(UserError, match=r"the set needs about 0\.00 GB .* where 0\.00 GB are free; make room"):
            prepare(table_of(photos), tmp_path / str(options.format), options, workers=0, quiet=True)


def test_a_folder_that_cannot_be_written_to_is_one_line(photos: Path, tmp_path: Path) -> None:
    prepare(table_of(photos), tmp_path, SMALL, part=(1, 5), workers=0, quiet=True)
    (tmp_path / "shard-00003.npz").mkdir()  # as if the disk refused
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"cannot be written to: Is a directory; finished shards are kept"):
            prepare(table_of(photos), tmp_path, SMALL, workers=workers, quiet=True)
        assert [path.name for path in sorted(tmp_path.glob("shard-*.json"))] == [
            f"shard-0000{n}.json" for n in range(3)
        ]


# ---- Squares


@pytest.mark.parametrize("squares", [Squares(24, 3, "uint8"), Squares(24, 1, "uint8"), Squares(24, 5, "float32")])
@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_decoding_into_memory_equals_decoding(squares: Squares, form: str) -> None:
    if form == "jpeg" and squares.dtype == "float32":
        pytest.skip("JPEG holds no floats")
    values = "raw" if squares.dtype == "float32" else "8bit"
    options = Options(size=24, channels=squares.channels, values=values, format=form)  # type: ignore[arg-type]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (squares.channels, 24, 24), dtype=np.uint8))
    plan = plan_of(from_names("x", ["a"], [1]), options)
    content = shard_writer.encode(pixels.to(getattr(torch, squares.dtype)), plan)
    alone = decode_square(content, squares)
    shape = (3, 24, 24, squares.channels)
    ring = torch.zeros(shape, dtype=alone.dtype)
    decode_square_into(content, squares, ring[1])
    assert torch.equal(ring[1].permute(2, 0, 1), alone)
    assert not ring[0].any() and not ring[2].any(), "wrote outside of its slot"
    array = np.zeros(shape[1:], squares.dtype)
    decode_square_into(content, squares, array)
    np.testing.assert_array_equal(array, ring[1].numpy())
    if form == "raw":
        assert torch.equal(alone, pixels.to(alone.dtype))


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_any_change_gives_bad_image_or_pixels(form: str) -> None:
    squares = Squares(24, 3, "uint8")
    plan = plan_of(from_names("x", ["a"], [1]), Options(size=24, format=form))  # type: ignore[arg-type]
    content = shard_writer.encode(torch.from_numpy(draw(0, 24)).permute(2, 0, 1), plan)
    larger = plan.model_copy(update={"side": 25})
    smaller = plan.model_copy(update={"side": 23})
    grey = plan.model_copy(update={"channels": 1})
    others = [
        shard_writer.encode(torch.zeros(other.channels, other.side, other.side, dtype=torch.uint8), other)
        for other in (larger, smaller, grey)
    ]
    bad = [b"", b"\x93NUMPY", b"\xff\xd8", b"text", content[: len(content) // 2], content[:-3], *others[:2]]
    bad += [others[2], content + b"\0"] if form == "raw" else []
    for changed in bad:
        with pytest.raises(BadImage, match="damaged"):
            decode_square(changed, squares)
    rng = np.random.default_rng(0)
    for _ in range(300):
        noisy = bytearray(content)
        for place in rng.integers(0, len(noisy), 3):
            noisy[place] = rng.integers(256)
        try:
            assert decode_square(bytes(noisy), squares).shape == (3, 24, 24)
        except BadImage as error:
            assert error.reason == "damaged"


# ---- The command


def test_the_command_prepares_and_says_what_next(
    photos: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(photos), "--out", str(tmp_path / "set"), "--resolution", "16", "--shard-images", "8"]
    assert main([*words, "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("prepared: 40 images in 5 shards, 0.")
    assert lines[1].startswith("time:") and lines[1].endswith("images/s")
    assert lines[2] == f"train:    fastmim pretrain {tmp_path / 'set'} --resolution 16"
    assert content_of(tmp_path / "set") == content_of(made)


def test_the_command_makes_parts_and_merges(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    words = ["prepare", str(photos), "--out", out, "--size", "16", "--shard-images", "8", "--workers", "0"]
    words += ["--values", "raw"]
    for part in ("1/2", "2/2"):
        assert main([*words, "--part", part]) == 0
        assert f"then:     fastmim prepare --out {out} --merge" in capsys.readouterr().out
    assert main(["prepare", "--out", out, "--merge"]) == 0
    assert f"train:    fastmim pretrain {out} --values raw --resolution 8" in capsys.readouterr().out.splitlines()
    for wrong, wanted in [
        (["prepare", "--out", out], "prepare needs DATA"),
        (["prepare", str(photos), "--out", out, "--merge"], "--merge joins the parts in --out"),
        (["prepare", str(photos)], "prepare needs OUT"),
    ]:
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1


def test_sums_are_those_of_the_tars(made: Path) -> None:
    sums = load_sums(load_prepared(str(made)))
    assert list(sums) == [str(made / f"shard-{number:05d}.tar") for number in range(5)]
    for path, wanted in sums.items():
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == wanted.sha256
