# SPDX-License-Identifier: Apache-2.0
"""Crop, resize and mirror a batch of squares on the device that trains, as two products of matrices."""

import torch
from jaxtyping import Bool, Float, Float32, Num
from torch import Tensor

# A batch of squares as floats is several times the batch of crops, so it is worked on in parts.
PART = 256


def crop_squares(
    squares: Num[Tensor, "B N N C"],
    boxes: Float32[Tensor, "B 4"],
    mirror: Bool[Tensor, " B"],
    size: int,
) -> Num[Tensor, "B C S S"]:
    """The part of each square inside its box, ``size`` x ``size``, as Pillow's antialiased bicubic resizing has it.

    An antialiased resize is linear in rows and in columns, so each is a matrix of (size x N) that follows from the box;
    mirroring reverses the rows of one of them.

    Args:
        squares: uint8 (rounded and clipped back to uint8 in the end) or float32.
        boxes: left, top, right, bottom in pixels of the square, which need not be whole.
        mirror: whether to mirror left to right.
        size: side of the result.
    """
    side = squares.shape[1]
    down = weights(boxes[:, 1], boxes[:, 3], side, size)
    across = weights(boxes[:, 0], boxes[:, 2], side, size)
    across = torch.where(mirror[:, None, None], across.flip(1), across)
    exact = squares.dtype != torch.uint8
    # Half precision keeps 11 bits, more than the 8 of the pixels; a CPU is fastest with float32.
    work = torch.float16 if squares.is_cuda and not exact else torch.float32
    parts = []
    for first in range(0, len(squares), PART):
        rows = slice(first, first + PART)
        pixels = squares[rows].permute(0, 3, 1, 2).to(work)
        crops = down[rows, None].to(work) @ pixels @ across[rows, None].to(work).mT
        parts.append(crops if exact else crops.float().round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def weights(low: Float[Tensor, " B"], high: Float[Tensor, " B"], side: int, size: int) -> Float[Tensor, "B size side"]:
    """What each of ``side`` pixels adds to each of ``size`` results between ``low`` and ``high``; rows sum to 1.

    Keys' cubic with a = -0.5, widened by the reduction; pixels outside of the box add nothing.
    """
    scale = ((high - low) / size)[:, None, None]
    wide = scale.clamp(min=1)
    centre = low[:, None, None] + (torch.arange(size, device=low.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(side, device=low.device)[None, None, :]
    x = ((pixel + 0.5 - centre) / wide).abs()
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    inside = (pixel + 1 > low[:, None, None]) & (pixel < high[:, None, None])
    cubic = cubic * inside
    return cubic / cubic.sum(-1, keepdim=True)
