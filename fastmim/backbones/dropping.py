# SPDX-License-Identifier: Apache-2.0
"""Not encoding hidden places at all (MAE, He et al. 2022, section 3), in the networks that can do without."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


class GatherVisible(nn.Module):
    """Stands in timm's ``patch_drop`` slot, after the position embedding: lets only the tokens of ``keep`` pass.

    Args:
        prefix: class and register tokens in front, which always pass.
        with_indices: also return which places were kept, as Eva's slot must, to pick the rotary embedding of each.
    """

    def __init__(self, prefix: int, with_indices: bool) -> None:
        super().__init__()
        self.prefix, self.with_indices = prefix, with_indices
        self.keep: Int64[Tensor, "B visible"] | None = None

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Any:
        if self.keep is not None:
            index = self.keep.unsqueeze(2).expand(-1, -1, tokens.shape[2])
            tokens = torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :].gather(1, index)], dim=1)
        return (tokens, self.keep) if self.with_indices else tokens


def unit_size(model: Any) -> int:
    """Pixels along the side of the squares that a Hiera can leave out."""
    return model.patch_stride[0] * model.mask_unit_size[0]


def visible_tokens(
    model: Any,
    images: Float[Tensor, "B C H W"],
    mask: Bool[Tensor, "B h w"],
    keep: Int64[Tensor, "B visible"],
) -> Float[Tensor, "B visible D"]:
    """The deepest map of a Hiera at its visible units alone, one token for each (Ryali et al. 2023, section 3).

    Hiera's windows are these units, until the last stages attend to all that is left. timm's own way to leave some out
    waits for the device, because it does not know how many are visible; this one is told, and can be compiled.

    Args:
        model: timm's Hiera.
        images: normalised images.
        mask: True = hidden, on the grid of units. Hidden pixels are zero where the overlapping patches look at them.
        keep: the visible units, counted row by row.
    """
    tokens = model._pos_embed(model.patch_embed(images, mask=~mask.unsqueeze(1)))
    # Unrolled, the tokens of a unit lie as far apart as there are units.
    units = model.unroll(tokens).unflatten(1, (-1, mask[0].numel()))
    index = keep[:, None, :, None].expand(-1, units.shape[1], -1, units.shape[3])
    tokens = torch.gather(units, 2, index).flatten(1, 2)
    for block in model.blocks:
        tokens = block(tokens)
    return tokens
