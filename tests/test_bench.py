# SPDX-License-Identifier: Apache-2.0
"""fastmim bench: numbers known by hand, real runs of the command, and what it says of bad input."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fastmim
from fastmim.cli import main
from fastmim.config import Config, update
from fastmim.speed.feed import Feed
from fastmim.speed.methods import choose, parse
from fastmim.speed.page import number, table
from fastmim.speed.rows import make_rows
from fastmim.speed.trial import Trial, count_kept, count_macs, matrix_speed

CPU = torch.device("cpu")
ROOT = Path(fastmim.__file__).parents[1]


class Layers(nn.Module):
    """8 -> 16 -> 4, which anybody can count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.second(self.first(batch["images"]).relu()).sum(), {}


class Attention(nn.Module):
    """Two heads of 5 channels over 7 tokens; the scale makes something to differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 2, 7, 5))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        query, key, value = self.scale * batch["images"]
        return F.scaled_dot_product_attention(query, key, value).sum(), {}


# ---- What is counted


def test_arithmetic_of_layers_is_that_of_the_formula() -> None:
    # Forward, weight gradient, and the gradient of the input of the second layer alone.
    assert count_macs(Layers(), {"images": torch.randn(3, 8)}) == 2 * 8 * 16 + 3 * 16 * 4


def test_arithmetic_of_attention_is_that_of_plain_products() -> None:
    batch = {"images": torch.randn(4, 2, 7, 5)}
    # Two products forward, four backward, of 7 x 7 x 5 for each of two heads.
    assert count_macs(Attention(), batch) == 6 * 2 * 7 * 7 * 5


def test_kept_bytes_are_those_of_the_layers_inputs() -> None:
    # Both inputs, in float32; the output of relu is kept by two operations and counts once.
    assert count_kept(Layers(), {"images": torch.randn(3, 8)}) == 4 * 3 * (8 + 16)
    assert count_kept(Layers(), {"images": torch.randn(6, 8)}) == 2 * 4 * 3 * (8 + 16)


def trial(**words: object) -> Trial:
    return Trial(update(Config(), {"model": "test_vit", "resolution": 64, **words}), CPU, None, False)


def test_memory_and_time_grow_with_the_batch_and_arithmetic_does_not() -> None:
    one, other = trial(), trial()
    one.batch, other.batch = 2, 16
    for _ in range(3):
        one.turn(0.05)
        other.turn(0.05)
    assert one.macs == other.macs > 0
    assert 6 < other.memory / one.memory < 8.01
    assert min(other.seconds) > min(one.seconds) > 0
    assert len(one.seconds) == 3


def test_trial_leaves_nothing_behind_its_turn_and_trains_as_it_says() -> None:
    one = trial(hide="drop")
    one.batch = 2
    before = [parameter.detach().clone() for parameter in one.task.parameters()]
    one.turn(0.01)
    assert not one.optimizer.state
    assert all(parameter.grad is None for parameter in one.task.parameters())
    after = list(one.task.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.allclose(old, new, atol=1e-4) for old, new in zip(before, after, strict=True))


def test_dropping_and_discarding_save_arithmetic() -> None:
    counts = []
    for words in ({}, {"hide": "drop"}, {"hide": "drop", "discard": 2}):
        one = trial(**words)
        one.batch = 2
        one.turn(0.0)
        counts.append(one.macs)
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3


def test_speed_of_a_matrix_product_is_sensible() -> None:
    assert 1e7 < matrix_speed(CPU, None, side=256) < 1e15


# ---- Rows


@dataclass
class Timed:
    seconds: list[float]
    peaks: list[float]
    macs: float
    memory: int


def test_rows_are_the_arithmetic_of_the_rounds() -> None:
    methods = {label: parse(name, {}) for label, name in (("a", "fastmim"), ("b", "simmim"), ("d", "disjoint"))}
    measured = {
        "a": [(Timed([1.0, 2.0, 4.0], [1e12, 1e12, 4e12], 3e9, 5_000_000), 1.0)],
        "b": [(Timed([4.0, 8.0, 9.0], [1e12] * 3, 8e9, 9_000_000), 1.0)],
        "d": [(Timed([2.0, 2.0, 2.0], [1e12] * 3, 1e9, 1_000_000), 1.0)],
    }
    rows, baseline = make_rows(measured, methods, "b", batch=10, images=1000, epochs=3, feed={128: 4.0, 224: 100.0})
    assert baseline == "b" and [row.method for row in rows] == ["fastmim", "disjoint", "simmim"]
    a, d, b = rows
    assert (a.images_per_s, a.ms_per_image, a.ratio, a.spread) == pytest.approx((5.0, 200.0, 4.0, 1.5))
    assert (b.ratio, b.memory_mb, b.gmac_per_image) == (1.0, 9.0, 8.0)
    assert a.share == pytest.approx(2 * 3e9 * 10 / 2 / 1e12)  # the second round is the median
    assert d.views_per_s == 4 * d.images_per_s == 20
    # Images come at 4 a second, the network could take 5; at 224 px it is the network that is slow.
    assert a.waits and not b.waits
    assert (a.run_s, a.asked_s) == (pytest.approx(400 * 1000 / 4), pytest.approx(3 * 1000 / 4))
    assert b.run_s == pytest.approx(800 * 1000 * 0.8)


def test_growing_images_count_by_their_shares() -> None:
    methods = {"p": parse("fastmim+phases=64:0.75,128:0.25", {})}
    parts = [(Timed([1.0, 1.0], [1.0] * 2, 1e9, 1), 0.75), (Timed([5.0, 5.0, 7.0], [1.0, 1.0, 2.0], 5e9, 3), 0.25)]
    (row,), baseline = make_rows(
        {"p": parts}, methods, "missing", batch=1, images=1, epochs=None, feed={64: 10.0, 128: 2.0}
    )
    assert (row.label, baseline, row.ratio) == ("fastmim+phases=64:0.75,128:0.25 64-128", "p", 1.0)
    assert (row.ms_per_image, row.gmac_per_image, row.memory_mb) == (2000.0, 2.0, 3e-6)
    assert row.share == pytest.approx(2 * 2e9 / (0.75 * 1 + 0.25 * 5))
    assert row.feed_images_per_s == pytest.approx(1 / (0.75 / 10 + 0.25 / 2))


def test_without_the_baseline_the_slowest_is_compared_to() -> None:
    methods = {name: parse(name, {}) for name in ("fastmim", "mae")}
    measured = {"fastmim": [(Timed([1.0], [1.0], 1, 1), 1.0)], "mae": [(Timed([3.0], [1.0], 1, 1), 1.0)]}
    rows, baseline = make_rows(measured, methods, "simmim", batch=1, images=1, epochs=None, feed={})
    assert baseline == "mae" and [row.ratio for row in rows] == [3.0, 1.0]


def test_table_lines_up() -> None:
    assert list(table(["name", "n"], [["a", "1"], ["longer", "100"]])) == [
        "name      n",
        "a         1",
        "longer  100",
    ]
    assert [number(value) for value in (0.01234, 5.0, 99.94, 1234.5)] == ["0.0123", "5", "99.9", "1,234"]


# ---- Methods


def labels(model: str, **arguments: object) -> list[str]:
    given = {"names": None, "sizes": None, "words": {}, **arguments}
    return [method.label for method in choose(model=model, **given)[0]]


def test_methods_fit_the_network() -> None:
    plain = labels("vit_tiny_patch16_224")
    assert [f"fastmim {side}" for side in (96, 128, 160, 192)] == plain[:4]
    assert plain[4:6] == ["fastmim+hide=drop 128", "fastmim+hide=drop+discard=4 128"]
    assert {"mae 224", "simmim 224", "fastmim_p 128-192", "disjoint 128"} <= set(plain)
    convolutional = labels("resnet18")
    assert "simmim+hide=pixels 224" in convolutional and not any("discard" in label for label in convolutional)
    assert len(set(plain)) == len(plain)


def test_sizes_are_for_methods_that_bring_none() -> None:
    names = ["fastmim", "mae+resolution=96", "fastmim_p"]
    found = labels("test_vit", names=names, sizes=[32, 64])
    assert found == ["fastmim 32", "fastmim 64", "mae 96", "fastmim_p 128-192", "simmim 224"]


def test_baseline_is_there_once() -> None:
    assert labels("test_vit", names=["simmim"]) == ["simmim 224"]


# ---- The command


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_command_measures_and_estimates(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "out", torch.get_num_threads()
    words = "--model test_vit --batch 4 --seconds 0.15 --epochs 100 --threads 1"
    methods = "fastmim+resolution=64,fastmim_p+phases=32:0.5,64:0.5,disjoint+resolution=64,fastmim+resolution=100"
    assert main(["bench", str(photos), *words.split(), "--methods", methods, "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr()
    assert "model 'test_vit' cannot take images of 100 px" in output.out
    assert "time for 40 images" in output.out and "100 epochs" in output.out and "limited by" in output.out
    assert "fastmim at 64 px:" in output.err
    found = rows_of(out)
    names = ["fastmim 64", "fastmim_p+phases=32:0.5,64:0.5 32-64", "disjoint 64", "simmim 224"]
    measured = [row for row in found if not row["reason"]]
    assert sorted(f"{row['method']} {row['px']}" for row in measured) == sorted(names)
    assert [row["px"] for row in found if row["reason"]] == ["100"]
    for row in measured:
        for column in ("images_per_s", "ms_per_image", "gmac_per_image", "share", "memory_mb", "run_s", "asked_s"):
            assert float(row[column]) > 0, column
        assert float(row["feed_images_per_s"]) > 0 and row["images"] == "40" and row["baseline"] == "simmim 224"
    disjoint = next(row for row in measured if row["method"] == "disjoint")
    assert float(disjoint["views_per_s"]) == pytest.approx(4 * float(disjoint["images_per_s"]), rel=1e-3)
    with Image.open(out / "bench.png") as picture:
        assert picture.width == 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_small_images_are_faster_as_their_area_says(tmp_path: Path) -> None:
    """A quarter of the tokens is a quarter of the arithmetic, and clearly less time, whatever does not shrink."""
    result = fastmim.bench(
        model="vit_tiny_patch16_224", methods=["fastmim"], sizes=[64, 128], batch=8, seconds=0.6, out=tmp_path / "out"
    )
    small, large, _ = sorted(result.rows, key=lambda row: int(row.px))
    assert 3.5 < large.gmac_per_image / small.gmac_per_image < 4.5
    assert 1.5 < small.ratio / large.ratio < 10
    assert result.images == 1_281_167 and not result.interrupted and result.baseline == "simmim 224"
    assert small.run_s == pytest.approx(400 * 1_281_167 / small.images_per_s)


def test_stored_squares_say_what_they_are_and_which_sizes_they_serve(photos: Path, tmp_path: Path) -> None:
    fastmim.prepare_images([str(photos)], tmp_path / "set", resolution=32, channels=1, workers=0)
    feed = Feed(str(tmp_path / "set"), CPU)
    feed.measure([32, 64, 128], batch=8, seconds=0.05)
    assert feed.words == {"channels": 1, "values": "8bit"} and feed.images == 40
    assert sorted(feed.speed) == [32, 64] and min(feed.speed.values()) > 0
    assert feed.remedy(32)


def test_interrupted_command_writes_what_it_has(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "fastmim", "bench", "--model", "test_vit", "--methods", "fastmim,fastmim+hide=drop"]
    call += ["--batch", "2", "--seconds", "6", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        assert "images/s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert "fastmim" in output
    measured = rows_of(tmp_path / "out")
    assert 1 <= len(measured) < 3 and float(measured[0]["images_per_s"]) > 0


def test_missing_images_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "nowhere"), "--model", "test_vit"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1) and "nowhere' does not exist" in output.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--methods fastmin", "unknown recipe 'fastmin'; nearest: fastmim"),
        ("--methods fastmim,,mae", "unknown recipe 'fastmim,'"),
        ("--methods fastmim+hid=drop", "method fastmim+hid=drop: unknown option 'hid'"),
        ("--methods fastmim+drop", "method fastmim+drop: 'drop' is not NAME=VALUE, as in fastmim+hide=drop"),
        ("--methods fastmim+hide=foo", "method fastmim+hide=foo: hide = 'foo': Input should be"),
        ("--methods fastmim+workers=3", "method fastmim+workers=3: 'workers' is the same for all methods"),
        ("--methods fastmim+model=resnet18", "method fastmim+model=resnet18: 'model' is the same for all methods"),
        ("--sizes 128,x", "command line: sizes.1 = 'x': Input should be a valid integer"),
        ("--sizes 4", "command line: sizes.0 = '4': Input should be greater than or equal to 8"),
        ("--batch 1", "command line: batch = '1': Input should be greater than or equal to 2"),
        ("--seconds 0", "command line: seconds = '0': Input should be greater than 0"),
        ("--model resnt18", "timm has no model 'resnt18'"),
        ("--device tpu", "device 'tpu' is not on this machine"),
        ("--methods mae+mask_ratio=2", "method mae+mask_ratio=2: mask_ratio = '2': Input should be less than 1"),
        ("nowhere and", "unexpected word 'and'"),
        ("--out .", "the run folder . is not empty; give another --out"),
    ],
)
def test_mistake_is_one_line(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = [] if "--model" in words else ["--model", "test_vit"]
    given += [] if "--methods" in words else ["--methods", "fastmim"]
    assert main(["bench", *words.split(), *given]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"fastmim: {expected}") and output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
