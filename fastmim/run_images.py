# SPDX-License-Identifier: Apache-2.0
"""The images of a run, from its options: found, split, opened, and cut into batches."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from fastmim.config import Config, ConfigT, RunConfig, update
from fastmim.data.cache import SHARE, SquareCache
from fastmim.data.inspection.statistics import measure
from fastmim.data.loader import EvalLoader, Phase, TrainLoader
from fastmim.data.order import Sample
from fastmim.data.pictures import Pictures
from fastmim.data.prepared.shard_cache import ShardCache
from fastmim.data.prepared.shards import load_sums
from fastmim.data.read import is_remote
from fastmim.data.samples import Augment
from fastmim.data.sources.scan import first_look, scan
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.machine import cores
from fastmim.seeding import derive
from fastmim.train.device import pick_workers
from fastmim.train.distributed import Ranks

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def find_images(config: Config) -> ImageTable:
    """The images of a run, of which at least one can be read.

    Raises:
        UserError: there are none, or a prepared set does not fit the options.
    """
    data = config.data
    if not data.paths:
        raise UserError("no images given: name a folder, as in 'fastmim pretrain images/'")
    table = scan(data.paths)
    check_squares(config, table, data.paths[0])
    first_look(table, data.channels, data.values == "raw")
    return table


def check_squares(config: RunConfig, table: ImageTable, path: str) -> None:
    """Refuses options that do not go with what ``path`` holds: prepared squares, or pictures of any size.

    Raises:
        UserError: they do not.
    """
    data, squares = config.data, table.squares
    if squares is not None:
        values = "raw" if squares.dtype == "float32" else "8bit"
        where = f"{path!r} holds squares"
        if (squares.channels, values) != (data.channels, data.values):
            fit = f"--channels {squares.channels} --values {values}"
            raise UserError(f"{where} of {squares.channels} channels ({values}); train on them with {fit}")
        if squares.side < data.largest:
            raise UserError(
                f"{where} of {squares.side} px, too small for --resolution {data.largest}; train with"
                f" --resolution {squares.side // 2}, or prepare them again with --resolution {data.largest}"
            )
        if data.cache != "none":
            raise UserError(f"{where} that are small already; leave --cache out")
    elif data.crop_on == "device" and data.cache == "none":
        raise UserError("--crop-on device needs squares: use what fastmim prepare wrote, or --cache ram")


def with_statistics(config: ConfigT, table: ImageTable) -> ConfigT:
    """The configuration with mean and std: ImageNet's for 8-bit colour, else measured on the images themselves."""
    data = config.data
    if data.mean is not None and data.std is not None:
        return config
    found: dict[str, tuple[float, ...]] = dict(IMAGENET)
    if data.channels != 3 or data.values == "raw":
        measured = measure(table, data.channels, data.values == "raw")
        found = {"mean": measured.mean, "std": measured.std}
    return update(config, {name: value for name, value in found.items() if getattr(data, name) is None})


def split(config: Config, table: ImageTable) -> tuple[list[int], list[int]]:
    """Rows of the training and of the held-out images; a pure function of the seed and the number of images."""
    count = min(512, round(config.data.holdout * len(table)))
    order = np.random.default_rng(derive(config.optim.seed, "holdout")).permutation(len(table))
    held_out = np.sort(order[:count])
    return np.setdiff1d(np.arange(len(table)), held_out, assume_unique=True).tolist(), held_out.tolist()


def plain_pictures(config: RunConfig, table: ImageTable) -> Pictures:
    """Pictures to look at now and then, without a cache."""
    return Pictures(table, config.data.channels, config.data.values == "raw", shards=_shard_cache(config, table))


def training_pictures(config: RunConfig, table: ImageTable, folder: Path, here: Ranks) -> Pictures:
    """Pictures to train on, of which squares are kept if the options say so."""
    data = config.data
    cache = None
    if data.cache != "none":
        cache = SquareCache(
            len(table),
            data.cache_size or 2 * data.largest,
            data.channels,
            data.values == "raw",
            # A file for each machine: two cannot map one file of a shared disk.
            path=folder / "cache" / f"squares-{socket.gethostname()}.bin" if data.cache == "disk" else None,
            fingerprint=table.fingerprint,
            share=SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", here.world)),
        )
    return Pictures(table, data.channels, data.values == "raw", cache, _shard_cache(config, table))


