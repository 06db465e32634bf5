# SPDX-License-Identifier: Apache-2.0
"""Visible blocks moved together, and their features moved back, against plain loops."""

import pytest
import torch
from torch import Tensor, nn

from fastmim.backbones.adapter import Stage, build
from fastmim.backbones.compact import Spread, compacted, kept_blocks
from fastmim.backbones.hiding import HidingBackbone
from fastmim.errors import UserError

COLOUR = torch.full((1, 3, 1, 1), 7.0)


def grid_mask(count: int, side: int, seed: int = 0, whole: float = 0.25) -> Tensor:
    """One visible block of each 2 x 2, and none in a share of the cells; equally many in each mask."""
    generator = torch.Generator().manual_seed(seed)
    cells = side // 2
    mask = torch.ones(count, side, side, dtype=torch.bool)
    for n in range(count):
        shown = torch.randperm(cells * cells, generator=generator)[round(whole * cells * cells) :]
        for cell in shown.tolist():
            dy, dx = torch.randint(0, 2, (2,), generator=generator).tolist()
            mask[n, 2 * (cell // cells) + dy, 2 * (cell % cells) + dx] = False
    return mask


def test_moving_together_equals_the_plain_loop() -> None:
    block, side = 4, 6
    images, mask = torch.randn(3, 3, 24, 24), grid_mask(3, side)
    kept = kept_blocks(mask)
    found = compacted(images, mask, kept, COLOUR)
    expected = torch.empty(3, 3, 12, 12)
    for n in range(3):
        for y in range(side // 2):
            for x in range(side // 2):
                cell = [(2 * y + dy, 2 * x + dx) for dy in (0, 1) for dx in (0, 1)]
                visible = [(v, u) for v, u in cell if not mask[n, v, u]]
                v, u = (visible or cell)[0]
                part = images[n, :, block * v : block * (v + 1), block * u : block * (u + 1)]
                if not visible:
                    part = COLOUR[0].expand_as(part)
                expected[n, :, block * y : block * (y + 1), block * x : block * (x + 1)] = part
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stride", [4, 8])
def test_moving_back_equals_the_plain_loop(stride: int) -> None:
    block, side = 8, 4
    mask = grid_mask(2, side)
    kept, spread = kept_blocks(mask), Spread([Stage(5, stride)], block)
    size = block // stride
    compact = torch.randn(2, 5, 2 * size, 2 * size)
    expected = torch.zeros(2, 5, 4 * size, 4 * size)
    for n in range(2):
        for v in range(side):
            for u in range(side):
                if not mask[n, v, u]:
                    y, x = v // 2 * size, u // 2 * size
                    part = compact[n, :, y : y + size, x : x + size]
                    expected[n, :, v * size : (v + 1) * size, u * size : (u + 1) * size] = part
    (found,) = spread([compact], mask, kept)
    assert torch.equal(found, expected) and spread.stages == (Stage(5, stride),)


def test_positions_of_several_blocks_are_split() -> None:
    spread = Spread([Stage(8, 32)], 16)
    assert spread.stages == (Stage(2, 16),)
    mask = grid_mask(2, 8)
    one = torch.randn(2, 8, 2, 2)
    (dense,) = spread([one], mask, kept_blocks(mask))
    assert dense.shape == (2, 2, 8, 8)
    assert torch.equal(dense.abs().sum(1) > 0, ~mask)
    with pytest.raises(UserError, match="cannot split 6 channels of stride 32 into blocks of 16 px"):
        Spread([Stage(6, 32)], 16)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_hidden_pixels_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = HidingBackbone(build(name, 64), "compact", block=16).eval()
    images, mask = torch.randn(2, 3, 128, 128), grid_mask(2, 8)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    with torch.no_grad():
        before = network(images, mask)
        after = network(torch.where(hidden, torch.randn_like(images), images), mask)
        other = network(torch.where(hidden, images, torch.randn_like(images)), mask)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, other, strict=True))
    assert [tuple(one.shape) for one in before] == [(2, network.stages[-1].channels, 8, 8)]


def test_odd_grids_are_refused() -> None:
    with pytest.raises(UserError, match="cells of 2 x 2, but the mask has 3"):
        kept_blocks(torch.ones(1, 3, 3, dtype=torch.bool))


def test_all_parameters_learn() -> None:
    network = HidingBackbone(build("resnet10t", 64), "compact", block=16)
    maps = network(torch.randn(2, 3, 128, 128), grid_mask(2, 8))
    sum(one.square().mean() for one in maps).backward()
    assert isinstance(network, nn.Module)
    assert [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
