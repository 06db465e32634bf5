# SPDX-License-Identifier: Apache-2.0
"""An endless stream of batches that is a pure function of (images, seed, step).

Sample number ``position`` of the stream is image ``index`` of epoch ``position // n``, and everything random about it
follows from (seed, epoch, index). So batches are the same with any number of workers and ranks, from any step on.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmim.data.augment import centre_box
from fastmim.data.bad import MEND, BadImages
from fastmim.data.device_crop import crop_squares
from fastmim.data.order import Order, Sample, WindowedOrder
from fastmim.data.pictures import Pictures
from fastmim.data.read import BadImage
from fastmim.data.samples import Augment, Piece, TrainSamples
from fastmim.data.transfer import Transfer
from fastmim.data.workers import AHEAD, METHOD, Ring, work
from fastmim.seeding import derive

Batch = dict[str, Tensor]
# Images of one piece of work: few enough that all workers share a batch, enough that handing over costs little.
PIECE = 32


@dataclass(frozen=True)
class Phase:
    """From step ``begin`` on: crops of ``resolution`` pixels, ``micro_batch`` of them at a time."""

    begin: int
    resolution: int
    micro_batch: int


class TrainLoader:
    """Random crops for training. ``bad`` maps every path that could not be read so far to the reason.

    Args:
        pictures: what crops are taken of.
        phases: sizes of crops and batches, in order of their steps, the first from step 0 on.
        crop_scale: smallest and largest share of a picture's area that a crop covers.
        flip: mirror half of the crops left to right.
        seed: what order, crops, flips and keys follow from.
        global_batch: images of a step over all ranks.
        rank: which of the ranks this is; each takes its own part of every step.
        world_size: number of ranks.
        workers: processes that read images; 0 reads in this one.
        device: where batches are wanted.
        crop_on: "device" hands whole squares over, of which ``device`` cuts the crops; pictures must be squares then.
        window: mix only this many shards at a time (for shards in an object store); all images when not given.
        augment: what else is done to each crop; only where crops are cut on the CPU.
        order: position in the stream to sample; every image once an epoch in a random order when not given.
        max_bad: share of the images that may be unreadable.
        bad_log: CSV file (path, reason) that lists each unreadable image once, over all sittings.

    Raises:
        ValueError: ``global_batch`` cannot be cut into micro-batches of equal size on all ranks.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        phases: Sequence[Phase],
        crop_scale: tuple[float, float],
        flip: bool,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        crop_on: Literal["cpu", "device"] = "cpu",
        window: int | None = None,
        augment: Augment | None = None,
        order: Callable[[int], Sample] | None = None,
        max_bad: float = 0.05,
        bad_log: Path | None = None,
    ) -> None:
        for phase in phases:
            if global_batch % (phase.micro_batch * world_size):
                raise ValueError(
                    f"global_batch {global_batch} is not divisible by micro_batch {phase.micro_batch}"
                    f" x {world_size} ranks"
                )
        table = pictures.table
        self.pictures, self.workers, self.on_device = pictures, workers, crop_on == "device"
        self.phases = tuple(phases)
        self._windows = None if window is None else WindowedOrder(table, seed, window)
        self._order = order or Order(len(table), seed, self._windows)
        self._global_batch = global_batch
        self._share = global_batch // world_size
        self._first = rank * self._share
        side = pictures.side if self.on_device else None
        self._slots = _slots(self.phases, workers)
        self._longest = max(_bytes(phase, side, pictures) for phase in phases)
        self._samples = TrainSamples(pictures, crop_scale, flip, seed, side, None, augment)
        self._device = torch.device(device)
        mend = MEND if table.squares is None else "delete their shards and run their fastmim prepare again"
        self._bad = BadImages(len(table), max_bad, bad_log, mend)
        self.bad = self._bad.reasons

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless micro-batches on the device, from the first one of ``start_step``.

        Each is {"images": UInt8["B C S S"] (or Float32, where pictures are raw), "keys": Int64["B"], "indices":
        Int64["B"]}: ``indices`` are places among the pictures, of those that were read. There are
        ``global_batch / micro_batch / world_size`` in a step.

        Raises:
            UserError: more than the allowed share of the images cannot be read.
        """
        for resolution, batch in self.handed_over(start_step):
            images = batch["images"]
            if self.on_device:
                images = crop_squares(images, batch["boxes"], batch["mirror"], resolution)
            elif images.device.type == "cpu":
                images = images.clone()  # workers will use its memory again
            yield {"images": images, "keys": batch["keys"], "indices": batch["indices"]}

    def handed_over(self, start_step: int) -> Iterator[tuple[int, Batch]]:
        """The crops' side and the batch as the workers make it: where ``on_device``, squares, boxes and mirroring.

        On a CPU, the images are overwritten when the next batch is asked for.

        Raises:
            UserError: more than the allowed share of the images cannot be read.
        """
        parts: list[dict[str, Any]] = []
        ring = Ring(self._slots, self._longest) if not self.workers or METHOD == "fork" else None
        samples, transfer = replace(self._samples, ring=ring), Transfer(self._device)
        # Closed by name, because an exception would keep the workers for as long as somebody looks at it.
        with contextlib.closing(work(samples, self._pieces(start_step), self.workers)) as answers:
            try:
                for answer in answers:
                    transfer.lock(ring)
                    self._bad.add(answer["bad"], answer["complete"])
                    parts.append(answer)
                    if answer["last"]:
                        yield answer["resolution"], transfer.copy(self._batch(parts, ring))
                        parts = []
            finally:
                transfer.unlock()

    def _batch(self, parts: list[dict[str, Any]], ring: Ring | None) -> Batch:
        if ring is None:
            images = torch.cat([part["images"] for part in parts])
        else:
            images = ring.view(parts[0]["number"], parts[0]["shape"], self.pictures.dtype)
        found = {"images": images}
        for name in ("keys", "indices"):
            found[name] = torch.tensor([number for part in parts for number in part[name]])
        if self.on_device:
            found["boxes"] = torch.tensor([box for part in parts for box in part["boxes"]])
            found["mirror"] = torch.tensor([mirror for part in parts for mirror in part["mirror"]])
        return found

    def _pieces(self, start_step: int) -> Iterator[Piece]:
        """The work of this rank, batch by batch, cut so that all workers share a batch."""
        numbers = itertools.count()
        for step in itertools.count(start_step):
            phase = [phase for phase in self.phases if phase.begin <= step][-1]
            start = step * self._global_batch + self._first
            self._announce(start)
            for first in range(start, start + self._share, phase.micro_batch):
                samples = [self._order(position) for position in range(first, first + phase.micro_batch)]
                number = next(numbers)
                for row in range(0, len(samples), PIECE):
                    chosen = tuple(samples[row : row + PIECE])
                    yield Piece(number, row, len(samples), phase.resolution, chosen)

    def _announce(self, position: int) -> None:
        """Lets the shards of this window and the next be fetched before they are needed."""
        if self._windows is None or self.pictures.shards is None:
            return
        epoch, window = self._windows.place(position)
        containers = self.pictures.table.containers
        wanted = [*self._windows.shards(epoch, window), *self._windows.shards(epoch, window + 1)]
        self.pictures.shards.prefetch([containers[shard] for shard in wanted])


def _slots(phases: Sequence[Phase], workers: int) -> int:
    """Batches that the ring must hold: those being filled, and the one that was handed over last."""
    pieces = min(math.ceil(phase.micro_batch / PIECE) for phase in phases)
    return 2 + math.ceil((AHEAD * workers + 1) / pieces)


def _bytes(phase: Phase, side: int | None, pictures: Pictures) -> int:
    size = side or phase.resolution
    return phase.micro_batch * size * size * pictures.channels * pictures.dtype.itemsize


class EvalLoader:
    """Every image once, in order: the largest centred square, whole. Unreadable ones are left out, and in ``bad``.

    Yields {"images": UInt8["B C S S"], "keys": Int64["B"], "indices": Int64["B"], "labels": Int64["B"]}: ``indices``
    are places among the pictures, ``keys`` depend on them only, ``labels`` are there if they were given.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        resolution: int,
        batch_size: int,
        labels: Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        self.pictures, self.resolution, self.labels = pictures, resolution, labels
        self._batch_size, self._workers = batch_size, workers
        self.bad: dict[str, str] = {}

    def at(self, resolution: int) -> "EvalLoader":
        """The same images at another size."""
        return EvalLoader(
            self.pictures,
            resolution=resolution,
            batch_size=self._batch_size,
            labels=self.labels,
            workers=self._workers,
        )

    def __len__(self) -> int:
        """Number of batches; a batch of which no image can be read is not yielded."""
        return math.ceil(len(self.pictures.table) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        places = range(len(self.pictures.table))
        cut = (list(places[first : first + self._batch_size]) for first in places[:: self._batch_size])
        samples = _EvalSamples(self.pictures, self.resolution)
        with contextlib.closing(work(samples, cut, self._workers)) as answers:
            for answer in answers:
                self.bad.update(answer["bad"])
                if answer["good"]:
                    yield self._batch(answer["images"], answer["good"])

    def _batch(self, images: Tensor, good: list[int]) -> Batch:
        keys = torch.tensor([derive(0, "eval", index) for index in good])
        batch = {"images": images, "keys": keys, "indices": torch.tensor(good)}
        if self.labels is not None:
            batch["labels"] = torch.tensor([self.labels[index] for index in good])
        return batch


@dataclass(frozen=True)
class _EvalSamples(Dataset[Any]):
    """What a worker holds: it turns places among the pictures into one batch."""

    pictures: Pictures
    resolution: int

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        shape = (len(indices), self.pictures.channels, self.resolution, self.resolution)
        images = torch.empty(shape, dtype=self.pictures.dtype)
        good: list[int] = []
        bad: list[tuple[str, str]] = []
        for index in indices:
            try:
                picture = self.pictures.open(index)
                box = centre_box(picture.width, picture.height)
                images[len(good)] = picture.crop(box, self.resolution)
                good.append(index)
            except BadImage as error:
                bad.append((self.pictures.table.path(index), error.reason))
        return {"images": images[: len(good)], "good": good, "bad": bad}
