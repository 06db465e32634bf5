# SPDX-License-Identifier: Apache-2.0
"""The stream of batches is a pure function of (files, seed, step), whatever the workers, the ranks and the damage."""

import csv
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image

from fastmim.data.augment import random_box
from fastmim.data.cache import SquareCache
from fastmim.data.decoding.decode import open_image
from fastmim.data.loader import PIECE, Batch, EvalLoader, Phase, TrainLoader
from fastmim.data.order import Order
from fastmim.data.pictures import Pictures
from fastmim.data.prepared.plan import Options
from fastmim.data.prepared.prepare import prepare
from fastmim.data.prepared.shards import load_prepared
from fastmim.data.sources.scan import scan
from fastmim.data.table import ImageTable, from_names, join
from fastmim.errors import UserError
from fastmim.seeding import derive

STEPS = 12  # of 16 samples: nearly five epochs of 40 images
OPTIONS: dict[str, Any] = {"crop_scale": (0.2, 1.0), "flip": True, "seed": 7, "global_batch": 16}


@pytest.fixture(scope="module")
def files(photos: Path) -> ImageTable:
    return scan([str(photos)])


def loader_of(table: ImageTable, resolution: int = 32, micro_batch: int = 4, **changes: Any) -> TrainLoader:
    return TrainLoader(Pictures(table), phases=[Phase(0, resolution, micro_batch)], **OPTIONS | changes)


def take(loader: TrainLoader, start: int, stop: int, micro_batches: int = 4) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), (stop - start) * micro_batches))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def stream(files: ImageTable) -> list[Batch]:
    return take(loader_of(files), 0, STEPS)


def test_a_batch(stream: list[Batch]) -> None:
    for batch in stream:
        assert batch.keys() == {"images", "keys", "indices"}
        assert batch["indices"].shape == (4,) and batch["indices"].dtype == torch.int64
        assert batch["images"].shape == (4, 3, 32, 32) and batch["images"].dtype == torch.uint8
        assert batch["images"].is_contiguous()
        assert batch["keys"].shape == (4,) and batch["keys"].dtype == torch.int64
    keys = torch.cat([batch["keys"] for batch in stream])
    assert len(keys.unique()) == STEPS * 16


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int, files: ImageTable, stream: list[Batch]) -> None:
    assert same(take(loader_of(files, workers=workers), 0, STEPS), stream)


