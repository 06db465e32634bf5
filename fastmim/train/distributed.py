# SPDX-License-Identifier: Apache-2.0
"""Ranks: one process per device, started by torchrun; a single process needs none of it."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Only the first rank writes files and speaks."""
        return self.rank == 0


@contextmanager
def ranks(device_type: str) -> Iterator[Ranks]:
    """Joins the group that torchrun has announced in the environment, and leaves it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    # A lost rank must end the others, not hang them for ever.
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))
    try:
        yield Ranks(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


def parallel(task: nn.Module, device: torch.device) -> nn.Module:
    """The task with gradients averaged over ranks; itself when there is one rank."""
    if not dist.is_initialized():
        return task
    return DistributedDataParallel(task, device_ids=[device.index] if device.type == "cuda" else None)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank, so that all act on the same step."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def mean_of_ranks(value: Tensor) -> Tensor:
    """The mean of a scalar over all ranks."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
