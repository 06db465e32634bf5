# SPDX-License-Identifier: Apache-2.0
"""The stream of batches is a pure function of (files, seed, step), whatever the workers, the ranks and the damage."""

import csv
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image

from fastmim.data.decode import read_image
from fastmim.data.loader import Batch, EvalLoader, Order, TrainLoader, permutation
from fastmim.data.scan import scan
from fastmim.errors import UserError
from fastmim.seeding import derive

STEPS = 12  # of 16 samples: nearly five epochs of 40 images
OPTIONS = {"resolution": 32, "crop_scale": (0.2, 1.0), "flip": True, "seed": 7, "global_batch": 16, "micro_batch": 4}


@pytest.fixture(scope="module")
def files(photos: Path) -> tuple[str, ...]:
    return scan([str(photos)]).files


def take(loader: TrainLoader, start: int, stop: int, micro_batches: int = 4) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), (stop - start) * micro_batches))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def stream(files: tuple[str, ...]) -> list[Batch]:
    return take(TrainLoader(files, **OPTIONS), 0, STEPS)


def test_a_batch(stream: list[Batch]) -> None:
    for batch in stream:
        assert batch.keys() == {"images", "keys"}
        assert batch["images"].shape == (4, 3, 32, 32) and batch["images"].dtype == torch.uint8
        assert batch["images"].is_contiguous()
        assert batch["keys"].shape == (4,) and batch["keys"].dtype == torch.int64
    keys = torch.cat([batch["keys"] for batch in stream])
    assert len(keys.unique()) == STEPS * 16


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int, files: tuple[str, ...], stream: list[Batch]) -> None:
    assert same(take(TrainLoader(files, **OPTIONS, workers=workers), 0, STEPS), stream)


