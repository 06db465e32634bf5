# SPDX-License-Identifier: Apache-2.0
"""From the backbone's maps to the prediction. A new decoder is one class and one line in ``DECODERS``."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastmim.errors import UserError
from fastmim.mask import resize_mask
from fastmim.mim.masks import Masks


@runtime_checkable
class Decoder(Protocol):
    """Maps of the backbone and the masks of blocks to one prediction per cell of the target."""

    def __call__(
        self, maps: Sequence[Float[Tensor, "N _C _h _w"]], masks: Masks
    ) -> Float[Tensor, "N channels cells cells"]: ...


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
        self, maps: Sequence[Float[Tensor, "N _C _h _w"]], masks: Masks
    ) -> Float[Tensor, "N channels cells cells"]:
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
        dim: width of the blocks; a multiple of ``heads``, and of 32 when they are left out.
        depth: number of blocks.
        grid: positions along a side of the map at the run's first size; see `sincos_positions`.
        heads: of the attention; one for each 32 channels when None.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        cell: int,
        channels: int,
        fill: bool,
        dim: int,
        depth: int,
        grid: int,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(width, dim, 1)
        self.mask_token = nn.Parameter(torch.randn(1, dim, 1, 1) * 0.02) if fill else None
        self.positions = _Positions(dim, grid)
        self.blocks = nn.Sequential(*(Block(dim, num_heads=heads or dim // 32, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = _Head(dim, stride, cell, channels)

    def forward(
        self, maps: Sequence[Float[Tensor, "N _C _h _w"]], masks: Masks
    ) -> Float[Tensor, "N channels cells cells"]:
        features = self.embed(maps[-1])
        side = features.shape[-1]
        if self.mask_token is not None:
            hidden = resize_mask(masks.hidden, side)[:, None]
            features = torch.where(hidden, self.mask_token.to(features.dtype), features)
        tokens = features.flatten(2).transpose(1, 2) + self.positions(side, features.device)
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens.transpose(1, 2).unflatten(2, (side, side)))


class CrossDecoder(nn.Module):
    """Mask tokens at the predicted places ask the visible ones (CrossMAE, Fu et al. 2024, section 3; SelectiveMAE).

    Blocks of cross-attention and MLP without self-attention, so that the cost follows what is predicted and what is
    visible, not the whole image. Only visible places of the map are read, whichever way the others were hidden.
    Fixed sine-cosine positions are added to both sides. The prediction is zero wherever nothing is to be predicted.

    Args:
        width: channels of the deepest map.
        stride: pixels per position of that map; divides the side of a block.
        cell: pixels per cell of the target.
        channels: channels of the target.
        fill: of no effect, for the signature of `TransformerDecoder`: hidden places always get a learnt token.
        dim: width of the blocks; a multiple of ``heads``, and of 32 when they are left out.
        depth: number of blocks.
        grid: positions along a side of the map at the run's first size; see `sincos_positions`.
        heads: of the attention; one for each 32 channels when None.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        cell: int,
        channels: int,
        fill: bool,
        dim: int,
        depth: int,
        grid: int,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.embed_norm = nn.LayerNorm(dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.positions = _Positions(dim, grid)
        self.blocks = nn.ModuleList(_CrossBlock(dim, heads or dim // 32) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = _Head(dim, stride, cell, channels)

    def forward(
        self, maps: Sequence[Float[Tensor, "N _C _h _w"]], masks: Masks
    ) -> Float[Tensor, "N channels cells cells"]:
        """The prediction, zero where nothing is to be predicted.

        Raises:
            UserError: the map has fewer places than the masks have blocks.
        """
        deepest, blocks = maps[-1], masks.hidden.shape[-1]
        side = deepest.shape[-1]
        if side % blocks:
            raise UserError(
                f"the cross decoder picks the map's places by their block, but a map of {side} x {side} does not divide"
                f" into {blocks} x {blocks} blocks; choose a block that is a multiple of the stride, or the transformer"
                " decoder"
            )
        scale = (side // blocks) ** 2  # places of a block
        visible = _places(~resize_mask(masks.hidden, side), side**2 - masks.hidden_count * scale)
        predicted = _places(resize_mask(masks.predicted, side), masks.predicted_count * scale)
        positions = self.positions(side, deepest.device)
        read = deepest.flatten(2).transpose(1, 2).take_along_dim(visible[..., None], dim=1)
        memory = self.embed_norm(self.embed(read) + positions[visible])
        queries = self.mask_token + positions[predicted]
        for block in self.blocks:
            queries = block(queries, memory)
        queries = self.norm(queries)
        dense = queries.new_zeros(len(queries), side**2, queries.shape[-1])
        dense = dense.scatter(1, predicted[..., None].expand_as(queries), queries)
        out = self.head(dense.transpose(1, 2).unflatten(2, (side, side)))
        # A cell of several blocks is predicted where any of them is.
        return out * ~resize_mask(~masks.predicted, out.shape[-1])[:, None]


class _CrossBlock(nn.Module):
    """Cross-attention from queries to a memory, then an MLP, each after a norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, queries: Float[Tensor, "N P D"], memory: Float[Tensor, "N V D"]) -> Float[Tensor, "N P D"]:
        query = self.query(self.norm_attention(queries))
        key, value = self.key_value(memory).chunk(2, dim=2)
        parts = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (query, key, value))
        queries = queries + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return queries + self.mlp(self.norm_mlp(queries))


class _Positions(nn.Module):
    """`sincos_positions`, made once for each size of the map and device; nothing to learn or to store."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, side: int, device: torch.device) -> Float[Tensor, "n D"]:
        if (side, device) not in self._made:
            self._made[side, device] = sincos_positions(side, self.grid, self.dim).to(device)
        return self._made[side, device]


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


def sincos_positions(side: int, grid: int, dim: int) -> Float[Tensor, "n D"]:
    """Fixed sine-cosine embedding of ``side`` x ``side`` positions, row by row (MAE, section 3; ViT, appendix D.4).

    A map of another size shows the same image more or less finely, so its positions keep the coordinates that they
    have on ``grid`` x ``grid`` positions: the middle of a position is where it was (FastMIM-P changes the size).

    Args:
        side: positions along a side of the map.
        grid: positions along a side of the map whose coordinates are 0, 1, 2, ...
        dim: channels, a multiple of 4: sines and cosines of the row, then those of the column.
    """
    at = (torch.arange(side) + 0.5) * (grid / side) - 0.5
    angles = at[:, None] * (1 / 10000 ** (torch.arange(dim // 4) / (dim // 4)))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)


def _places(chosen: Bool[Tensor, "N h h"], count: int) -> Int64[Tensor, "N count"]:
    """Where the ``count`` True of each row are: a sort, because the length of ``nonzero`` waits for the device."""
    return (~chosen.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def default_size(width: int, hierarchical: bool) -> tuple[int, int]:
    """(dim, depth) of the transformer decoder that fits a network.

    The paper takes 256 channels for ViT-B (768) and Swin-B (1024), one block for ViT and four for hierarchical
    networks, whose deepest map is small. Narrower networks get a third of their width, but not below 128: what is to
    be predicted does not become less with the network (64 channels learnt more slowly on small sets, see LOG.md).
    """
    dim = min(256, max(128, width // 3 // 32 * 32))
    return dim, 4 if hierarchical else 1


DECODERS: dict[str, type[nn.Module]] = {
    "linear": LinearDecoder,
    "transformer": TransformerDecoder,
    "cross": CrossDecoder,
}
