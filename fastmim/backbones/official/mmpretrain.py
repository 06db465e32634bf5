# SPDX-License-Identifier: Apache-2.0
"""mmpretrain (and mmselfsup, mmcls): ViT and Swin, whose feed-forward networks and norms have other names."""

import re
from collections.abc import Sequence

from torch import Tensor

from fastmim.backbones.official.staged import later_downsampling
from fastmim.backbones.official.state import Content, Converted, Layout, Rule, rename
from fastmim.backbones.official.vit import KEEP

_BLOCK: tuple[Rule, ...] = (
    (r"patch_embed\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"(layers\.\d+)\.ln([12])\.(.*)", r"\1.norm\2.\3"),
    (r"(layers\.\d+)\.ffn\.layers\.0\.0\.(.*)", r"\1.mlp.fc1.\2"),
    (r"(layers\.\d+)\.ffn\.layers\.1\.(.*)", r"\1.mlp.fc2.\2"),
    (r"(layers\.\d+)\.attn\.gamma1\.weight", r"\1.ls1.gamma"),
    (r"(layers\.\d+)\.ffn\.gamma2\.weight", r"\1.ls2.gamma"),
    (r"(layers\.\d+)\.(norm1|norm2|attn\.qkv|attn\.proj)\.(weight|bias)", r"\1.\2.\3"),
    (r"(ln1|norm1)\.(weight|bias)", r"norm.\2"),
    (r"(ln2|norm2)\.(weight|bias)", r"fc_norm.\2"),
    (r"head\.(fc|layers\.head)\.(weight|bias)", r"head.\2"),
    (r"cls_token|pos_embed", KEEP),
)
_SWIN: tuple[Rule, ...] = (
    (r".*\.relative_position_index", None),
    (r"patch_embed\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"patch_embed\.norm\.(.*)", KEEP),
    (r"stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.(.*)", r"layers.\1.blocks.\2.attn.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.(.*)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
    (r"stages\.(\d)\.(blocks\.\d+\.norm[12]\..*|downsample\..*)", r"layers.\1.\2"),
    (r"norm3\.(weight|bias)", r"norm.\1"),
    (r"head\.fc\.(weight|bias)", KEEP),
)


def _convert_vit(content: Content) -> Converted:
    weights, unused = rename(content.state, _BLOCK)
    return Converted({re.sub(r"^layers\.", "blocks.", key): value for key, value in weights.items()}, unused)


def _convert_swin(content: Content) -> Converted:
    weights, unused = rename(content.state, _SWIN)
    ordered = {key: _merged_order(value) if ".downsample." in key else value for key, value in weights.items()}
    return Converted(later_downsampling(ordered), unused)


def _merged_order(value: Tensor) -> Tensor:
    """The last axis holds four neighbours: by channel, then row and column, here; by column and row first, in Swin."""
    parts = value.unflatten(-1, (value.shape[-1] // 4, 2, 2))  # channel, row, column
    return parts.movedim(-3, -1).transpose(-3, -2).flatten(-3)


LAYOUTS: Sequence[Layout] = (
    Layout("mmpretrain", lambda one: "layers.0.ffn.layers.0.0.weight" in one.state, _convert_vit),
    Layout("mmpretrain", lambda one: "stages.0.blocks.0.attn.w_msa.qkv.weight" in one.state, _convert_swin),
)
