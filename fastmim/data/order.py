# SPDX-License-Identifier: Apache-2.0
"""In which order images are seen: a pure function of (images, seed, epoch), so that its state is one integer.

Images that can be read in any order are permuted as a whole. Shards in an object store are not read image by image:
there the order of the shards is random, and the images of ``window`` shards at a time are mixed. That mixes well,
because a prepared shard holds one of every so many images of the source: something of all, however they were sorted.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

from fastmim.data.table import ImageTable
from fastmim.seeding import derive

Sample = tuple[int, int]
"""(epoch, index)"""


class Order:
    """Where a position of the endless stream lies; every epoch visits each of ``count`` images once, in a new order.

    Args:
        count: number of images.
        seed: what the order follows from.
        epoch_order: the order of an epoch, a permutation of ``range(count)``; uniform over all when not given.
    """

    def __init__(
        self, count: int, seed: int, epoch_order: Callable[[int], Int64[np.ndarray, " count"]] | None = None
    ) -> None:
        self.count = count
        chosen = epoch_order or functools.partial(permutation, count, seed)
        # Two epochs, because batches that are prefetched cross from one epoch to the next.
        self._permutation = functools.lru_cache(maxsize=2)(chosen)

    def __call__(self, position: int) -> Sample:
        """The (epoch, index) of the sample at ``position``."""
        epoch, place = divmod(position, self.count)
        return epoch, int(self._permutation(epoch)[place])


def permutation(count: int, seed: int, epoch: int, purpose: str = "order") -> Int64[np.ndarray, " count"]:
    """A random order of ``range(count)``.

    Sorted raw numbers of Philox, whose stream NumPy promises never to change; ``Generator.permutation`` may change.
    """
    numbers = np.random.Philox(derive(seed, purpose, epoch)).random_raw(count)
    return np.argsort(numbers, kind="stable")


class BalancedOrder:
    """Where a position of the endless stream lies, if every class is drawn equally often, however many images it has.

    An epoch has as many draws as there are images. Of a class its images come in random orders, one round after
    another, which go on from epoch to epoch: so a large class is visited as a whole in time, and what stands for the
    epoch in a sample is its round, so that no sample comes twice.

    Args:
        labels: the class of each image, from 0; no class is empty.
        seed: what the order follows from.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        self.seed, self.count = seed, len(labels)
        every = np.asarray(labels)
        self._members = [np.flatnonzero(every == label) for label in range(int(every.max()) + 1)]
        self._samples = functools.lru_cache(maxsize=2)(self._draw)

    def __call__(self, position: int) -> Sample:
        """The (round, index) of the sample at ``position``."""
        epoch, place = divmod(position, self.count)
        return self._samples(epoch)[place]

    def _draw(self, epoch: int) -> list[Sample]:
        drawn: list[Sample] = []
        for label, members in enumerate(self._members):
            begin, end = self._until(label, epoch), self._until(label, epoch + 1)
            for turn in range(begin // len(members), (end - 1) // len(members) + 1):
                order = members[permutation(len(members), derive(self.seed, "balanced", label), turn)]
                first = turn * len(members)
                drawn += [(turn, int(index)) for index in order[max(0, begin - first) : end - first]]
        return [drawn[place] for place in permutation(self.count, self.seed, epoch)]

    def _until(self, label: int, epoch: int) -> int:
        """Draws of a class before an epoch begins; what classes do not share evenly goes to others each time."""
        each, left = divmod(self.count, len(self._members))
        return epoch * each + int(((label + np.arange(epoch)) % len(self._members) < left).sum())


class WindowedOrder:
    """The order of an epoch over the shards of ``table``: shards at random, ``window`` of them mixed at a time.

    Args:
        table: its containers are the shards.
        seed: what the order follows from.
        window: shards that are mixed.
    """

    def __init__(self, table: ImageTable, seed: int, window: int) -> None:
        self.seed, self.window = seed, window
        by_shard = np.argsort(table.container, kind="stable")
        sorted_containers = table.container[by_shard]
        begins = np.flatnonzero(np.diff(sorted_containers, prepend=-1))
        self._rows = np.split(by_shard, begins[1:])
        self._shard = sorted_containers[begins]
        self._sizes = np.array([len(rows) for rows in self._rows])
        self._count = len(table)

    def __call__(self, epoch: int) -> Int64[np.ndarray, " count"]:
        """All rows, mixed within windows."""
        mixed = []
        for first, shards in enumerate(self._windows(epoch)):
            rows = np.concatenate([self._rows[shard] for shard in shards])
            mixed.append(rows[permutation(len(rows), derive(self.seed, "window", epoch, first), 0)])
        return np.concatenate(mixed)

    def place(self, position: int) -> tuple[int, int]:
        """The (epoch, window) in which ``position`` of the endless stream lies."""
        epoch, place = divmod(position, self._count)
        ends = np.cumsum([self._sizes[shards].sum() for shards in self._windows(epoch)])
        return epoch, int(np.searchsorted(ends, place, side="right"))

    def shards(self, epoch: int, window: int) -> list[int]:
        """The containers of a window; one past the epoch's last is the first of the next epoch."""
        windows = self._windows(epoch)
        chosen = windows[window] if window < len(windows) else self._windows(epoch + 1)[0]
        return [int(self._shard[shard]) for shard in chosen]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one loader has one of these, for as long as it lives
    def _windows(self, epoch: int) -> list[np.ndarray]:
        order = permutation(len(self._rows), self.seed, epoch, "shards")
        return [order[first : first + self.window] for first in range(0, len(order), self.window)]
