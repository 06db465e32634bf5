# SPDX-License-Identifier: Apache-2.0
"""Training on prepared shards in an object store: bounded, mixed, and the same after an interruption."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from buckets import upload
from conftest import draw
from PIL import Image

import fastmim
from fastmim.data.loader import Batch, Phase, TrainLoader
from fastmim.data.pictures import Pictures
from fastmim.data.prepared import shard_cache
from fastmim.data.prepared.plan import Options
from fastmim.data.prepared.prepare import prepare
from fastmim.data.prepared.records import Plan
from fastmim.data.prepared.shard_cache import ShardCache
from fastmim.data.prepared.shards import load_sums
from fastmim.data.sources.scan import scan
from fastmim.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]
TINY = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "resolution": 32,
    "global_batch": 16,
    "micro_batch": 16,
    "log_every": 2,
    "tensorboard": False,
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Eight shards of eight squares."""
    (tmp_path / "in").mkdir()
    for index in range(64):
        Image.fromarray(draw(index)).save(tmp_path / "in" / f"{index:02d}.png")
    options = Options(size=64, shard_images=8)
    prepare(scan([str(tmp_path / "in")]), tmp_path / "set", options, workers=0, quiet=True)
    return tmp_path / "set"


def stream(pictures: Pictures, start: int, stop: int, workers: int = 0) -> list[Batch]:
    loader = TrainLoader(
        pictures, phases=[Phase(0, 32, 16)], crop_scale=(0.2, 1.0), flip=True, seed=3, global_batch=16,
        workers=workers, window=3,
    )  # fmt: skip
    return list(itertools.islice(loader.batches(start), stop - start))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_what_the_disk_gives(workers: int, prepared: Path, s3: str, tmp_path: Path) -> None:
    upload(prepared, f"set{workers}")
    here = Pictures(scan([str(prepared)]))
    table = scan([f"s3://set{workers}"])
    cache = ShardCache(tmp_path / "copies", 10**9, load_sums(table))
    there = Pictures(table, shards=cache)
    expected = stream(here, 0, 12)
    keys = [key for batch in expected for key in batch["keys"].tolist()]
    assert len(set(keys)) == 12 * 16  # three epochs of 64 images, nothing twice
    for start in (0, 5):
        found = stream(there, start, 12, workers)
        for one, other in zip(found, expected[start:], strict=True):
            assert torch.equal(one["images"], other["images"]) and torch.equal(one["keys"], other["keys"])
    assert len(list((tmp_path / "copies").glob("*.tar"))) == 8


def test_pretraining_on_a_bucket_goes_on_where_it_was(prepared: Path, s3: str, tmp_path: Path) -> None:
    upload(prepared, "train")
    words = {**TINY, "data": "s3://train", "shuffle_shards": 3, "shard_cache": str(tmp_path / "copies"), "workers": 1}
    whole = fastmim.pretrain(**words, epochs=4, out=tmp_path / "whole")
    fastmim.pretrain(**words, epochs=2, out=tmp_path / "half")
    # A longer run has another learning rate, so the samples are what must agree: the whole run's second half.
    longer = fastmim.resume(tmp_path / "half", changes={"epochs": 4})
    for run in (whole, longer):
        assert run.status["state"] == "finished" and run.status["step"] == 16
    assert (whole.read("data.json") or {})["fingerprint"] == (longer.read("data.json") or {})["fingerprint"]


def test_a_store_that_stays_away_ends_the_run_in_one_line(
    prepared: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(prepared, "gone")
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0))
    table = scan(["s3://gone"])
    sums = {url: one.model_copy(update={"sha256": "0" * 64}) for url, one in load_sums(table).items()}
    for workers in (0, 2):
        pictures = Pictures(table, shards=ShardCache(tmp_path / "copies", 10**9, sums))
        with pytest.raises(UserError, match="is damaged: its SHA-256 is") as caught:
            stream(pictures, 0, 1, workers)
        assert "\n" not in str(caught.value)


def test_windows_of_prepared_shards_mix_as_well_as_everything() -> None:
    """Images sorted by class, 4 of 40 shards at a time: a batch sees as many classes as chance would show it."""
    from test_order import shards

    from fastmim.data.order import Order, WindowedOrder

    in_turn = shards(*[256] * 40)
    plan = Plan(
        source="0" * 64,
        images=len(in_turn),
        side=8,
        channels=3,
        dtype="uint8",
        stored="jpeg",
        quality=90,
        shard_images=256,
    )
    container = np.empty(len(in_turn), np.int32)
    for number in range(plan.shards):
        container[plan.rows(number)] = number
    table = dataclasses.replace(in_turn, container=container)
    classes = np.arange(len(table)) * 100 // len(table)  # 100 classes, in order

    def seen(order: Order) -> float:
        batches = [[classes[order(first + place)[1]] for place in range(256)] for first in range(0, len(table), 256)]
        return float(np.mean([len(Counter(batch)) for batch in batches]))

    windowed, uniform = Order(len(table), 0, WindowedOrder(table, 0, 4)), Order(len(table), 0)
    assert seen(windowed) > seen(uniform) - 1
    # Of shards that hold neighbours, it would see far fewer.
    assert seen(Order(len(table), 0, WindowedOrder(in_turn, 0, 4))) < 20
