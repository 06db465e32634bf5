# SPDX-License-Identifier: Apache-2.0
"""From the backbone's maps to the prediction. A new decoder is one class and one line in ``DECODERS``."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastmim.mask import resize_mask


@runtime_checkable
class Decoder(Protocol):
    """Maps of the backbone and the mask of blocks to one prediction per cell of the target."""

    def __call__(
        self, maps: Sequence[Float[Tensor, "B _C _h _w"]], mask: Bool[Tensor, "B g g"]
    ) -> Float[Tensor, "B channels cells cells"]: ...


class LinearDecoder(nn.Module):
    """One linear layer on the deepest map (SimMIM, section 3.3; MaskFeat, section 3.1).

    It mixes no places, so the backbone must have encoded the hidden ones: not for dropped tokens.

    Args:
        width: channels of the deepest map.
        stride: pixels per position of that map.
        cell: pixels per cell of the target.
        channels: channels of the target.
    """

    def __init__(self, width: int, stride: int, cell: int, channels: int) -> None:
        super().__init__()
        self.head = _Head(width, stride, cell, channels)

    def forward(
        self, maps: Sequence[Float[Tensor, "B _C _h _w"]], mask: Bool[Tensor, "B g g"]
    ) -> Float[Tensor, "B channels cells cells"]:
        return self.head(maps[-1])


class TransformerDecoder(nn.Module):
    """Transformer blocks on the deepest map, then a linear layer (FastMIM, section 3.4; MAE, section 3).

    A fixed sine-cosine position embedding is added: without it mask tokens that enter here are all alike.

    Args:
        width: channels of the deepest map.
        stride: pixels per position of that map.
        cell: pixels per cell of the target.
        channels: channels of the target.
        fill: put a learnt token at hidden positions first, because the backbone has dropped them.
        dim: width of the blocks; a multiple of 32.
        depth: number of blocks.
    """

    def __init__(self, width: int, stride: int, cell: int, channels: int, fill: bool, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(width, dim, 1)
        self.mask_token = nn.Parameter(torch.randn(1, dim, 1, 1) * 0.02) if fill else None
        self.blocks = nn.Sequential(*(Block(dim, num_heads=dim // 32, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = _Head(dim, stride, cell, channels)
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(
        self, maps: Sequence[Float[Tensor, "B _C _h _w"]], mask: Bool[Tensor, "B g g"]
    ) -> Float[Tensor, "B channels cells cells"]:
        features = self.embed(maps[-1])
        if self.mask_token is not None:
            hidden = resize_mask(mask, features.shape[-1])[:, None]
            features = torch.where(hidden, self.mask_token.to(features.dtype), features)
        height, width = features.shape[-2:]
        tokens = features.flatten(2).transpose(1, 2) + self._position(height, width, features.device)
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens.transpose(1, 2).unflatten(2, (height, width)))

    def _position(self, height: int, width: int, device: torch.device) -> Float[Tensor, "N D"]:
        place = (height, width, device)
        if place not in self._positions:
            dim = self.embed.out_channels
            self._positions[place] = build_sincos2d_pos_embed([height, width], dim, interleave_sin_cos=True).to(device)
        return self._positions[place]


class _Head(nn.Module):
    """A linear layer per position, brought from the map's stride to the target's cells."""

    def __init__(self, width: int, stride: int, cell: int, channels: int) -> None:
        super().__init__()
        self.finer = max(stride // cell, 1)
        self.coarser = max(cell // stride, 1)
        self.linear = nn.Conv2d(width, channels * self.finer**2, 1)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B channels cells cells"]:
        # Average first: pooling and a linear layer commute, and the map is smaller afterwards.
        features = F.avg_pool2d(features, self.coarser) if self.coarser > 1 else features
        return F.pixel_shuffle(self.linear(features), self.finer)


def default_size(width: int, hierarchical: bool) -> tuple[int, int]:
    """(dim, depth) of the transformer decoder that fits a network.

    The paper takes 256 channels for ViT-B (768) and Swin-B (1024), one block for ViT and four for hierarchical
    networks, whose deepest map is small. Narrower networks get a third of their width, but not below 128: what is to
    be predicted does not become less with the network (64 channels learnt more slowly on small sets, see LOG.md).
    """
    dim = min(256, max(128, width // 3 // 32 * 32))
    return dim, 4 if hierarchical else 1


DECODERS: dict[str, type[nn.Module]] = {"linear": LinearDecoder, "transformer": TransformerDecoder}
