# SPDX-License-Identifier: Apache-2.0
"""Squares come back as they were put, to every process, and a file of other images is not believed."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from fastmim.data.cache import SquareCache
from fastmim.errors import UserError


def square(index: int, raw: bool = False) -> torch.Tensor:
    values = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(index))
    return values.float() * 1.5 if raw else values.to(torch.uint8)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_put_comes_back(raw: bool, on_disk: bool, tmp_path: Path) -> None:
    cache = SquareCache(5, 8, 3, raw, path=tmp_path / "squares.bin" if on_disk else None)
    assert [cache.get(index) for index in range(5)] == [None] * 5 and len(cache) == 0
    for index in (4, 0, 2):
        cache.put(index, 100 + index, 50, square(index, raw))
    for index in (0, 2, 4):
        found = cache.get(index)
        assert found is not None and found[:2] == (100 + index, 50) and torch.equal(found[2], square(index, raw))
    assert cache.get(1) is None and cache.get(3) is None and len(cache) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_worker_puts_all_see() -> None:
    cache = SquareCache(3, 8, 3)
    worker = multiprocessing.get_context("fork").Process(target=lambda: cache.put(1, 20, 10, square(1)))
    worker.start()
    worker.join()
    found = cache.get(1)
    assert found is not None and torch.equal(found[2], square(1))


def test_what_does_not_fit_is_left_out() -> None:
    cache = SquareCache(10, 8, 3, share=0.0)
    cache.put(0, 9, 9, square(0))
    assert cache.capacity == 0 and cache.get(0) is None


def test_a_file_lives_on_for_the_same_images_only(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "squares.bin"
    SquareCache(3, 8, 3, path=path, fingerprint="a").put(0, 9, 9, square(0))
    assert len(SquareCache(3, 8, 3, path=path, fingerprint="a")) == 1
    assert len(SquareCache(3, 8, 3, path=path, fingerprint="b")) == 0
    assert len(SquareCache(3, 8, 3, path=path, fingerprint="a")) == 0
    SquareCache(3, 8, 3, path=path, fingerprint="a").put(0, 9, 9, square(0))
    label = path.with_suffix(".txt")
    label.write_text(label.read_text() + "x")  # as after another start of the machine
    assert len(SquareCache(3, 8, 3, path=path, fingerprint="a")) == 0


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cache disk needs .* GB .* use fastmim prepare"):
        SquareCache(10**9, 512, 3, path=tmp_path / "squares.bin")
