# SPDX-License-Identifier: Apache-2.0
"""Every image once an epoch, in an order that follows from the seed alone; shards are mixed well."""

import itertools
from collections import Counter

import numpy as np
import pytest

from fastmim.data.order import BalancedOrder, Order, WindowedOrder, permutation
from fastmim.data.table import ImageTable


def shards(*sizes: int) -> ImageTable:
    count = sum(sizes)
    container = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    zero = np.zeros(count, np.int64)
    return ImageTable(b"", zero, zero, tuple(f"s3://b/{k}.tar" for k in range(len(sizes))), container, zero, zero)


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


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows_visit_every_image_once(window: int) -> None:
    table = shards(5, 1, 7, 7, 2, 9, 4)
    order = Order(len(table), 3, WindowedOrder(table, 3, window))
    for epoch in range(3):
        samples = [order(position) for position in range(epoch * 35, (epoch + 1) * 35)]
        assert sorted(samples) == [(epoch, index) for index in range(35)]
    assert [order(p)[1] for p in range(35)] != [order(p)[1] for p in range(35, 70)]


def test_a_window_needs_its_own_shards_only() -> None:
    table = shards(*[20] * 10)
    windows = WindowedOrder(table, 0, 4)
    for epoch in range(2):
        rows = windows(epoch)
        for position in range(200):
            found, window = windows.place(epoch * 200 + position)
            assert found == epoch
            assert table.container[rows[position]] in windows.shards(epoch, window)
        kinds = [windows.shards(epoch, window) for window in range(3)]
        assert sorted(itertools.chain(*kinds)) == list(range(10)) and [len(kind) for kind in kinds] == [4, 4, 2]
        assert windows.shards(epoch, 3) == windows.shards(epoch + 1, 0)


def test_a_window_mixes_its_shards() -> None:
    table = shards(*[100] * 16)
    rows = WindowedOrder(table, 0, 16)(0)
    neighbours = (table.container[rows[1:]] == table.container[rows[:-1]]).mean()
    assert abs(neighbours - 1 / 16) < 0.03  # two images in a row are of one shard as often as chance has it


def test_balanced_classes_are_drawn_equally_often_and_no_sample_twice() -> None:
    labels = [0] * 3 + [1] * 11 + [2] * 21
    order = BalancedOrder(labels, seed=4)
    epochs = 30
    samples = [order(position) for position in range(epochs * len(labels))]
    assert len(set(samples)) == len(samples)
    for epoch in range(epochs):
        drawn = Counter(labels[index] for _, index in samples[epoch * 35 : (epoch + 1) * 35])
        assert set(drawn.values()) <= {11, 12}
    assert max(Counter(labels[index] for _, index in samples).values()) == epochs * 35 // 3
    # Rounds: every image of a class once before any comes twice.
    for label in range(3):
        members = labels.count(label)
        counts = Counter(turn for turn, index in samples if labels[index] == label)
        assert all(count == members for turn, count in counts.items() if turn < max(counts))
    assert order(0) == BalancedOrder(labels, seed=4)(0) and BalancedOrder(labels, seed=5)(0) != order(0)