def test_from_every_step_on_it_is_the_same(files: ImageTable, stream: list[Batch]) -> None:
    loader = loader_of(files)
    for start in range(STEPS - 1):
        assert same(take(loader, start, start + 2), stream[4 * start : 4 * start + 8])
    parallel = loader_of(files, workers=2)
    assert same(take(parallel, 5, STEPS), stream[20:])


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_ranks_share_what_one_rank_has(micro_batch: int, files: ImageTable, stream: list[Batch]) -> None:
    ranks = [
        take(loader_of(files, micro_batch=micro_batch, rank=rank, world_size=2), 0, 4, 8 // micro_batch)
        for rank in range(2)
    ]
    for step in range(4):
        per_step = [ranks[r][step * 8 // micro_batch : (step + 1) * 8 // micro_batch] for r in range(2)]
        images = torch.cat([batch["images"] for part in per_step for batch in part])
        assert torch.equal(images, torch.cat([batch["images"] for batch in stream[4 * step : 4 * step + 4]]))


def test_a_batch_that_cannot_be_shared_is_refused(files: ImageTable) -> None:
    with pytest.raises(ValueError, match="16 is not divisible by micro_batch 4 x 3"):
        loader_of(files, world_size=3)


def test_a_folder_smaller_than_a_batch(files: ImageTable) -> None:
    (batch,) = take(loader_of(files.take([0, 1, 2]), micro_batch=16), 0, 1, 1)
    assert batch["images"].shape == (16, 3, 32, 32) and len(batch["keys"].unique()) == 16


def test_a_sample_is_its_file_cropped_and_perhaps_mirrored(files: ImageTable) -> None:
    order = Order(40, seed=7)
    loader = loader_of(files, 48, crop_scale=(1.0, 1.0))  # 48 px squares: nothing but the whole fits
    mirrored = 0
    for step, batch in enumerate(take(loader, 0, 3, 4)):
        for place in range(4):
            epoch, index = order(4 * step + place)
            assert batch["keys"][place] == derive(7, "key", epoch, index)
            pixels = open_image(files.read(index)).whole()
            mirrored += torch.equal(batch["images"][place], pixels.flip(2))
            assert torch.equal(batch["images"][place], pixels) or torch.equal(batch["images"][place], pixels.flip(2))
    assert 10 < mirrored < 38


def test_without_flip_the_crops_stay(files: ImageTable, stream: list[Batch]) -> None:
    plain = take(loader_of(files, flip=False), 0, 2)
    same_way = 0
    for one, other in zip(plain, stream[:8], strict=True):
        for a, b in zip(one["images"], other["images"], strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(2), b)
            same_way += torch.equal(a, b)
    assert 4 < same_way < 28


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_randomness_is_used(workers: int, files: ImageTable) -> None:
    # Python's own generator is compared by results only: beartype, which checks types during tests, draws from it.
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = take(loader_of(files, workers=workers), 0, 2)
    list(EvalLoader(Pictures(files), resolution=16, batch_size=8, workers=workers))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    random.seed(12345)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert same(take(loader_of(files, workers=workers), 0, 2), first)


@pytest.fixture
def damaged(tmp_path: Path, files: ImageTable) -> ImageTable:
    """40 files, of which two cannot be read; their names are as bad as names can be."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for index in range(len(files)):
        (folder / f"{index:03d}.jpg").write_bytes(files.read(index))
    (folder / "003.jpg").rename(folder / 'a "b",\nc.jpg')
    (folder / 'a "b",\nc.jpg').write_bytes(b"not an image")
    (folder / "017.jpg").rename(os.fsdecode(os.fsencode(folder) + b"/z\xff\xe9.jpg"))
    Path(os.fsdecode(os.fsencode(folder) + b"/z\xff\xe9.jpg")).write_bytes(b"")
    return scan([str(folder)])


def read_log(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_bad_images_are_replaced_and_listed_once(damaged: ImageTable, tmp_path: Path) -> None:
    log = tmp_path / "bad_images.csv"
    paths = [damaged.path(index) for index in range(40)]
    first_bad, last = (path for path in paths if not Path(path).stem.isdigit())
    expected = {first_bad: "not an image", last: "empty"}
    loader = loader_of(damaged, bad_log=log)
    first = take(loader, 0, STEPS)
    assert loader.bad == expected
    assert read_log(log)[0] == ["path", "reason"] and dict(read_log(log)[1:]) == expected and len(read_log(log)) == 3
    order = Order(40, seed=7)
    for position in range(STEPS * 16):
        epoch, index = order(position)
        batch = first[position // 4]
        assert batch["keys"][position % 4] == derive(7, "key", epoch, index)
        assert batch["images"][position % 4].float().std() > 5  # a picture, and not what memory held
    resumed = loader_of(damaged, bad_log=log, workers=3)
    assert resumed.bad == expected
    assert same(take(resumed, 3, STEPS), first[12:])
    assert len(read_log(log)) == 3


def test_replacing_one_changes_no_other_sample(files: ImageTable, stream: list[Batch], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.touch()
    paths = [files.path(index) for index in range(40)]
    paths[11] = str(bad)
    swapped = take(loader_of(from_names("", paths, [1] * 40)), 0, STEPS)
    order = Order(40, seed=7)
    for position in range(STEPS * 16):
        one, other = (batches[position // 4]["images"][position % 4] for batches in (stream, swapped))
        assert torch.equal(one, other) == (order(position)[1] != 11)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(workers: int, files: ImageTable, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").touch()
    mixed = join([files.take(range(17)), scan([str(tmp_path)])])
    log = tmp_path / "bad_images.csv"
    with pytest.raises(UserError) as caught:
        take(loader_of(mixed, workers=workers, max_bad=0.1, bad_log=log), 0, STEPS)
    expected = r"3 of 20 images \(15.0%\) cannot be read; first '.*\d.jpg': empty, all in '.*bad_images.csv'"
    assert re.match(expected, str(caught.value)) and "\n" not in str(caught.value)
    assert len(read_log(log)) == 4
    assert len(take(loader_of(mixed, workers=workers, max_bad=0.15), 0, STEPS)) == 4 * STEPS


def test_only_bad_images_end_even_if_allowed(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").touch()
    with pytest.raises(UserError, match="of 4 images"):
        take(loader_of(scan([str(tmp_path)]), max_bad=1.0), 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_all_in_order(workers: int, tmp_path: Path) -> None:
    for index in range(10):
        Image.fromarray(draw(index)[:, 5:37]).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").write_bytes(b"text")
    for index in (6, 7, 8):
        (tmp_path / f"{index}.png").write_bytes(b"")
    files = scan([str(tmp_path)])
    loader = EvalLoader(Pictures(files), resolution=32, batch_size=3, labels=list(range(100, 110)), workers=workers)
    batches = list(loader)
    assert len(loader) == 4 and [len(batch["images"]) for batch in batches] == [3, 2, 1]
    indices = torch.cat([batch["indices"] for batch in batches])
    assert indices.tolist() == [0, 1, 2, 3, 5, 9] and indices.dtype == torch.int64
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [100, 101, 102, 103, 105, 109]
    assert torch.cat([batch["keys"] for batch in batches]).unique().numel() == 6
    images = torch.cat([batch["images"] for batch in batches])
    for image, index in zip(images, indices.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), draw(index)[8:40, 5:37])
    reasons = [loader.bad.get(files.path(index), "") for index in range(10)]
    assert reasons == [*[""] * 4, "not an image", "", "empty", "empty", "empty", ""]
    assert "labels" not in next(iter(EvalLoader(Pictures(files), resolution=32, batch_size=3)))


WORKERS_OUTLIVE_SIGNALS = """
import os, signal, sys
from fastmim.data.loader import Phase, TrainLoader
from fastmim.data.pictures import Pictures
from fastmim.data.sources.scan import scan

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
loader = TrainLoader(Pictures(scan([sys.argv[1]])), phases=[Phase(0, 16, 4)], crop_scale=(0.2, 1.0), flip=True,
                     seed=0, global_batch=4, workers=2)
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
        try:
            assert process.stdout is not None
            count, *children = map(int, process.stdout.readline().split())
            assert count == 2
        finally:
            process.kill()
    deadline = time.monotonic() + 3  # without the kernel's help they would notice after 5 seconds
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_sizes_change_without_new_workers(files: ImageTable) -> None:
    phases = [Phase(0, 32, 4), Phase(2, 48, 2), Phase(3, 16, 8)]
    loader = TrainLoader(Pictures(files), phases=phases, **OPTIONS, workers=2)
    others = {child.pid for child in multiprocessing.active_children()}  # of tests before
    batches = loader.batches(0)
    shapes, children = [], set()
    for _ in range(4 + 4 + 8 + 2):
        shapes.append(tuple(next(batches)["images"].shape))
        children.add(frozenset(child.pid for child in multiprocessing.active_children()) - others)
    assert shapes == [*[(4, 3, 32, 32)] * 8, *[(2, 3, 48, 48)] * 8, *[(8, 3, 16, 16)] * 2]
    assert len(children) == 1 and len(children.pop()) == 2


def test_batches_that_are_kept_do_not_change(files: ImageTable, stream: list[Batch]) -> None:
    """The memory in which workers write is used again; what was yielded is not."""
    assert same(take(loader_of(files, workers=3), 0, 40), take(loader_of(files), 0, 40))


def test_a_batch_of_several_pieces_is_one_batch(files: ImageTable) -> None:
    whole = {"micro_batch": 80, "global_batch": 80}
    assert 2 * PIECE < 80
    (one,), (other,) = (take(loader_of(files, **whole, workers=workers), 0, 1, 1) for workers in (0, 3))
    small = take(loader_of(files, **whole | {"micro_batch": 8}), 0, 1, 10)
    assert same([one], [other])
    assert torch.equal(one["images"], torch.cat([batch["images"] for batch in small]))


def squares_of(files: ImageTable, **options: Any) -> Pictures:
    return Pictures(files, cache=SquareCache(len(files), 64, 3), **options)


def test_a_cache_changes_nothing_from_epoch_to_epoch_or_after_a_resume(files: ImageTable) -> None:
    """Whether a square was there already or is made now, the crops of it are the same."""

    def of(pictures: Pictures, start: int, stop: int, workers: int = 0) -> list[Batch]:
        loader = TrainLoader(pictures, phases=[Phase(0, 32, 4)], **OPTIONS, workers=workers)
        return take(loader, start, stop)

    pictures = squares_of(files)
    first = of(pictures, 0, 8)
    assert pictures.cache is not None and len(pictures.cache) == 40
    assert same(of(pictures, 0, 8), first)  # all from the cache
    assert same(of(squares_of(files), 5, 8, workers=2), first[20:])  # an empty one, from the middle on
    half = Pictures(files.take(range(40)), cache=SquareCache(17, 64, 3))
    assert same(of(half, 0, 8), first)  # room for some only


def test_every_way_sees_the_same_samples_crops_and_masks(files: ImageTable, tmp_path: Path) -> None:
    """One digest of (image, box, mirroring, key) for any workers, any ranks, folder, prepared and cached."""
    prepared = prepare(files, tmp_path / "set", Options(size=64, shard_images=16), workers=0, quiet=True)
    assert prepared.images == 40
    tables = {
        "folder": Pictures(files),
        "prepared": Pictures(load_prepared(str(tmp_path / "set"))),
        "cached": squares_of(files),
    }
    digests = set()
    for name, pictures in tables.items():
        for workers, ranks in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2)):
            # Squares come with their boxes, which show what was chosen; a folder's crops are compared by keys.
            crop_on = "cpu" if name == "folder" else "device"
            parts = []
            for rank in range(ranks):
                loader = TrainLoader(
                    pictures, phases=[Phase(0, 32, 4)], **OPTIONS, workers=workers, rank=rank, world_size=ranks,
                    crop_on=crop_on,
                )  # fmt: skip
                parts.append([batch for _, batch in itertools.islice(loader.handed_over(0), 5 * 4 // ranks)])
            per_rank = 4 // ranks
            order = [
                parts[rank][step * per_rank + n] for step in range(5) for rank in range(ranks) for n in range(per_rank)
            ]
            keys = torch.cat([batch["keys"] for batch in order])
            boxes = torch.cat([batch["boxes"] for batch in order]) if crop_on == "device" else None
            digests.add((name == "folder", keys.numpy().tobytes(), b"" if boxes is None else boxes.numpy().tobytes()))
    assert len(digests) == 2  # with boxes and without
    assert len({keys for _, keys, _ in digests}) == 1


def test_crops_on_the_device_are_crops_on_the_cpu(files: ImageTable) -> None:
    loaders = [
        TrainLoader(squares_of(files), phases=[Phase(0, 32, 4)], **OPTIONS, crop_on=place)
        for place in ("cpu", "device")
    ]
    errors = []
    for one, other in zip(*(take(loader, 0, 10) for loader in loaders), strict=True):
        assert torch.equal(one["keys"], other["keys"]) and one["images"].shape == other["images"].shape
        errors += (one["images"].float() - other["images"].float()).square().flatten(1).mean(1).tolist()
    # The CPU rounds boxes to whole pixels, at most half a pixel on each side.
    assert 10 * np.log10(255**2 / np.mean(errors)) > 30


def test_the_crops_of_every_way_have_one_distribution(tmp_path: Path) -> None:
    """Scale, shape and place of crops, found again in the pixels: colours that tell where in the picture they are."""
    y, x = np.mgrid[:300, :400]
    ramp = np.stack([x * 255 / 399, y * 255 / 299, np.full(x.shape, 128.0)], 2).round().astype(np.uint8)
    (tmp_path / "in").mkdir()
    for index in range(8):
        Image.fromarray(ramp).save(tmp_path / "in" / f"{index}.png")
    table = scan([str(tmp_path / "in")])
    prepare(table, tmp_path / "set", Options(size=128, format="raw"), workers=0, quiet=True)
    rng = random.Random(0)
    boxes = [random_box(400, 300, rng, (0.2, 1.0)) for _ in range(1500)]
    expected = np.array([[b.left / 400, b.right / 400, b.top / 300, b.bottom / 300] for b in boxes])
    ways = [
        Pictures(table),
        Pictures(table, cache=SquareCache(8, 128, 3)),
        Pictures(load_prepared(str(tmp_path / "set"))),
    ]
    for pictures in ways:
        for crop_on in ("cpu", "device") if pictures.side else ("cpu",):
            loader = TrainLoader(
                pictures, phases=[Phase(0, 32, 100)], crop_scale=(0.2, 1.0), flip=False, seed=1, global_batch=100,
                crop_on=crop_on,
            )  # fmt: skip
            images = torch.cat([batch["images"] for batch in itertools.islice(loader.batches(0), 15)]).double() / 255
            # A line through the middle of the crop gives its edges.
            across, down = images[:, 0, 16], images[:, 1, :, 16]
            edges = []
            for line in (across, down):
                slope = (line[:, 24] - line[:, 8]) / 16
                middle = (line[:, 15] + line[:, 16]) / 2
                edges += [middle - 16 * slope, middle + 16 * slope]
            found = torch.stack(edges, 1).numpy()
            measures = {
                "area": lambda e: (e[:, 1] - e[:, 0]) * (e[:, 3] - e[:, 2]),
                "shape": lambda e: (e[:, 1] - e[:, 0]) / (e[:, 3] - e[:, 2]),
                "left": lambda e: e[:, 0],
                "top": lambda e: e[:, 2],
            }
            for name, measure in measures.items():
                assert kolmogorov(measure(found), measure(expected)) < 1.63 * np.sqrt(2 / 1500) + 0.01, (name, crop_on)


def kolmogorov(one: np.ndarray, other: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions."""
    places = np.sort(np.concatenate([one, other]))
    counts = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (one, other)]
    return float(np.abs(counts[0] - counts[1]).max())


FORGOTTEN = """
import sys
from fastmim.data.loader import Phase, TrainLoader
from fastmim.data.pictures import Pictures
from fastmim.data.sources.scan import scan

loader = TrainLoader(Pictures(scan([sys.argv[1]])), phases=[Phase(0, 16, 4)], crop_scale=(0.2, 1.0), flip=True,
                     seed=0, global_batch=4, workers=2)
batches = loader.batches(0)
next(batches)
sys.exit(3)
"""


def test_a_program_that_ends_in_the_middle_ends(photos: Path) -> None:
    """Workers ignore the signal by which Python would end them, so it would wait for ever."""
    call = [sys.executable, "-c", FORGOTTEN, str(photos)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, "")