def test_from_every_step_on_it_is_the_same(files: tuple[str, ...], stream: list[Batch]) -> None:
    loader = TrainLoader(files, **OPTIONS)
    for start in range(STEPS - 1):
        assert same(take(loader, start, start + 2), stream[4 * start : 4 * start + 8])
    parallel = TrainLoader(files, **OPTIONS, workers=2)
    assert same(take(parallel, 5, STEPS), stream[20:])


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_ranks_share_what_one_rank_has(micro_batch: int, files: tuple[str, ...], stream: list[Batch]) -> None:
    options = OPTIONS | {"micro_batch": micro_batch}
    ranks = [take(TrainLoader(files, **options, rank=r, world_size=2), 0, 4, 8 // micro_batch) for r in range(2)]
    for step in range(4):
        per_step = [ranks[r][step * 8 // micro_batch : (step + 1) * 8 // micro_batch] for r in range(2)]
        images = torch.cat([batch["images"] for part in per_step for batch in part])
        assert torch.equal(images, torch.cat([batch["images"] for batch in stream[4 * step : 4 * step + 4]]))


def test_a_batch_that_cannot_be_shared_is_refused(files: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="16 is not divisible by micro_batch 4 x 3"):
        TrainLoader(files, **OPTIONS, world_size=3)


def test_every_image_once_an_epoch_in_another_order() -> None:
    order = Order(37, seed=1)
    samples = [order(position) for position in range(37 * 3)]
    assert Counter(samples) == Counter(itertools.product(range(3), range(37)))
    epochs = [[index for epoch, index in samples if epoch == wanted] for wanted in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[2] == permutation(37, 1, 2).tolist() != permutation(37, 2, 2).tolist()
    # Written down, because a run must go on in the same order after NumPy was upgraded.
    assert permutation(8, 0, 0).tolist() == [1, 2, 6, 5, 7, 0, 4, 3]


def test_orders_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), permutation(6, 0, epoch)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_a_folder_smaller_than_a_batch(files: tuple[str, ...]) -> None:
    (batch,) = take(TrainLoader(files[:3], **OPTIONS | {"micro_batch": 16}), 0, 1, 1)
    assert batch["images"].shape == (16, 3, 32, 32) and len(batch["keys"].unique()) == 16


def test_a_sample_is_its_file_cropped_and_perhaps_mirrored(files: tuple[str, ...]) -> None:
    whole = OPTIONS | {"crop_scale": (1.0, 1.0), "resolution": 48}  # 48 px squares: nothing but the whole fits
    order, loader = Order(40, seed=7), TrainLoader(files, **whole)
    mirrored = 0
    for step, batch in enumerate(take(loader, 0, 3, 4)):
        for place in range(4):
            epoch, index = order(4 * step + place)
            assert batch["keys"][place] == derive(7, "key", epoch, index)
            pixels = torch.from_numpy(read_image(files[index])).permute(2, 0, 1)
            mirrored += torch.equal(batch["images"][place], pixels.flip(2))
            assert torch.equal(batch["images"][place], pixels) or torch.equal(batch["images"][place], pixels.flip(2))
    assert 10 < mirrored < 38


def test_without_flip_the_crops_stay(files: tuple[str, ...], stream: list[Batch]) -> None:
    plain = take(TrainLoader(files, **OPTIONS | {"flip": False}), 0, 2)
    same_way = 0
    for one, other in zip(plain, stream[:8], strict=True):
        for a, b in zip(one["images"], other["images"], strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(2), b)
            same_way += torch.equal(a, b)
    assert 4 < same_way < 28


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_randomness_is_used(workers: int, files: tuple[str, ...]) -> None:
    # Python's own generator is compared by results only: beartype, which checks types during tests, draws from it.
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = take(TrainLoader(files, **OPTIONS, workers=workers), 0, 2)
    list(EvalLoader(files, resolution=16, batch_size=8, workers=workers))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    random.seed(12345)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert same(take(TrainLoader(files, **OPTIONS, workers=workers), 0, 2), first)


@pytest.fixture
def damaged(tmp_path: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    """40 files, of which two cannot be read; their names are as bad as names can be."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for index, file in enumerate(files):
        (folder / f"{index:03d}.jpg").write_bytes(Path(file).read_bytes())
    (folder / "003.jpg").rename(folder / 'a "b",\nc.jpg')
    (folder / 'a "b",\nc.jpg').write_bytes(b"not an image")
    (folder / "017.jpg").rename(os.fsdecode(os.fsencode(folder) + b"/z\xff\xe9.jpg"))
    Path(os.fsdecode(os.fsencode(folder) + b"/z\xff\xe9.jpg")).write_bytes(b"")
    return scan([str(folder)]).files


def read_log(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_bad_images_are_replaced_and_listed_once(damaged: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "bad_images.csv"
    first_bad, last = (file for file in damaged if not Path(file).stem.isdigit())
    expected = {first_bad: "not an image", last: "empty"}
    loader = TrainLoader(damaged, **OPTIONS, bad_log=log)
    first = take(loader, 0, STEPS)
    assert loader.bad == expected
    assert read_log(log)[0] == ["path", "reason"] and dict(read_log(log)[1:]) == expected and len(read_log(log)) == 3
    order = Order(40, seed=7)
    for position in range(STEPS * 16):
        epoch, index = order(position)
        batch = first[position // 4]
        assert batch["keys"][position % 4] == derive(7, "key", epoch, index)
        assert batch["images"][position % 4].float().std() > 5  # a picture, and not what memory held
    resumed = TrainLoader(damaged, **OPTIONS, bad_log=log, workers=3)
    assert resumed.bad == expected
    assert same(take(resumed, 3, STEPS), first[12:])
    assert len(read_log(log)) == 3


def test_replacing_one_changes_no_other_sample(files: tuple[str, ...], stream: list[Batch], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.touch()
    swapped = take(TrainLoader((*files[:11], str(bad), *files[12:]), **OPTIONS), 0, STEPS)
    order = Order(40, seed=7)
    for position in range(STEPS * 16):
        one, other = (batches[position // 4]["images"][position % 4] for batches in (stream, swapped))
        assert torch.equal(one, other) == (order(position)[1] != 11)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(workers: int, files: tuple[str, ...], tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").touch()
    mixed = (*files[:17], *scan([str(tmp_path)]).files)
    log = tmp_path / "bad_images.csv"
    with pytest.raises(UserError) as caught:
        take(TrainLoader(mixed, **OPTIONS, workers=workers, max_bad=0.1, bad_log=log), 0, STEPS)
    expected = r"3 of 20 images \(15.0%\) cannot be read; first '.*\d.jpg': empty, all in '.*bad_images.csv'"
    assert re.match(expected, str(caught.value)) and "\n" not in str(caught.value)
    assert len(read_log(log)) == 4
    assert len(take(TrainLoader(mixed, **OPTIONS, workers=workers, max_bad=0.15), 0, STEPS)) == 4 * STEPS


def test_only_bad_images_end_even_if_allowed(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").touch()
    with pytest.raises(UserError, match="of 4 images"):
        take(TrainLoader(scan([str(tmp_path)]).files, **OPTIONS, max_bad=1.0), 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_all_in_order(workers: int, tmp_path: Path) -> None:
    for index in range(10):
        Image.fromarray(draw(index)[:, 5:37]).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"text")
    for index in (6, 7, 8):
        (tmp_path / f"{index}.png").write_bytes(b"")
    files = scan([str(tmp_path)]).files
    loader = EvalLoader(files, resolution=32, batch_size=3, labels=list(range(100, 110)), workers=workers)
    batches = list(loader)
    assert len(loader) == 4 and [len(batch["images"]) for batch in batches] == [3, 2, 1]
    indices = torch.cat([batch["indices"] for batch in batches])
    assert indices.tolist() == [0, 1, 2, 3, 5, 9] and indices.dtype == torch.int64
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [100, 101, 102, 103, 105, 109]
    assert torch.cat([batch["keys"] for batch in batches]).unique().numel() == 6
    images = torch.cat([batch["images"] for batch in batches])
    for image, index in zip(images, indices.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), draw(index)[8:40, 5:37])
    assert [loader.bad[file] for file in files if file in loader.bad] == ["not an image", "empty", "empty", "empty"]
    assert "labels" not in next(iter(EvalLoader(files, resolution=32, batch_size=3)))


WORKERS_OUTLIVE_SIGNALS = """
import os, signal, sys
from fastmim.data.loader import TrainLoader
from fastmim.data.scan import scan

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
loader = TrainLoader(scan([sys.argv[1]]).files, resolution=16, crop_scale=(0.2, 1.0), flip=True, seed=0,
                     global_batch=4, micro_batch=4, workers=2)
batches = loader.batches(0)
next(batches)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.killpg(0, number)
for _ in range(30):
    next(batches)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(len(children), *children, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="process groups, prctl and /proc")
def test_workers_outlive_signals_and_die_with_their_parent(photos: Path) -> None:
    command = [sys.executable, "-c", WORKERS_OUTLIVE_SIGNALS, str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        count, *children = map(int, process.stdout.readline().split())
        assert count == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 3  # without the kernel's help they would notice after 5 seconds
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
