# SPDX-License-Identifier: Apache-2.0
"""What CMT is made of (Guo et al. 2022, section 3), see `fastmim.backbones.cmt`."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.config import use_fused_attn
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmim.backbones.resizing import PairMove

Grid = tuple[int, int]
NORM_EPS = 1e-6  # of the norms in blocks; the others have the framework's default, 1e-5


class Attention(nn.Module):
    """Attention whose keys and values come from a map that is smaller by ``sr_ratio``, with a bias for each pair."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, **dd: Any) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads, self.fused_attn = num_heads, use_fused_attn()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, **dd) for _ in range(4))
        self.reduce = nn.Sequential() if sr_ratio == 1 else conv_norm(dim, dim, sr_ratio, sr_ratio, groups=dim, **dd)

    def forward(self, x: Float[Tensor, "B C h w"], bias: Float[Tensor, "heads q k"]) -> Float[Tensor, "B C h w"]:
        tokens, reduced = x.flatten(2).mT, self.reduce(x).flatten(2).mT
        q, k, v = (
            layer(source).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, source in ((self.q, tokens), (self.k, reduced), (self.v, reduced))
        )
        bias = bias.to(q.dtype)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


class FeedForward(nn.Module):
    """The inverted residual feed-forward network: between two pointwise convolutions, one that sees neighbours."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.expand = conv_norm(dim, hidden, 1, act=nn.GELU(), **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.norm = nn.BatchNorm2d(hidden, **dd)
        self.project = conv_norm(hidden, dim, 1, **dd)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        x = self.expand(x)
        return self.project(self.norm(F.gelu(x + self.conv(x))))


class Block(nn.Module):
    """Local perception unit, attention, feed-forward; each is added to what comes in."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.lpu = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=NORM_EPS, **dd)
        self.attn = Attention(dim, num_heads, sr_ratio, **dd)
        self.norm2 = LayerNorm2d(dim, eps=NORM_EPS, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B C h w"], bias: Float[Tensor, "heads q k"]) -> Float[Tensor, "B C h w"]:
        x = x + self.lpu(x)
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A map of half the side, and blocks that share a bias for each pair of a query's and a key's place.

    Attributes:
        pos_bias: ``[heads, tokens, tokens / sr_ratio^2]``, added to the scaled products; places run row by row.
        grid: (height, width) of the map in tokens.
    """

    def __init__(
        self, dims: tuple[int, int], drop_path: Sequence[float], num_heads: int, sr_ratio: int, mlp_ratio: float,
        **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dim = dims[1]
        self.num_heads, self.sr_ratio, self.grad_checkpointing = num_heads, sr_ratio, False
        self.grid: Grid = (0, 0)
        self.downsample = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(*dims, 2, stride=2, **dd), norm=LayerNorm2d(dim, eps=1e-5, **dd))
        )
        self.pos_bias = nn.Parameter(torch.empty(0, **dd))
        self.blocks = nn.ModuleList(Block(dim, num_heads, sr_ratio, mlp_ratio, rate, **dd) for rate in drop_path)

    def set_grid(self, grid: Grid) -> None:
        """Take maps of ``grid`` tokens; the bias is carried, or drawn where there was none."""
        if min(grid) < 1 or any(side % self.sr_ratio for side in grid):
            raise ValueError(f"a map of {grid[0]} x {grid[1]} tokens cannot be reduced by {self.sr_ratio}")
        old, new = (self._sides(one) for one in (self.grid, grid))
        with torch.no_grad():
            if self.pos_bias.numel():
                bias = PairMove(old, new)(self.pos_bias, False)
            else:
                shape = (self.num_heads, math.prod(new[:2]), math.prod(new[2:]))
                bias = trunc_normal_(self.pos_bias.new_empty(shape), std=0.02)
        self.grid, self.pos_bias = grid, nn.Parameter(bias, requires_grad=self.pos_bias.requires_grad)

    def forward(self, x: Float[Tensor, "B _C _H _W"]) -> Float[Tensor, "B C h w"]:
        x = self.downsample(x)
        torch._assert(x.shape[2:] == self.grid, f"the map is not of {self.grid} tokens; see set_input_size()")
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, self.pos_bias, use_reentrant=False)
            else:
                x = block(x, self.pos_bias)
        return x

    def _sides(self, grid: Grid) -> tuple[int, int, int, int]:
        return (*grid, grid[0] // self.sr_ratio, grid[1] // self.sr_ratio)


class Head(nn.Module):
    """What fine-tuning puts on the deepest map. Without classes there is no projection either: maps are pooled.

    Attributes:
        pool_type: as timm's ``SelectAdaptivePool2d`` names it; empty for none, which takes no classes.
        out_features: channels of what the classifier is given.
    """

    def __init__(self, dim: int, hidden: int, num_classes: int, pool_type: str, drop: float, **dd: Any) -> None:
        super().__init__()
        self.dim, self.hidden, self.drop_rate, self._dd = dim, hidden, drop, dd
        self.conv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str) -> None:
        if num_classes > 0 and not pool_type:
            raise ValueError("classes need a pooled map; num_classes=0 works without pooling")
        projects = num_classes > 0
        if projects != isinstance(self.conv, nn.Conv2d):
            self.conv = nn.Conv2d(self.dim, self.hidden, 1, **self._dd) if projects else nn.Identity()
            self.norm = nn.BatchNorm2d(self.hidden, **self._dd) if projects else nn.Identity()
            initialise(self.conv)
        self.act = nn.SiLU() if projects else nn.Identity()
        self.pool_type, self.pool = pool_type, SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.out_features = (self.hidden if projects else self.dim) * self.pool.feat_mult()
        self.fc = nn.Linear(self.out_features, num_classes, **self._dd) if projects else nn.Identity()
        initialise(self.fc)
        self.train(self.training)

    def forward(self, x: Float[Tensor, "B C h w"], pre_logits: bool = False) -> Float[Tensor, "B _ *_"]:
        x = self.pool(self.act(self.norm(self.conv(x))))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


def conv_norm(
    dim: int, width: int, kernel: int, stride: int = 1, *, groups: int = 1, act: nn.Module | None = None, **dd: Any
) -> nn.Sequential:
    """Convolution, activation, norm: in this order, unlike most networks."""
    padding = kernel // 2 if stride < kernel else 0
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = nn.Conv2d(dim, width, kernel, stride, padding, groups=groups, **dd)
    if act is not None:
        parts["act"] = act
    parts["norm"] = nn.BatchNorm2d(width, **dd)
    return nn.Sequential(parts)


def initialise(layer: nn.Module) -> None:
    """Draw a layer's weights as timm's pyramid networks do: by the number of outputs where it convolves."""
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.Conv2d):
        fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
    if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
