# SPDX-License-Identifier: Apache-2.0
"""Counting what a step keeps leaves nothing behind."""

import gc

import psutil
import pytest
import torch
from torch import Tensor, nn

from fastmim.speed.trial import count_kept
from fastmim.train.batch import find_micro_batch


class Exponential(nn.Module):
    """Keeps its own output for the backward pass, as softmax and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (batch["images"] * self.weight).exp().sum(), {}


def example(count: int) -> dict[str, Tensor]:
    return {"images": torch.zeros(count, 4_000_000)}


@pytest.mark.parametrize("way", ["bench", "micro-batch"])
def test_counting_leaves_nothing_behind(way: str) -> None:
    task, used = Exponential(), []
    for _ in range(13):
        if way == "bench":
            assert count_kept(task, example(4)) >= 4 * 4_000_000 * 4
        else:
            assert find_micro_batch(task, example, 2, torch.device("cpu"), 10**12) == 2
        gc.collect()
        used.append(psutil.Process().memory_info().rss)
    # The first rounds make room that later ones use again; a leak grows by 32 MB or more with each.
    assert min(used[10:]) - max(used[:3]) < 100e6
