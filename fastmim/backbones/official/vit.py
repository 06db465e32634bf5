# SPDX-License-Identifier: Apache-2.0
"""Plain ViTs: FastMIM, MAE, LocalMIM, MaskFeat, SimMIM. All but the last name their blocks as timm does.

What follows the encoder tells the methods apart. LocalMIM (Wang et al. 2023) has a last norm for each of its four
scales, of which the last is the network's; MaskFeat (Wei et al. 2022, in pySlowFast) has none in pre-training.
"""

import re
from collections.abc import Sequence

import torch

from fastmim.backbones.official.state import Content, Converted, Layout, Rule, State, join, rename
from fastmim.errors import UserError

KEEP = r"\g<0>"
# Everything of a ViT or BEiT under timm's names. SimMIM's ViT is BEiT's, which timm's Beit names alike.
BODY: tuple[Rule, ...] = (
    (r".*relative_position_index", None),
    (r"cls_token|reg_token|dist_token|pos_embed|patch_embed\.proj\.\w+|rel_pos_bias\..*", KEEP),
    (r"blocks\.\d+\..*|(norm|fc_norm|norm_pre|head|head_dist)\.(weight|bias)", KEEP),
)
_PRE_TRAINED_HEADS = 6
_WIDTH = 768


def is_vit(content: Content) -> bool:
    """Whether the blocks are those of a plain ViT."""
    return "patch_embed.proj.weight" in content.state and "blocks.0.norm1.weight" in content.state


def convert_vit(content: Content) -> Converted:
    """A ViT whose encoder has timm's names."""
    weights, unused = rename(content.state, BODY)
    return Converted(weights, unused)


def convert_fastmim(content: Content) -> Converted:
    """FastMIM's pre-trained ViT: its ViT-B has 6 heads of 128, and was fine-tuned with 12 of 64."""
    converted = convert_vit(content)
    if content.state["patch_embed.proj.weight"].shape[0] != _WIDTH:
        return converted
    note = (
        "FastMIM pre-trained ViT-B with 6 heads of attention, which these weights keep, and fine-tuned it with 12; the "
        "shapes are equal, but another number of heads computes something else; --heads 12 does as its fine-tuning did."
    )
    return Converted(converted.weights, converted.unused, heads=_PRE_TRAINED_HEADS, notes=(note,))


def _convert_localmim(content: Content) -> Converted:
    rules: tuple[Rule, ...] = ((r"norm\.3\.(weight|bias)", r"norm.\1"), (r"hog_enc\..*", None), *BODY)
    weights, unused = rename(content.state, rules)
    note = "Of LocalMIM's four last norms that of the last block is taken."
    return Converted(weights, unused, notes=(note,))


def _convert_maskfeat(content: Content) -> Converted:
    state = dict(content.state)
    if "cls_token" not in state or any(re.match(r"blocks\.\d+\.attn\.(pool_|rel_pos)", key) for key in state):
        raise UserError("MaskFeat: only its plain ViT is read; pySlowFast's MViT pools differently from timm's MViTv2")
    if state["patch_embed.proj.weight"].ndim != 4:
        raise UserError("MaskFeat: the patches have a time axis; only weights for single images are read")
    state = join(_whole_embedding(state), ("q", "k", "v"), "qkv")
    weights, unused = rename(state, ((r"head\.projection\.(weight|bias)", r"head.\1"), *BODY))
    return Converted(weights, unused)


def _whole_embedding(state: State) -> State:
    """PySlowFast may keep the embeddings of the class, of places and of times apart; an image has one time."""
    names = ("pos_embed_class", "pos_embed_spatial")
    if "pos_embed_spatial" not in state:
        return state
    time = state.get("pos_embed_temporal")
    if "pos_embed_class" not in state or (time is not None and time.shape[1] != 1):
        raise UserError("MaskFeat: position embeddings over time; only weights for single images are read")
    places = state["pos_embed_spatial"] + (0 if time is None else time)
    rest = {key: value for key, value in state.items() if key not in (*names, "pos_embed_temporal")}
    return rest | {"pos_embed": torch.cat([state["pos_embed_class"], places], dim=1)}


def _has(content: Content, *beginnings: str) -> bool:
    return all(any(key.startswith(one) for key in content.state) for one in beginnings)


def is_fastmim(content: Content) -> bool:
    """FastMIM hides pixels by a learnt colour, so that its mask token is an image of one pixel."""
    token = content.state.get("mask_token")
    return token is not None and token.ndim == 4 and _has(content, "decoder_")


def is_simmim(content: Content) -> bool:
    """SimMIM's decoder is one convolution; its mask token is an embedding."""
    decoder = content.state.get("decoder.0.weight")
    return decoder is not None and decoder.ndim == 4 and "mask_token" in content.state


def _is_mae(content: Content) -> bool:
    return is_vit(content) and _has(content, "decoder_pos_embed", "decoder_blocks.")


def _is_fine_tuned(content: Content) -> bool:
    norms = "fc_norm.weight" in content.state and "norm.weight" not in content.state
    return content.wrapped and is_vit(content) and norms and "blocks.0.attn.qkv.bias" in content.state


LAYOUTS: Sequence[Layout] = (
    Layout("LocalMIM", lambda one: is_vit(one) and _has(one, "norm.3.", "decoder.0."), _convert_localmim),
    Layout("MaskFeat", lambda one: is_vit(one) and _has(one, "pred_head."), _convert_maskfeat),
    Layout("FastMIM", lambda one: is_fastmim(one) and is_vit(one), convert_fastmim),
    Layout("SimMIM", lambda one: is_simmim(one) and is_vit(one), convert_vit),
    Layout("MAE", _is_mae, convert_vit),
    Layout("MAE or FastMIM (fine-tuned)", _is_fine_tuned, convert_vit),
)
