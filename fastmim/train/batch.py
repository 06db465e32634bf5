# SPDX-License-Identifier: Apache-2.0
"""How many images fit into one forward pass: measured, not guessed."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn

# What the activations may take of the free memory; the rest is for gradients, optimiser, loader and neighbours.
_SHARE = 0.5
# On a CPU a larger micro-batch gains nothing once the caches are full.
_CPU_LIMIT = 256


def find_micro_batch(
    task: nn.Module, example: Callable[[int], dict[str, Tensor]], per_rank: int, device: torch.device, free: int
) -> int:
    """The largest divisor of ``per_rank`` whose activations fit into half of the free memory.

    One forward pass of two images counts the bytes that autograd keeps. On CUDA the result is tried, and halved while
    the memory does not suffice.

    Args:
        task: gives (loss, logs) for a batch.
        example: a batch of a given number of images, on ``device``.
        per_rank: images per weight update of this rank.
        device: where the task is.
        free: free bytes there.
    """
    kept = 0

    def count(tensor: Tensor) -> None:
        # Nothing is kept, as nothing is asked for again: a graph that keeps its own outputs is never freed.
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel() * tensor.element_size()

    pair = min(2, per_rank)
    was_training = task.training
    task.eval()  # so that no running mean of a BatchNorm sees the trial
    with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing):
        task(example(pair))
    limit = max(1, int(_SHARE * free / (kept / pair))) if kept else per_rank
    if device.type == "cpu":
        limit = min(limit, _CPU_LIMIT)
    size = max(divisor for divisor in range(1, per_rank + 1) if per_rank % divisor == 0 and divisor <= limit)
    while device.type == "cuda" and size > 1 and not _fits(task, example(size)):
        size = max(divisor for divisor in range(1, size) if per_rank % divisor == 0)
    task.train(was_training)
    return size


def _fits(task: nn.Module, batch: dict[str, Tensor]) -> bool:
    try:
        loss, _ = task(batch)
        loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        task.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or on the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return int(psutil.virtual_memory().available)
