# SPDX-License-Identifier: Apache-2.0
"""Classifiers that are trained step by step: in which order they see the images, how long, and at which rate."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fastmim.tasks.probing.subsets import generator, inner_split

BATCH = 256
# 90 epochs as MAE; few images still get enough steps to settle, and many no more than DINOv2 gives ImageNet.
_EPOCHS = 90
_LEAST_STEPS, _MOST_STEPS = 500, 12_500

Indices = Int64[Tensor, "_"]


def count_steps(images: int) -> int:
    """Weight updates of one training."""
    return min(_MOST_STEPS, max(_LEAST_STEPS, _EPOCHS * images // BATCH))


def batches(images: int, steps: int, seed: int) -> Iterator[Indices]:
    """The images of each step: every epoch has its own order, whose last batch may be smaller. A pure function."""
    step = 0
    for epoch in range(steps):  # at most as many epochs as steps
        order = torch.randperm(images, generator=generator(seed, "probe-order", epoch))
        for batch in order.split(BATCH):
            if step == steps:
                return
            yield batch
            step += 1


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 1 towards 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def choose_rate(
    rates: Sequence[float],
    labels: Int64[Tensor, "N"],
    seed: int,
    train: Callable[[Indices, Indices], Float[Tensor, "S M K"]],
) -> float:
    """The rate whose classifier names most of a held-out fifth of the training part; of equals the least loss.

    Args:
        rates: learning rates, from low to high.
        labels: of the training part.
        seed: of what is held out.
        train: trains one classifier with each rate on the first images, and gives the logits of the second.

    Returns:
        One of ``rates``; the middle one where no image can be held out (one image a class).
    """
    kept, out = inner_split(labels, seed)
    if not len(out):
        return rates[len(rates) // 2]
    logits, wanted = train(kept, out), labels[out]
    right = [int((one.argmax(1) == wanted).sum()) for one in logits]
    loss = [float(F.cross_entropy(one, wanted)) for one in logits]
    return rates[max(range(len(rates)), key=lambda place: (right[place], -loss[place]))]
