# SPDX-License-Identifier: Apache-2.0
"""How fast images come, from a folder and prepared, against Pillow + torchvision's RandomResizedCrop in the same run.

    python benchmarks/data.py PHOTOS [--rounds 5] [--resolution 128]

PHOTOS is a folder of some hundred JPEGs of about 500 x 400 px. Every method reads files, decodes, crops and hands over
whole batches of bytes by one worker process (two, where it says so); "baseline" is what MAE's and FastMIM's recipes do:
a DataLoader over Pillow and torchvision's RandomResizedCrop (bicubic) and flip, but bytes, not floats. Methods take
turns, and each round gives a ratio to the baseline of the same round; rows hold the medians. Nothing else should run
meanwhile.
"""

import argparse
import io
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rows
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

from fastmim.data.augment import random_box
from fastmim.data.cache import SquareCache
from fastmim.data.decoding.decode import open_image
from fastmim.data.device_crop import crop_squares
from fastmim.data.loader import Phase, TrainLoader
from fastmim.data.order import Order
from fastmim.data.pictures import Pictures
from fastmim.data.prepared.plan import Options
from fastmim.data.prepared.prepare import prepare
from fastmim.data.prepared.shards import load_prepared
from fastmim.data.samples import Piece, TrainSamples
from fastmim.data.sources.scan import scan
from fastmim.data.table import ImageTable
from fastmim.data.workers import Ring
from fastmim.mim.targets import HOG

BATCH = 128
SCALE = (0.2, 1.0)
KINDS: tuple[Literal["jpeg", "raw"], ...] = ("jpeg", "raw")


class Baseline(Dataset[torch.Tensor]):
    """MAE's recipe, without floats."""

    def __init__(self, table: ImageTable, resolution: int) -> None:
        self.paths = [table.path(index) for index in range(len(table))]
        self.crop = RandomResizedCrop(resolution, scale=SCALE, interpolation=InterpolationMode.BICUBIC)
        self.flip = RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index % len(self.paths)]) as image:
            crop = self.flip(self.crop(image.convert("RGB")))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def baseline(table: ImageTable, resolution: int, workers: int) -> Iterator[int]:
    """Images of each batch, for ever."""
    order = Order(len(table), 0)
    batches = ([order(first + place)[1] for place in range(BATCH)] for first in itertools.count(0, BATCH))
    loader: DataLoader[torch.Tensor] = DataLoader(
        Baseline(table, resolution), batch_sampler=batches, num_workers=workers, worker_init_fn=one_thread
    )  # type: ignore[arg-type]
    for batch in loader:
        yield len(batch)


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def ours(pictures: Pictures, resolution: int, workers: int, crop_on: Literal["cpu", "device"] = "cpu") -> Iterator[int]:
    """Images of each batch, for ever; crops on the device are timed apart."""
    loader = TrainLoader(
        pictures,
        phases=[Phase(0, resolution, BATCH)],
        crop_scale=SCALE,
        flip=True,
        seed=0,
        global_batch=BATCH,
        workers=workers,
        crop_on=crop_on,
    )
    batches = (batch for _, batch in loader.handed_over(0)) if crop_on == "device" else loader.batches(0)
    for batch in batches:
        yield len(batch["images"])


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images a second over at least ``seconds``, after what workers had ready was taken."""
    for _ in range(4):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        count += next(batches)
    return count / (time.perf_counter() - begin)


def compare(
    methods: Mapping[str, Callable[[], Iterator[int]]], rounds: int, seconds: float
) -> dict[str, tuple[float, float]]:
    """(images a second, times the first method), medians over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in methods}
    first = next(iter(methods))
    for number in range(rounds):
        for name, start in methods.items():
            batches = start()
            rates[name].append(rate(batches, seconds))
            batches.close()  # type: ignore[attr-defined]
            print(f"round {number + 1}/{rounds}  {name:34} {rates[name][-1]:8.0f} images/s", flush=True)
    base = rates[first]
    ratios = {name: [one / other for one, other in zip(found, base, strict=True)] for name, found in rates.items()}
    return {name: (statistics.median(rates[name]), statistics.median(ratios[name])) for name in methods}


