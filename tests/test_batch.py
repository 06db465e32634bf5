# SPDX-License-Identifier: Apache-2.0
"""The micro-batch: a divisor that fits the memory, found without a trace in the network."""

import pytest
import torch
from torch import Tensor, nn

from fastmim.train.batch import find_micro_batch, free_memory

CPU = torch.device("cpu")


class Squares(nn.Module):
    """For the backward pass autograd keeps three float32 per input number (of the norm, the product and the square)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1000, affine=False)
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"] * self.weight
        return (self.norm(images) * self.weight).square().mean(), {}


def example(count: int) -> dict[str, Tensor]:
    return {"images": torch.randn(count, 1000)}


@pytest.mark.parametrize(("fits", "expected"), [(1, 1), (5, 4), (30, 24), (47, 24), (500, 48)])
def test_the_largest_divisor_that_fits_half_of_the_memory(fits: int, expected: int) -> None:
    # Four tensors of 1,000 float32 per image: the images, and the inputs of the norm, the product and the square.
    # One image more than fits, because the norm's running means are kept too, and belong to no image.
    free = 2 * (4 * 1000 * 4) * (fits + 1)
    assert find_micro_batch(Squares(), example, 48, CPU, free) == expected


def test_more_memory_never_gives_a_smaller_batch() -> None:
    sizes = [find_micro_batch(Squares(), example, 48, CPU, free) for free in (1, 10**5, 10**6, 10**7, 10**9)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 48


def test_the_trial_leaves_no_trace() -> None:
    task = Squares()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    find_micro_batch(task, example, 48, CPU, 10**6)
    assert task.training and all(parameter.grad is None for parameter in task.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_some_memory_is_free() -> None:
    assert free_memory(CPU) > 2**20
