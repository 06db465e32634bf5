# SPDX-License-Identifier: Apache-2.0
"""Visible blocks moved together: an image of half the side, for any network (UM-MAE, Li et al. 2022, section 3).

Where a mask leaves at most one block of each 2 x 2 visible, that block stands for the whole cell in a compact image, of
which a network has a quarter of the work. Its maps are spread again over the places that the blocks came from.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fastmim.backbones.adapter import Stage
from fastmim.errors import UserError


def kept_blocks(mask: Bool[Tensor, "N g g"]) -> Int64[Tensor, "N c c"]:
    """Which block of each 2 x 2 cell is moved, 0 to 3 row by row: the visible one, or the first where none is."""
    if mask.shape[-1] % 2:
        raise UserError(f"hide: 'compact' takes blocks in cells of 2 x 2, but the mask has {mask.shape[-1]} a side")
    return F.pixel_unshuffle(mask.byte()[:, None], 2).argmin(dim=1)


def compacted(
    images: Float[Tensor, "N C H H"],
    mask: Bool[Tensor, "N g g"],
    kept: Int64[Tensor, "N c c"],
    colour: Float[Tensor, "1 C 1 1"],
) -> Float[Tensor, "N C half half"]:
    """The kept blocks side by side, in ``colour`` where they are hidden themselves."""
    cells, block = kept.shape[-1], images.shape[-1] // mask.shape[-1]
    hidden = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, None]
    painted = torch.where(hidden, colour, images)
    # N C (cell two block) (cell two block) -> N (cell cell) (two two) C block block
    blocks = painted.unflatten(3, (cells, 2, block)).unflatten(2, (cells, 2, block)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    blocks = blocks.flatten(3, 4)
    index = kept[:, :, :, None, None, None, None].expand(-1, -1, -1, 1, *blocks.shape[4:])
    chosen = blocks.gather(3, index).squeeze(3)
    return chosen.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Spread(nn.Module):
    """Maps of compact images as dense maps: each block's features at its own place, zero where blocks are hidden.

    A position that covers several blocks (stride 32, blocks of 16 px) is split by a learnt layer into one for each, of
    as many channels less.

    Args:
        stages: of the network.
        block: side of a block in pixels.

    Attributes:
        stages: channels and stride of each dense map.

    Raises:
        UserError: positions and blocks do not fit into each other.
    """

    def __init__(self, stages: Sequence[Stage], block: int) -> None:
        super().__init__()
        self.block = block
        split: list[nn.Module] = []
        dense: list[Stage] = []
        for stage in stages:
            times = max(stage.stride // block, 1)
            if max(stage.stride, block) % min(stage.stride, block) or stage.channels % times**2:
                raise UserError(
                    f"hide: 'compact' cannot split {stage.channels} channels of stride {stage.stride} into blocks of"
                    f" {block} px; use --block {stage.stride} or {stage.stride // 2}"
                )
            finer = (nn.Conv2d(stage.channels, stage.channels, 1), nn.PixelShuffle(times))
            split.append(nn.Sequential(*finer) if times > 1 else nn.Identity())
            dense.append(Stage(stage.channels // times**2, min(stage.stride, block)))
        self.split = nn.ModuleList(split)
        self.stages = tuple(dense)

    def forward(
        self,
        maps: Sequence[Float[Tensor, "N _C _h _w"]],
        mask: Bool[Tensor, "N g g"],
        kept: Int64[Tensor, "N c c"],
    ) -> list[Float[Tensor, "N _C _h _w"]]:
        """Dense maps of the whole images; ``maps`` are those of the compact ones."""
        cells = kept.shape[-1]
        here = F.one_hot(kept, 4).unflatten(3, (2, 2)).bool()  # N cell cell two two
        here = here & ~mask.unflatten(2, (cells, 2)).unflatten(1, (cells, 2)).permute(0, 1, 3, 2, 4)
        place = here.permute(0, 1, 3, 2, 4)[:, None, :, :, None, :, :, None]  # N 1 cell two 1 cell two 1
        dense = []
        for one, stage, split in zip(maps, self.stages, self.split, strict=True):
            size = self.block // stage.stride
            fine = split(one).unflatten(3, (cells, size)).unflatten(2, (cells, size))  # N C cell size cell size
            spread = fine[:, :, :, None, :, :, None, :] * place.to(fine.dtype)
            dense.append(spread.flatten(5, 7).flatten(2, 4))
        return dense