def large_photos(table: ImageTable, folder: Path, count: int = 16) -> ImageTable:
    """Photos of 3840 x 2160 px, enlarged from those that there are."""
    folder.mkdir()
    for index in range(count):
        whole = Image.fromarray(open_image(table.read(index)).whole().permute(1, 2, 0).numpy())
        whole.resize((3840, 2160), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
    return scan([str(folder)])


def cached(table: ImageTable, resolution: int, size: int, seconds: float) -> tuple[float, float]:
    """Images a second of the first and of later epochs with ``--cache ram``."""
    pictures = Pictures(table, cache=SquareCache(len(table), size, 3))
    batches = ours(pictures, resolution, 1)
    count, begin = 0, time.perf_counter()
    while count < len(table):
        count += next(batches)
    first = count / (time.perf_counter() - begin)
    later = rate(batches, seconds)
    batches.close()  # type: ignore[attr-defined]
    return first, later


def alone(table: ImageTable, resolution: int, count: int) -> float:
    """Images a second of a worker's own work, in this process: no collating, no handing over."""
    order = Order(len(table), 0)
    ring = Ring(1, 32 * 3 * resolution**2)
    samples = TrainSamples(Pictures(table), SCALE, True, 0, None, ring)
    begin = time.perf_counter()
    for first in range(0, count, 32):
        places = tuple(order(first + place) for place in range(32))
        samples.__getitems__(Piece(0, 0, 32, resolution, places))
    return count / (time.perf_counter() - begin)


def device_crop(device: torch.device, size: int, resolution: int) -> float:
    """Microseconds that an image costs the device."""
    squares = torch.randint(0, 256, (512, size, size, 3), dtype=torch.uint8, device=device)
    boxes = torch.tensor([[0.1, 0.2, 0.8, 0.9]], device=device).mul(size).expand(512, 4)
    mirror = torch.zeros(512, dtype=torch.bool, device=device)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        crop_squares(squares, boxes, mirror, resolution)[0, 0, 0, 0].item()
        times.append((time.perf_counter() - begin) / 512)
    return 1e6 * statistics.median(times)


def quality(table: ImageTable, other: Pictures | None, resolution: int, count: int) -> dict[str, str]:
    """PSNR, HOG error over HOG variance and HOG cosine of crops against full decoding by Pillow and exact boxes."""
    pictures = other or Pictures(table)
    hog = HOG(3, 8)
    psnr, error, variance, cosine = [], 0.0, 0.0, []
    for index in range(min(count, len(table))):
        rng = random.Random(index)
        picture = pictures.open(index)
        box = random_box(picture.width, picture.height, rng, SCALE)
        with Image.open(io.BytesIO(table.read(index))) as image:
            whole = ImageOps.exif_transpose(image).convert("RGB")
        exact = np.array(whole.crop(box).resize((resolution, resolution), Image.Resampling.BICUBIC))
        one, two = torch.from_numpy(exact).permute(2, 0, 1).float(), picture.crop(box, resolution).float()
        psnr.append(10 * math.log10(255**2 / max(1e-3, (one - two).square().mean().item())))
        a, b = hog(one[None]), hog(two[None])
        error += (a - b).square().sum().item()
        variance += (a - a.mean((2, 3), keepdim=True)).square().sum().item()
        cosine.append(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
    psnr.sort()
    return {
        "psnr": f"{statistics.fmean(psnr):.1f}",
        "psnr_p5": f"{psnr[len(psnr) // 20]:.1f}",
        "hog_error": f"{error / variance:.4f}",
        "hog_cosine": f"{statistics.fmean(cosine):.4f}",
    }


def prepared(table: ImageTable, scratch: Path, size: int, kind: Literal["jpeg", "raw"]) -> tuple[ImageTable, float]:
    """A prepared set of ``table``, and images a second of its making by one process."""
    out = scratch / f"{kind}-{size}"
    begin = time.perf_counter()
    prepare(table, out, Options(size=size, format=kind), workers=1, quiet=True)
    return load_prepared(str(out)), len(table) / (time.perf_counter() - begin)


def main() -> None:
    """Measures everything and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 224, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin, resolution = rows.origin(), options.resolution
    table = scan([str(options.photos)])
    found: list[dict[str, Any]] = []

    def note(name: str, speed: float, ratio: float | str, **facts: Any) -> None:
        empty = dict.fromkeys(("psnr", "psnr_p5", "hog_error", "hog_cosine", "kib"), "")
        fact = {"method": name, "resolution": resolution, "images_per_s": f"{speed:.0f}"}
        found.append(fact | {"ratio": f"{ratio:.2f}" if isinstance(ratio, float) else ratio} | empty | facts | origin)
        print(*list(found[-1].values())[:8])

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        methods = {
            "folder, baseline": partial(baseline, table, resolution, 1),
            "folder, baseline, 2 workers": partial(baseline, table, resolution, 2),
            "folder": partial(ours, Pictures(table), resolution, 1),
            "folder, 2 workers": partial(ours, Pictures(table), resolution, 2),
        }
        facts: dict[str, dict[str, str]] = {"folder": quality(table, None, resolution, 200)}
        for size, kind in itertools.product(options.sizes, KINDS):
            small, speed = prepared(table, scratch, size, kind)
            pictures, name = Pictures(small), f"prepared {kind} {size}"
            note(f"prepare {kind} {size}", speed, "")
            methods[f"{name}, crop on CPU"] = partial(ours, pictures, resolution, 1)
            methods[f"{name}, squares"] = partial(ours, pictures, resolution, 1, "device")
            kib = f"{small.bytes / len(small) / 1024:.1f}"
            facts[f"{name}, crop on CPU"] = quality(table, pictures, resolution, 200) | {"kib": kib}
        for name, (speed, ratio) in compare(methods, options.rounds, options.seconds).items():
            note(name, speed, ratio, **facts.get(name, {}))
        large = large_photos(table, scratch / "large")
        pair = {"4k photos, baseline": partial(baseline, large, resolution, 1)}
        pair["4k photos"] = partial(ours, Pictures(large), resolution, 1)
        for name, (speed, ratio) in compare(pair, options.rounds, options.seconds).items():
            note(name, speed, ratio)
        epochs = [cached(table, resolution, 2 * resolution, options.seconds) for _ in range(options.rounds)]
        note("cache ram, first epoch", statistics.median(first for first, _ in epochs), "")
        later = statistics.median(later for _, later in epochs)
        note("cache ram, later epochs", later, statistics.median(two / one for one, two in epochs))
        pairs = [
            (alone(table, resolution, 1024), rate(ours(Pictures(table), resolution, 1), options.seconds))
            for _ in range(options.rounds)
        ]
        work = statistics.median(one for one, _ in pairs)
        note("folder, a worker's work alone", work, statistics.median(two / one for one, two in pairs))
        for device in [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available():
            size = options.sizes[-1]
            cost = device_crop(device, size, resolution)
            note(f"crop of {size} px squares on {device.type}", 1e6 / cost, "")
    print(rows.append("data", found))


if __name__ == "__main__":
    main()