def crop_place(config: RunConfig, pictures: Pictures, device: torch.device) -> str:
    """Where crops are cut."""
    chosen = "device" if device.type == "cuda" and pictures.side is not None else "cpu"
    return config.data.crop_on or chosen


def phases(config: RunConfig, steps: int, world: int) -> list[Phase]:
    """Sizes of crops and micro-batches over a run of ``steps`` steps, of a resolved configuration.

    The micro-batch of the first phase shrinks as the images' area grows, so that memory stays bounded; it divides what
    each of the ``world`` ranks has of a step.
    """
    optim, course = config.optim, config.data.course
    assert optim.global_batch is not None and optim.micro_batch is not None
    share, found, done = optim.global_batch // world, [], 0.0
    for resolution, part in course:
        fits = optim.micro_batch * (course[0][0] / resolution) ** 2
        micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= max(1, fits))
        # Of a run of a few steps the last phase has one: what is handed over has its size.
        found.append(Phase(min(round(done * steps), steps - 1), resolution, micro))
        done += part
    return found


def training_loader(
    config: RunConfig,
    pictures: Pictures,
    steps: int,
    device: torch.device,
    here: Ranks,
    bad_log: Path | None,
    augment: Augment | None = None,
    order: Callable[[int], Sample] | None = None,
) -> TrainLoader:
    """The stream of batches of a resolved configuration; the last two are `TrainLoader`'s."""
    data, optim = config.data, config.optim
    assert optim.global_batch is not None and data.crop_on is not None
    return TrainLoader(
        pictures,
        phases=phases(config, steps, here.world),
        crop_scale=data.crop_scale,
        flip=data.flip,
        seed=optim.seed,
        global_batch=optim.global_batch,
        rank=here.rank,
        world_size=here.world,
        workers=pick_workers(config.system.workers, device),
        device=device,
        crop_on=data.crop_on,
        window=data.shuffle_shards if pictures.shards is not None else None,
        augment=augment,
        order=order,
        max_bad=data.max_bad,
        bad_log=bad_log,
    )


def eval_loader(
    config: RunConfig, table: ImageTable, labels: Sequence[int] | None = None, workers: int = 0
) -> EvalLoader:
    """Every image of ``table`` once, whole, with its label where there are any."""
    pictures, side = plain_pictures(config, table), config.data.resolution
    return EvalLoader(pictures, resolution=side, batch_size=64, labels=labels, workers=workers)


def _shard_cache(config: RunConfig, table: ImageTable) -> ShardCache | None:
    """Local copies of shards, where they lie in an object store."""
    if table.squares is None or not is_remote(table.containers[0]):
        return None
    system = config.system
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmim" / "shards"
    folder = Path(system.shard_cache) if system.shard_cache else default
    return ShardCache(folder, int(system.shard_cache_gb * 1e9), load_sums(table))


def waiting_remedy(
    config: RunConfig, pictures: Pictures, workers: int, device: torch.device, images_per_s: float
) -> str:
    """What would make images come faster, most fitting first.

    Args:
        config: of the run.
        pictures: what it reads.
        workers: processes that read.
        device: that waits.
        images_per_s: what they reach together.
    """
    available = cores()
    remedies = []
    if workers < available - 1:
        remedies.append(f"--workers {available - 1} (now {workers}; this machine has {available} cores)")
    data, count = config.data, len(pictures.table)
    if pictures.side is None:
        side = data.cache_size or 2 * data.largest
        if count * side * side * data.channels * pictures.dtype.itemsize < SHARE * psutil.virtual_memory().available:
            remedies.append("--cache ram in another run, as all images fit into memory")
        # Writing a square costs about as much as reading a crop, and half as much again to encode it.
        minutes = 1.5 * count / (images_per_s * available / max(1, workers)) / 60
        remedies.append(f"what fastmim prepare makes of the images, once, in about {max(1, round(minutes))} minutes")
    elif data.crop_on == "cpu" and device.type == "cuda":
        remedies.append("--crop-on device in another run")
    return "; or ".join(remedies) or "more or faster cores"
