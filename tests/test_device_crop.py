# SPDX-License-Identifier: Apache-2.0
"""Two products of matrices do what Pillow's crop and antialiased bicubic resize do."""

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image

from fastmim.data.device_crop import PART, crop_squares, weights

SIDE = 64
SQUARES = torch.from_numpy(np.stack([draw(index, SIDE) for index in range(6)]))


def pillow(square: np.ndarray, box: tuple[int, int, int, int], size: int, mirror: bool) -> torch.Tensor:
    image = Image.fromarray(square).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [16, 32, 64, 80])
def test_equals_pillow_on_whole_boxes(size: int) -> None:
    boxes = [(0, 0, 64, 64), (3, 5, 50, 60), (10, 0, 42, 32), (0, 30, 20, 64), (63, 63, 64, 64), (1, 2, 40, 9)]
    mirror = [False, True, False, True, False, True]
    ours = crop_squares(SQUARES, torch.tensor(boxes, dtype=torch.float32), torch.tensor(mirror), size)
    assert ours.shape == (6, 3, size, size) and ours.dtype == torch.uint8
    for square, box, flip, crop in zip(SQUARES.numpy(), boxes, mirror, ours, strict=True):
        # Pillow rounds and clips once more, between rows and columns.
        difference = (crop.int() - pillow(square, box, size, flip).int()).abs()
        assert difference.max() <= 5 and difference.float().mean() < 0.3


def test_half_a_pixel_further_is_between_the_neighbours() -> None:
    ramp = torch.arange(64.0).view(1, 1, 64, 1).expand(1, 64, 64, 1).contiguous()
    for left in (0.0, 0.25, 7.5):
        crop = crop_squares(ramp, torch.tensor([[left + 8, 8.0, left + 40, 40.0]]), torch.tensor([False]), 32)
        assert torch.allclose(crop[0, 0, 16, 8:24], torch.arange(8.0, 24.0) + left + 8, atol=1e-4)


def test_rows_sum_to_one_and_nothing_outside_of_the_box_counts() -> None:
    low, high = torch.tensor([3.0, 0.0, 17.5]), torch.tensor([40.0, 64.0, 18.5])
    table = weights(low, high, 64, 24)
    assert torch.allclose(table.sum(-1), torch.ones(3, 24), atol=1e-5)
    assert not table[0, :, :3].any() and not table[0, :, 40:].any()
    assert table[2, :, 17:19].any() and not table[2, :, :17].any() and not table[2, :, 19:].any()


def test_many_channels_of_raw_values_and_more_than_one_part() -> None:
    values = torch.randn(PART + 3, 8, 8, 5) * 1000
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(PART + 3, 4)
    crops = crop_squares(values, boxes, torch.zeros(PART + 3, dtype=torch.bool), 8)
    assert crops.dtype == torch.float32
    assert torch.allclose(crops, values.permute(0, 3, 1, 2), atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_on_a_gpu_is_near() -> None:
    boxes, mirror = torch.tensor([[3.0, 5.0, 50.0, 60.0]]).expand(6, 4), torch.zeros(6, dtype=torch.bool)
    here = crop_squares(SQUARES, boxes, mirror, 32)
    there = crop_squares(SQUARES.cuda(), boxes.cuda(), mirror.cuda(), 32).cpu()
    assert (here.int() - there.int()).abs().max() <= 2
