# SPDX-License-Identifier: Apache-2.0
"""A scan says what the images are, opens each file once in its life, and outlives whatever a file does to a decoder."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from fastmim.cli import main
from fastmim.cli_options import Pretrain, build, read_words
from fastmim.data.inspection import found
from fastmim.data.inspection.advice import Advice, resolution
from fastmim.data.inspection.findings import Findings
from fastmim.data.inspection.inspect import inspect
from fastmim.data.inspection.pool import over_processes
from fastmim.data.sources.scan import scan
from fastmim.errors import UserError

OPENED: list[str] = []
"""Every file that this process opens, once the hook below is set."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTMIM_CACHE", str(folder))
    return folder


def picture(index: int, side: int = 96) -> Image.Image:
    return Image.fromarray(draw(index, side))


@pytest.fixture(scope="session")
def mixed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of as many kinds, of which three are broken."""
    folder = tmp_path_factory.mktemp("mixed")
    for index in range(4):
        picture(index).save(folder / f"{index}.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    shutil.copy(folder / "1.jpg", folder / "copy.jpg")
    picture(2).resize((70, 70)).save(folder / "small.jpg", quality=60)
    picture(5).save(folder / "really.jpg", "PNG")
    picture(6).convert("L").save(folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(7).crop((0, 0, 96, 48)).save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture
def mixed(mixed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed_once, tmp_path / "mixed"))


def plain(findings: Findings) -> dict:
    """What does not depend on the clock or on what was remembered."""
    changing = ("seconds", "milliseconds", "remembered", "advice")
    return {name: value for name, value in dataclasses.asdict(findings).items() if name not in changing}


def names(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[Path(path).name for path in group] for group in groups]


def test_what_is_found(mixed: Path) -> None:
    findings = inspect(scan([str(mixed)]), workers=0)
    assert (findings.images, findings.opened) == (12, 12)
    assert findings.formats == {"jpeg": 7, "png": 2}
    assert findings.wrong_suffix == {".jpg holds png": 1}
    assert findings.wrong_suffix_example.endswith("/really.jpg")
    assert findings.channels == {3: 8, 1: 1}
    assert findings.depths == {"uint8": 9}
    assert (findings.grey, findings.turned, findings.several_frames) == (1, 1, 0)
    assert findings.width is not None and findings.width.median == 96
    assert findings.short_side is not None and 48 <= findings.short_side.low < 70
    assert {(Path(one.path).name, one.reason) for one in findings.broken} == {
        ("cut.jpg", "truncated"),
        ("empty.jpg", "empty"),
        ("page.jpg", "not an image"),
    }
    assert findings.reasons == {"truncated": 1, "empty": 1, "not an image": 1}
    assert names(findings.exact.groups) == [["1.jpg", "copy.jpg"]]
    assert findings.exact.compared == 12
    assert names(findings.near.groups) == [["2.jpg", "small.jpg"]]
    assert findings.statistics is not None and findings.statistics.images == 9
    assert (findings.measured_channels, findings.measured_raw) == (3, False)
    assert json.loads(json.dumps(dataclasses.asdict(findings)))["images"] == 12


def test_workers_change_nothing(mixed: Path) -> None:
    for index in range(30):
        picture(100 + index, 32).save(mixed / f"more{index}.png")
    table = scan([str(mixed)])
    assert plain(inspect(table, workers=0)) == plain(inspect(table, workers=2))


def test_a_sample_is_spread_and_sums_are_of_all(mixed: Path) -> None:
    findings = inspect(scan([str(mixed)]), sample=4, workers=0)
    assert findings.opened == 4
    assert names(findings.exact.groups) == [["1.jpg", "copy.jpg"]]
    assert findings.near.compared <= 4


def opened_below(folder: Path) -> list[str]:
    """Files of ``folder`` that were opened since the last call, each as often as it was."""
    found_names = sorted(Path(path).name for path in OPENED if path.startswith(f"{folder}/") and Path(path).is_file())
    OPENED.clear()
    return found_names


@pytest.fixture(scope="session")
def watched() -> None:
    """An audit hook cannot be taken away again, so there is one for all tests."""
    sys.addaudithook(lambda event, args: OPENED.append(os.fsdecode(args[0])) if watches(event, args) else None)


def watches(event: str, args: tuple) -> bool:
    return event == "open" and isinstance(args[0], str | bytes)


def test_the_second_scan_opens_only_what_is_new_or_changed(mixed: Path, watched: None) -> None:
    memory = found.place([str(mixed)])
    opened_below(mixed)
    first = inspect(scan([str(mixed)]), channels=3, raw=False, workers=0, remember=memory)
    assert opened_below(mixed) == sorted({path.name for path in mixed.iterdir()} - {"empty.jpg"})
    second = inspect(scan([str(mixed)]), workers=0, remember=memory)
    # The empty file is judged without being opened; what could not be decoded is tried again.
    assert sorted(set(opened_below(mixed))) == ["cut.jpg", "page.jpg"]
    assert (first.remembered, second.remembered) == (0, 9)
    assert plain(first) == plain(second)
    picture(50).save(mixed / "new.png")
    picture(51).save(mixed / "3.jpg", quality=95)
    os.utime(mixed / "0.jpg", ns=(1, 1))
    third = inspect(scan([str(mixed)]), workers=0, remember=memory)
    assert sorted(set(opened_below(mixed))) == ["0.jpg", "3.jpg", "cut.jpg", "new.png", "page.jpg"]
    assert (third.remembered, third.opened) == (7, 13)
    assert plain(third) == plain(inspect(scan([str(mixed)]), workers=0))
    opened_below(mixed)
    # Other settings: pixels are looked at again, and what that finds is remembered.
    grey = inspect(scan([str(mixed)]), channels=1, workers=0, remember=memory)
    assert grey.remembered == 0 and len(set(opened_below(mixed))) == 12
    assert plain(grey) == plain(inspect(scan([str(mixed)]), channels=1, workers=0))


def test_a_sample_does_not_forget_the_rest(mixed: Path) -> None:
    memory = found.place([str(mixed)])
    inspect(scan([str(mixed)]), workers=0, remember=memory)
    inspect(scan([str(mixed)]), sample=3, workers=0, remember=memory)
    assert inspect(scan([str(mixed)]), workers=0, remember=memory).remembered == 9


def test_a_changed_file_of_the_sample_keeps_the_rest(mixed: Path) -> None:
    memory = found.place([str(mixed)])
    inspect(scan([str(mixed)]), workers=0, remember=memory)
    os.utime(mixed / "0.jpg", ns=(1, 1))
    inspect(scan([str(mixed)]), sample=3, workers=0, remember=memory)
    assert inspect(scan([str(mixed)]), workers=0, remember=memory).remembered == 9


def test_a_damaged_memory_is_ignored_and_mended(mixed: Path) -> None:
    memory = found.place([str(mixed)])
    wanted = plain(inspect(scan([str(mixed)]), workers=0, remember=memory))
    good = memory.read_bytes()
    wrong = [b"", b"text", good[: len(good) // 2], good[:3000] + b"\xff" * 64 + good[3064:]]
    for content in wrong:
        memory.write_bytes(content)
        findings = inspect(scan([str(mixed)]), workers=0, remember=memory)
        assert plain(findings) == wanted and findings.remembered == 0
        assert memory.read_bytes() != content
    for arrays in (
        {"version": np.array("999")},
        {"rows": np.array([{}], dtype=object)},
        {"settings": np.array([7, 0])},
    ):
        memory.write_bytes(good)
        with np.load(memory) as stored:
            everything = {**stored, **arrays}
        np.savez(memory, allow_pickle=True, **everything)
        assert inspect(scan([str(mixed)]), workers=0, remember=memory).remembered == 0
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_where_it_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path / "own"))
    assert found.place(["a"]).parent == tmp_path / "own" / "scan"
    monkeypatch.delenv("FASTMIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert found.place(["a"]).parent == tmp_path / "xdg" / "fastmim" / "scan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found.place(["a"]).parent == tmp_path / ".cache" / "fastmim" / "scan"
    assert found.place(["a", "b"]) == found.place(["b", f"{Path.cwd()}/a"]) != found.place(["a"])


def test_a_folder_that_cannot_be_written_is_no_fault(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert inspect(scan([str(mixed)]), workers=0, remember=tmp_path / "file" / "scan" / "x.npz").opened == 12


# ---- What is advised


def one_size(folder: Path, width: int, height: int, mode: str = "RGB", count: int = 3) -> Findings:
    folder.mkdir()
    for index in range(count):
        picture(index, max(width, height)).crop((0, 0, width, height)).convert(mode).save(folder / f"{index}.png")
    return inspect(scan([str(folder)]), workers=0)


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [
        (300, 200, 128),
        (128, 128, 128),
        (127, 200, 96),
        (96, 96, 96),
        (100, 70, 64),
        (50, 60, 48),
        (28, 28, 32),
        (8, 8, 32),
    ],
)
def test_resolution(tmp_path: Path, width: int, height: int, side: int) -> None:
    findings = one_size(tmp_path / "set", width, height)
    assert resolution(findings) == side
    advised = [piece.options for piece in findings.advice if "--resolution" in piece.options]
    assert bool(advised) == (side != 128)
    assert all("patch_size" in options for options in advised) == (side < 64 or not advised)
    check(findings)


def test_grey(tmp_path: Path) -> None:
    assert options_of(one_size(tmp_path / "grey", 130, 130, "L")) == ["--channels 1"]
    assert "grey" not in str(one_size(tmp_path / "colour", 130, 130).advice)


def options_of(findings: Findings) -> list[str]:
    return [piece.options for piece in findings.advice if piece.options]


def check(findings: Findings) -> None:
    """What is advised is understood by pretrain."""
    words = read_words(Pretrain, shlex.split(" ".join(options_of(findings))))
    build(Pretrain, {}, "pretrain")
    from fastmim.cli import resolved

    resolved(words, None)
    assert len(findings.advice) <= 8
    assert all("\n" not in piece.text for piece in findings.advice)


def test_other_colours_and_sixteen_bits(tmp_path: Path) -> None:
    for folder in ("dark", "deep"):
        (tmp_path / folder).mkdir()
    for index in range(4):
        Image.fromarray(draw(index, 128) // 6).save(tmp_path / "dark" / f"{index}.png")
        deep = draw(index, 128)[..., 0].astype(np.uint16) * 200
        Image.fromarray(deep).save(tmp_path / "deep" / f"{index}.png")
    dark = inspect(scan([str(tmp_path / "dark")]), workers=0)
    assert any(options.startswith("--mean 0.") for options in options_of(dark))
    check(dark)
    deep_found = inspect(scan([str(tmp_path / "deep")]), workers=0)
    assert options_of(deep_found) == ["--channels 1 --values raw"]
    assert deep_found.statistics is not None and deep_found.statistics.mean[0] > 255
    check(deep_found)
    both = inspect(scan([str(tmp_path)]), workers=0)
    assert "8 files" not in str(both.advice) and "in deep/" in str(both.advice) and "in dark/" in str(both.advice)


def test_many_broken_and_large(mixed: Path) -> None:
    findings = inspect(scan([str(mixed)]), workers=0)
    assert any(options.startswith("--max-bad 0.") for options in options_of(findings))
    check(findings)
    slow = dataclasses.replace(findings, images=10**6, milliseconds=40.0, cores=8)
    from fastmim.data.inspection.advice import advise

    assert any("fastmim prepare DATA --out FOLDER --resolution 96" in piece.text for piece in advise(slow))
    few = dataclasses.replace(findings, images=1000, milliseconds=40.0, cores=8)
    assert Advice in {type(piece) for piece in advise(few)} and "--cache ram" in str(advise(few))


# ---- Other sources


def test_thirteen_bands(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    for index in range(3):
        bands = np.stack([draw(index, 40)[..., 0].astype(np.uint16) * (10 + band) for band in range(13)])
        bands[9] = 5
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
            place = tmp_path / f"{index}.tif"
            with rasterio.open(place, "w", driver="GTiff", width=40, height=40, count=13, dtype="uint16") as file:
                file.write(bands)
    findings = inspect(scan([str(tmp_path)]), workers=0)
    assert (findings.measured_channels, findings.measured_raw) == (13, True)
    assert findings.channels == {13: 3} and findings.depths == {"uint16": 3}
    assert findings.statistics is not None
    assert findings.statistics.constant == (9,) and findings.statistics.std[9] == 1
    assert options_of(findings)[0] == "--channels 13 --values raw"
    assert findings.near.groups == ()
    check(findings)


def test_a_prepared_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "photos", str(tmp_path / "prepared")
    source.mkdir()
    for index in range(6):
        picture(index, 200).crop((0, 0, 200, 150)).save(source / f"{index}.jpg")
    assert main(["prepare", str(source), "--out", target, "--resolution", "64", "--workers", "0"]) == 0
    findings = inspect(scan([target]), workers=0)
    assert findings.prepared == 128 and findings.true_size
    assert findings.width is not None and findings.height is not None
    assert (findings.width.median, findings.height.median) == (200, 150)
    assert findings.broken == () and findings.formats == {"jpeg": 6}
    memory = found.place([target])
    inspect(scan([target]), workers=0, remember=memory)
    assert inspect(scan([target]), workers=0, remember=memory).remembered == 6
    with pytest.raises(UserError, match="3 channels and 8bit"):
        inspect(scan([target]), channels=4, workers=0)
    capsys.readouterr()
    assert main(["scan", target, "--workers", "0"]) == 0
    assert "squares of 128 px; originals 200 x 150 px" in capsys.readouterr().out


# ---- The command


def test_the_page_and_the_file(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mixed / os.fsdecode(b"\xff<b>\n.jpg")).write_bytes(b"no image")
    out = tmp_path / "found.json"
    assert main(["scan", str(mixed), "--workers", "0", "--out", str(out)]) == 0
    page = capsys.readouterr().out
    for text in (
        "13, ",
        "truncated",
        "'1.jpg' = 'copy.jpg'",
        "'2.jpg' = 'small.jpg'",
        "red",
        f"fastmim pretrain {mixed}",
    ):
        assert text in page, text
    assert max(map(len, page.replace(str(mixed), "DATA").splitlines())) <= 100
    assert "\x1b" not in page
    stored = json.loads(out.read_text())
    assert len(stored["broken"]) == 4 and stored["statistics"]["images"] == 9
    assert {os.fsencode(one["path"]) for one in stored["broken"]} >= {os.fsencode(mixed) + b"/\xff<b>\n.jpg"}
    assert main(["scan", str(mixed), "--workers", "0"]) == 0
    assert "all opened, 9 remembered" in capsys.readouterr().out
    assert main(["scan", str(mixed), "--workers", "0", "--no-cache"]) == 0
    assert "remembered" not in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    wrong = {
        (): "scan needs DATA",
        (str(tmp_path / "none"),): "does not exist",
        (str(tmp_path),): r"none of 1 images that were opened can be read (1 not an image); first",
        (str(tmp_path), "--out", str(tmp_path / "no/found.json")): "there is no folder",
        (str(tmp_path), "--sample", "0"): "sample = '0'",
    }
    for words, text in wrong.items():
        assert main(["scan", *words]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


# ---- Processes


def misbehave(items: Sequence[int]) -> list[int]:
    for item in items:
        if item == 13:
            os._exit(1)
        if item == 21:
            time.sleep(600)
        if item == 30:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
    return [item * item for item in items]


def test_workers_that_die_or_hang_lose_one_item() -> None:
    pieces = [list(range(start, start + 5)) for start in range(0, 50, 5)]
    begun = time.monotonic()
    squares: dict[int, int | None] = {}
    for piece, answer in over_processes(misbehave, pieces, workers=2, limit=2):
        squares |= dict(zip(piece, answer or [None] * len(piece), strict=True))
    assert squares == {item: None if item in (13, 21) else item * item for item in range(50)}
    assert time.monotonic() - begun < 60


def fail(items: Sequence[int]) -> list[int]:
    raise UserError("wrong") if items == [1] else ValueError("odd")


def test_errors_of_workers_arrive() -> None:
    with pytest.raises(UserError, match="wrong"):
        list(over_processes(fail, [[1]], workers=1))
    with pytest.raises(RuntimeError, match="ValueError: odd"):
        list(over_processes(fail, [[2]], workers=1))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_workers_die_with_the_parent() -> None:
    script = textwrap.dedent("""
        import os, time
        from fastmim.data.inspection.pool import over_processes

        def slow(items):
            print(os.getpid(), flush=True)
            time.sleep(600)

        list(over_processes(slow, [[1], [2]], workers=2))
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be asked how does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
