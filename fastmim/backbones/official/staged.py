# SPDX-License-Identifier: Apache-2.0
"""Networks of stages under their authors' names: Swin (and SimMIM's, FastMIM's), PVTv2, CMT, ConvNeXt."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from fastmim.backbones.official.state import Content, Converted, Layout, Rule, State, rename
from fastmim.backbones.official.vit import KEEP, is_fastmim, is_simmim

_SWIN: tuple[Rule, ...] = (
    (r".*\.(relative_position_index|attn_mask)", None),
    (r"layers\.\d+\..*|patch_embed\..*|norm\.(weight|bias)", KEEP),
    (r"head\.(weight|bias)", r"head.fc.\1"),
)
_PVT: tuple[Rule, ...] = (
    (r"patch_embed1\.(.*)", r"patch_embed.\1"),
    (r"patch_embed([2-9])\.(.*)", r"stages.\1.downsample.\2"),
    (r"block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.(.*)", r"stages.\1.blocks.\2.mlp.dwconv.\3"),
    (r"block(\d)\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3"),
    (r"norm(\d)\.(.*)", r"stages.\1.norm.\2"),
    (r"head\.(weight|bias)", KEEP),
)
_CMT = r"(blocks_[a-d]|patch_embed_[a-d]|relative_pos_[a-d]|stem_\w+\d|_fc|_bn|head)(\..*)?"
_CONVNEXT: tuple[Rule, ...] = (
    (r"downsample_layers\.0\.([01])\.(.*)", r"stem.\1.\2"),
    (r"downsample_layers\.(\d)\.(.*)", r"stages.\1.downsample.\2"),
    (r"stages\.(\d)\.(\d+)\.dwconv\.(.*)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"stages\.(\d)\.(\d+)\.pwconv([12])\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"stages\.(\d)\.(\d+)\.grn\.gamma", r"stages.\1.blocks.\2.mlp.grn.weight"),
    (r"stages\.(\d)\.(\d+)\.grn\.beta", r"stages.\1.blocks.\2.mlp.grn.bias"),
    (r"stages\.(\d)\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
POOLED_FIRST = (
    "This fine-tuned Swin normalises after pooling (fc_norm), which timm's Swin does before: its classifier is left "
    "out, and the last norm begins anew."
)


def later_downsampling(weights: Mapping[str, Tensor]) -> State:
    """Swin's authors merge patches at the end of a stage, timm at the beginning of the next."""
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda one: f"layers.{int(one[1]) + 1}.downsample", key): value
        for key, value in weights.items()
    }


def _convert_swin(content: Content) -> Converted:
    weights, unused = rename(content.state, _SWIN)
    notes: tuple[str, ...] = ()
    if "fc_norm.weight" in content.state:
        head = tuple(key for key in weights if key.startswith("head.fc."))
        weights = {key: value for key, value in weights.items() if key not in head}
        unused, notes = (*unused, *(key.replace("head.fc.", "head.") for key in head)), (POOLED_FIRST,)
    if "absolute_pos_embed" in unused:
        notes = (*notes, "Its absolute position embedding has no place in timm's Swin, which computes something else.")
    return Converted(later_downsampling(weights), unused, resolution=_resolution(content.state), notes=notes)


def _resolution(state: Mapping[str, Tensor]) -> int | None:
    """Shifted windows have a mask for each window, so that their number tells the size of the image."""
    mask = state.get("layers.0.blocks.1.attn_mask")
    if mask is None:
        return None
    return round((mask.shape[0] * mask.shape[1]) ** 0.5) * state["patch_embed.proj.weight"].shape[-1]


def _convert_pvt(content: Content) -> Converted:
    weights, unused = rename(content.state, _PVT)
    # Stages are counted from 1 there, and from 0 in timm.
    weights = {re.sub(r"^stages\.(\d)", lambda one: f"stages.{int(one[1]) - 1}", key): weights[key] for key in weights}
    return Converted(weights, unused)


def _convert_cmt(content: Content) -> Converted:
    from fastmim.backbones.cmt import convert_official

    ours, unused = rename(content.state, ((_CMT, KEEP),))
    places = ours["relative_pos_a"].shape[1]
    return Converted(convert_official(ours), unused, resolution=4 * round(places**0.5))


def _convert_convnext(content: Content) -> Converted:
    weights, unused = rename(content.state, _CONVNEXT)
    weights = {key: value.flatten() if ".grn." in key else value for key, value in weights.items()}
    return Converted(weights, unused)


def _is_swin(content: Content) -> bool:
    state = content.state
    return "layers.0.downsample.reduction.weight" in state and (
        "layers.0.blocks.0.attn.relative_position_bias_table" in state
    )


def _is_pvt(content: Content) -> bool:
    return "block1.0.attn.q.weight" in content.state and "patch_embed1.proj.weight" in content.state


def _is_cmt(content: Content) -> bool:
    return "blocks_a.0.attn.q.weight" in content.state and "relative_pos_a" in content.state


LAYOUTS: Sequence[Layout] = (
    Layout("FastMIM", lambda one: is_fastmim(one) and _is_swin(one), _convert_swin),
    Layout("FastMIM", lambda one: is_fastmim(one) and _is_pvt(one), _convert_pvt),
    Layout("FastMIM", _is_cmt, _convert_cmt),
    Layout("FastMIM", lambda one: _is_swin(one) and "fc_norm.weight" in one.state, _convert_swin),
    Layout("SimMIM", lambda one: is_simmim(one) and _is_swin(one), _convert_swin),
    Layout("Swin", _is_swin, _convert_swin),
    Layout("PVTv2", _is_pvt, _convert_pvt),
    Layout("ConvNeXt", lambda one: "downsample_layers.0.0.weight" in one.state, _convert_convnext),
)
