# SPDX-License-Identifier: Apache-2.0
"""An endless stream of batches that is a pure function of (files, seed, step).

Sample number ``position`` of the stream is image ``index`` of epoch ``position // n``, and everything random about it
follows from (seed, epoch, index). So batches are the same with any number of workers and ranks, from any step on.
"""

import csv
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmim.data.augment import Box, centre_box, random_box
from fastmim.data.decode import BadImage, read_crop
from fastmim.errors import UserError
from fastmim.seeding import derive

Batch = dict[str, Tensor]
Sample = tuple[int, int]
"""(epoch, index)"""
ATTEMPTS = 16
TIMEOUT = 600  # seconds without a batch; a slow disk with large pictures may well need one or two minutes
PR_SET_PDEATHSIG = 1


class Order:
    """Where a position of the endless stream lies; every epoch visits each of ``count`` images once, in a new order."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        # Two epochs, because batches that are prefetched cross from one epoch to the next.
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(permutation, count, seed))

    def __call__(self, position: int) -> Sample:
        """The (epoch, index) of the sample at ``position``."""
        epoch, place = divmod(position, self.count)
        return epoch, int(self._permutation(epoch)[place])


def permutation(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    """A random order of ``range(count)``.

    Sorted raw numbers of Philox, whose stream NumPy promises never to change; ``Generator.permutation`` may change.
    """
    numbers = np.random.Philox(derive(seed, "order", epoch)).random_raw(count)
    return np.argsort(numbers, kind="stable")


class TrainLoader:
    """Random crops for training. ``bad`` maps every path that could not be read so far to the reason.

    Args:
        files: paths of the images.
        resolution: side of the crops in pixels.
        crop_scale: smallest and largest share of a picture's area that a crop covers.
        flip: mirror half of the crops left to right.
        seed: what order, crops, flips and keys follow from.
        global_batch: images of a step over all ranks.
        micro_batch: images of a batch that this rank yields.
        rank: which of the ranks this is; each takes its own part of every step.
        world_size: number of ranks.
        workers: processes that read images; 0 reads in this one.
        pin_memory: yield batches in page-locked memory, which a GPU copies from without waiting.
        max_bad: share of ``files`` that may be unreadable.
        bad_log: CSV file (path, reason) that lists each unreadable image once, over all sittings.

    Raises:
        ValueError: ``global_batch`` cannot be cut into micro-batches of equal size on all ranks.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        resolution: int,
        crop_scale: tuple[float, float],
        flip: bool,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        max_bad: float = 0.05,
        bad_log: Path | None = None,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global_batch {global_batch} is not divisible by micro_batch {micro_batch} x {world_size} ranks"
            )
        self._samples = _TrainSamples(tuple(files), resolution, crop_scale, flip, seed)
        self._order = Order(len(files), seed)
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._share = global_batch // world_size
        self._first = rank * self._share
        self._workers, self._pin_memory = workers, pin_memory
        self._bad = _BadImages(len(files), max_bad, bad_log)
        self.bad = self._bad.reasons

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless micro-batches, from the first one of ``start_step``.

        Each is {"images": UInt8["B 3 S S"], "keys": Int64["B"]}, ``global_batch / micro_batch / world_size`` a step.

        Raises:
            UserError: more than the allowed share of the images cannot be read.
        """
        for batch in _load(self._samples, self._micro_batches(start_step), self._workers, self._pin_memory):
            self._bad.add(batch.pop("bad"), batch.pop("complete"))
            yield batch

    def _micro_batches(self, start_step: int) -> Iterator[list[Sample]]:
        for step in itertools.count(start_step):
            start = step * self._global_batch + self._first
            for first in range(start, start + self._share, self._micro_batch):
                yield [self._order(position) for position in range(first, first + self._micro_batch)]


class EvalLoader:
    """Every image once, in order: the largest centred square, whole. Unreadable ones are left out, and in ``bad``.

    Yields {"images": UInt8["B 3 S S"], "keys": Int64["B"], "indices": Int64["B"], "labels": Int64["B"]}: ``indices``
    are places in ``files``, ``keys`` depend on them only, ``labels`` are there if they were given.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        resolution: int,
        batch_size: int,
        labels: Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        self._samples = _EvalSamples(tuple(files), resolution, None if labels is None else tuple(labels))
        self._batch_size, self._workers = batch_size, workers
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of batches; a batch of which no image can be read is not yielded."""
        return math.ceil(len(self._samples.files) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        places = range(len(self._samples.files))
        cut = (list(places[first : first + self._batch_size]) for first in places[:: self._batch_size])
        for batch in _load(self._samples, cut, self._workers, pin_memory=False):
            self.bad.update(batch.pop("bad"))
            if len(batch["images"]):
                yield batch


@dataclass(frozen=True)
class _TrainSamples(Dataset[Any]):
    """What a worker holds: it turns (epoch, index) pairs into one batch."""

    files: tuple[str, ...]
    resolution: int
    crop_scale: tuple[float, float]
    flip: bool
    seed: int

    def __getitems__(self, samples: list[Sample]) -> dict[str, Any]:
        images = torch.empty(len(samples), 3, self.resolution, self.resolution, dtype=torch.uint8)
        bad: list[tuple[str, str]] = []
        filled = [self._fill(image, *sample, bad) for image, sample in zip(images, samples, strict=True)]
        keys = torch.tensor([derive(self.seed, "key", epoch, index) for epoch, index in samples])
        return {"images": images, "keys": keys, "bad": bad, "complete": all(filled)}

    def _fill(self, image: UInt8[Tensor, "3 S S"], epoch: int, index: int, bad: list[tuple[str, str]]) -> bool:
        """Write the sample into ``image``, or another one in its place if it is bad; False if no other can be read."""
        chosen = index
        for attempt in range(ATTEMPTS):
            rng = random.Random(derive(self.seed, "crop", epoch, index))
            mirror = rng.random() < 0.5
            choose = functools.partial(random_box, rng=rng, scale=self.crop_scale)
            try:
                _read_into(image, self.files[chosen], choose, mirror and self.flip)
                return True
            except BadImage as error:
                bad.append((self.files[chosen], error.reason))
            chosen = derive(self.seed, "replace", epoch, index, attempt) % len(self.files)
        return False


@dataclass(frozen=True)
class _EvalSamples(Dataset[Any]):
    """What a worker holds: it turns places in ``files`` into one batch."""

    files: tuple[str, ...]
    resolution: int
    labels: tuple[int, ...] | None

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        images = torch.empty(len(indices), 3, self.resolution, self.resolution, dtype=torch.uint8)
        good: list[int] = []
        bad: list[tuple[str, str]] = []
        for index in indices:
            try:
                _read_into(images[len(good)], self.files[index], centre_box, mirror=False)
                good.append(index)
            except BadImage as error:
                bad.append((self.files[index], error.reason))
        batch = {
            "images": images[: len(good)],
            "keys": torch.tensor([derive(0, "eval", index) for index in good], dtype=torch.int64),
            "indices": torch.tensor(good, dtype=torch.int64),
            "bad": bad,
        }
        if self.labels is not None:
            batch["labels"] = torch.tensor([self.labels[index] for index in good], dtype=torch.int64)
        return batch


def _read_into(image: UInt8[Tensor, "3 S S"], path: str, box_of: Callable[[int, int], Box], mirror: bool) -> None:
    pixels = torch.from_numpy(read_crop(path, box_of, image.shape[-1])).permute(2, 0, 1)
    image.copy_(pixels.flip(2) if mirror else pixels)


class _BadImages:
    """Keeps the reason for every unreadable image, lists each once in a CSV file, and stops when they are too many."""

    def __init__(self, total: int, max_share: float, log: Path | None) -> None:
        self.total, self.max_share, self.log = total, max_share, log
        self.reasons: dict[str, str] = {}
        if log is not None and log.exists():
            with _open_csv(log, "r") as file:
                self.reasons = dict(row for row in itertools.islice(csv.reader(file), 1, None) if len(row) == 2)

    def add(self, found: list[tuple[str, str]], complete: bool) -> None:
        """Take note of the (path, reason) pairs of one batch, which is ``complete`` if every bad one could be replaced.

        Raises:
            UserError: too many images cannot be read.
        """
        if not found:
            return
        new = {path: reason for path, reason in found if path not in self.reasons}
        self.reasons.update(new)
        if self.log is not None and new:
            self._append(self.log, new)
        if not complete or len(self.reasons) > self.max_share * self.total:
            path, reason = next(iter(self.reasons.items()))
            where = f", all in {str(self.log)!r}" if self.log is not None else ""
            raise UserError(
                f"{len(self.reasons)} of {self.total} images ({len(self.reasons) / self.total:.1%}) cannot be read; "
                f"first {path!r}: {reason}{where}; mend or remove them, or allow more with max_bad"
            )

    @staticmethod
    def _append(log: Path, rows: dict[str, str]) -> None:
        begun = log.exists()
        with _open_csv(log, "a") as file:
            csv.writer(file).writerows(([] if begun else [("path", "reason")]) + list(rows.items()))


def _open_csv(path: Path, mode: str) -> Any:
    """Names may be any bytes: surrogateescape and newline="" bring them back unchanged."""
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")


def _load(
    samples: Dataset[Any], batches: Iterable[list[Any]], workers: int, pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """``samples.__getitems__`` of each of ``batches``, in order, by ``workers`` processes (0: in this one)."""
    parallel: dict[str, Any] = {}
    if workers:
        # fork starts at once and shares the list of files; forkserver (the default of Python 3.14) would import torch
        # anew in each worker. Elsewhere than on Linux fork is missing or breaks the system's own libraries.
        method = "fork" if sys.platform == "linux" else "spawn"
        parallel = {"multiprocessing_context": method, "timeout": TIMEOUT, "worker_init_fn": _start_worker}
    with warnings.catch_warnings():
        # The number of workers is the user's choice, and changes no result; torch warns if it is above the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        # From 3.12 on, Python warns that a lock which another thread holds stays locked in the forked child. Workers
        # take no such lock: they run Pillow, NumPy and copies of small tensors, on one thread and no device.
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin_memory,
            # The DataLoader draws a seed for its workers; from the global generator, that would change what follows.
            generator=torch.Generator(),
            **parallel,
        )
        iterator = iter(loader)
    yield from iterator


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Workers end when the main process says so or dies, and not by signals.

    A cluster sends its signals to the whole process group; a worker that died of one would fail the main process in
    the middle of its last checkpoint.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # the parent died before the line above
            os._exit(1)
