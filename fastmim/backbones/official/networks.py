# SPDX-License-Identifier: Apache-2.0
"""Which timm network weights are of, told by the names and shapes of timm's keys.

Sizes that timm has no name for are its base network with other arguments. What no shape shows is the number of heads of
a plain ViT: it is the layout's, or 64 channels a head as in every ViT up to L.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor

from fastmim.backbones.official.state import Converted, State, count
from fastmim.errors import UserError


@dataclass(frozen=True)
class Network:
    """``timm.create_model(architecture, **model_args)``, for images of ``resolution`` pixels where that is known."""

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    notes: tuple[str, ...] = ()


def recognise(converted: Converted) -> Network | None:
    """The network, or None for one of another kind."""
    for kind in (_beit, _swin, _pvt, _convnext, _cmt, _vit):
        network = kind(converted.weights, converted)
        if network is not None:
            return network
    return None


# The width and depth of the sizes of ViT; all have 64 channels a head, but H, which has 80.
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_GUESS = (
    "How many heads of attention a ViT has cannot be seen in its weights: {} are taken, of 64 channels each; say "
    "--heads if it is another number."
)


def _vit(weights: State, converted: Converted) -> Network | None:
    needed = {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    others = {"norm_pre.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1_g.weight"}  # CLIP, EVA: not told apart
    if not needed <= weights.keys() or others & weights.keys():
        return None
    architecture, args = _plain_size(weights, "vit")
    tokens = [weights[name].shape[1] for name in ("cls_token", "reg_token", "dist_token") if name in weights]
    side, embedded = _grid(weights["pos_embed"].shape[1], sum(tokens))
    if side is None:
        return None
    if "dist_token" in weights:
        size = "base" if architecture.split("_")[1] in {"large", "huge"} else architecture.split("_")[1]
        architecture = f"deit_{size}_distilled_patch16_224"
    elif tokens and not embedded:
        args["no_embed_class"] = True
    if "cls_token" not in weights:
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": "fc_norm.weight" in weights}
    elif "fc_norm.weight" in weights and "norm.weight" not in weights:
        args["global_pool"] = "avg"
    if "reg_token" in weights:
        args["reg_tokens"] = weights["reg_token"].shape[1]
    if "blocks.0.ls1.gamma" in weights:
        args["init_values"] = 1e-5
    if "blocks.0.attn.qkv.bias" not in weights:
        args["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in weights:
        args["qk_norm"] = True
    notes = _put_heads(weights, converted, architecture, args, None)
    return Network(architecture, args, side * weights["patch_embed.proj.weight"].shape[-1], notes)


def _beit(weights: State, converted: Converted) -> Network | None:
    own, shared = "blocks.0.attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"
    if not {own, shared, "blocks.0.gamma_1"} & weights.keys() or "blocks.0.mlp.fc1.weight" not in weights:
        return None
    architecture, args = _plain_size(weights, "beit")
    table = weights.get(own, weights.get(shared))
    if "pos_embed" in weights:
        side, _ = _grid(weights["pos_embed"].shape[1], 1)
    else:
        side = (math.isqrt(table.shape[0] - 3) + 1) // 2 if table is not None else None
    if side is None:
        return None
    args |= {"use_abs_pos_emb": True} if "pos_embed" in weights else {}
    args |= {"use_rel_pos_bias": False} if own not in weights else {}
    args |= {"use_shared_rel_pos_bias": True} if shared in weights else {}
    args |= {"init_values": None} if "blocks.0.gamma_1" not in weights else {}
    args |= {"qkv_bias": False} if "blocks.0.attn.q_bias" not in weights else {}
    args |= {"global_pool": "token"} if "norm.weight" in weights else {}
    notes = _put_heads(weights, converted, architecture, args, None if table is None else table.shape[1])
    return Network(architecture, args, side * weights["patch_embed.proj.weight"].shape[-1], notes)


def _plain_size(weights: Mapping[str, Tensor], family: str) -> tuple[str, dict[str, Any]]:
    """The name of the size and what it must be told, but for the heads."""
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = count(weights, r"blocks\.(\d+)\.")
    size = _VITS.get((width, depth))
    names = (f"{family}_{size}_patch{patch}_224", f"{family}_{size}_patch{patch}_dinov2")
    named = next((name for name in names if timm.is_model(name)), None)
    args: dict[str, Any] = {}
    if named is None:
        args = {"patch_size": patch, "embed_dim": width, "depth": depth}
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * width:
        args["mlp_ratio"] = hidden / width
    if channels != 3:
        args["in_chans"] = channels
    return named or f"{family}_base_patch16_224", args


def _put_heads(
    weights: State, converted: Converted, architecture: str, args: dict[str, Any], seen: int | None
) -> tuple[str, ...]:
    """Puts ``num_heads`` where the named network has another number; the note says where it is a guess."""
    width = weights["patch_embed.proj.weight"].shape[0]
    told = converted.heads if isinstance(converted.heads, int) else seen
    if seen is not None and told != seen:
        raise UserError(f"heads: {told} given, but its position biases are of {seen}")
    size = architecture.split("_")[1]
    usual = 16 if size == "huge" else max(1, width // 64)
    heads = told or usual
    if width % heads:
        raise UserError(f"heads: {heads} do not divide the width of {architecture}'s weights, {width}")
    if "embed_dim" in args or heads != usual:
        args["num_heads"] = heads
    return (_GUESS.format(heads),) if "embed_dim" in args and told is None else ()


def _grid(places: int, tokens: int) -> tuple[int | None, bool]:
    """The side of the square of patches, and whether the other tokens are embedded too; None if it is no square."""
    for count_, embedded in ((places - tokens, True), (places, False)):
        side = math.isqrt(max(count_, 0))
        if side and side**2 == count_:
            return side, embedded
    return None, False


_SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}


def _swin(weights: State, converted: Converted) -> Network | None:
    table = weights.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if table is None or "patch_embed.proj.weight" not in weights:
        return None
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    depths = _depths(weights, r"layers\.(\d+)\.", r"layers\.{}\.blocks\.(\d+)\.")
    name = "layers.{}.blocks.0.attn.relative_position_bias_table"
    heads = [weights[name.format(stage)].shape[1] for stage in range(len(depths)) if name.format(stage) in weights]
    window = (math.isqrt(table.shape[0]) + 1) // 2
    follows = 8 * window * patch  # in every Swin as published a window covers an eighth of the first map
    resolution = converted.resolution or follows
    size = _SWINS.get((width, max(depths)))
    args: dict[str, Any] = {}
    if size is None or depths != [2, 2, max(depths), 2] or heads != [width // 32 * 2**i for i in range(4)]:
        architecture = "swin_tiny_patch4_window7_224"
        args = {"patch_size": patch, "embed_dim": width, "depths": depths, "num_heads": heads}
    elif window == 12 and size in {"base", "large"}:
        architecture = f"swin_{size}_patch4_window12_384"
    else:
        architecture = f"swin_{size}_patch4_window7_224"
    if resolution != follows:
        args["window_size"] = window
    if channels != 3:
        args["in_chans"] = channels
    return Network(architecture, args, resolution)


_PVTS: dict[tuple[int, tuple[int, ...]], str] = {
    (32, (2, 2, 2, 2)): "b0",
    (64, (2, 2, 2, 2)): "b1",
    (64, (3, 4, 6, 3)): "b2",
    (64, (3, 4, 18, 3)): "b3",
    (64, (3, 8, 27, 3)): "b4",
    (64, (3, 6, 40, 3)): "b5",
}


def _pvt(weights: State, converted: Converted) -> Network | None:
    if "stages.0.blocks.0.attn.kv.weight" not in weights or "patch_embed.proj.weight" not in weights:
        return None
    depths = _depths(weights, r"stages\.(\d+)\.", r"stages\.{}\.blocks\.(\d+)\.")
    stem = weights["patch_embed.proj.weight"]
    widths = [weights[f"stages.{stage}.blocks.0.attn.q.weight"].shape[0] for stage in range(len(depths))]
    size = _PVTS.get((stem.shape[0], tuple(depths)))
    linear = "stages.3.blocks.0.attn.sr.weight" in weights
    args: dict[str, Any] = {"in_chans": stem.shape[1]} if stem.shape[1] != 3 else {}
    usual = (32, 64, 160, 256) if size == "b0" else (64, 128, 320, 512)
    if size is not None and tuple(widths) == usual and not (linear and size != "b2"):
        return Network(f"pvt_v2_{size}_li" if linear else f"pvt_v2_{size}", args)
    hidden = [weights[f"stages.{stage}.blocks.0.mlp.fc1.weight"].shape[0] for stage in range(len(depths))]
    reduced = [weights.get(f"stages.{stage}.blocks.0.attn.sr.weight") for stage in range(len(depths))]
    args |= {
        "depths": depths,
        "embed_dims": widths,
        "num_heads": list(converted.heads) if isinstance(converted.heads, tuple) else [1, 2, 5, 8],
        "mlp_ratios": [more / width for more, width in zip(hidden, widths, strict=True)],
        "sr_ratios": [1 if kernel is None else kernel.shape[-1] for kernel in reduced],
    }
    note = "How many heads each stage has cannot be seen in the weights; here {}."
    told = isinstance(converted.heads, tuple)
    return Network("pvt_v2_b2", args, notes=() if told else (note.format(args["num_heads"]),))


_CONVNEXTS = {
    (40, 6): "atto",
    (48, 6): "femto",
    (64, 6): "pico",
    (80, 8): "nano",
    (96, 9): "tiny",
    (96, 27): "small",
    (128, 27): "base",
    (192, 27): "large",
    (256, 27): "xlarge",
    (352, 27): "huge",
}


def _convnext(weights: State, converted: Converted) -> Network | None:
    first = "stages.0.blocks.0."
    if first + "conv_dw.weight" not in weights or "stem.0.weight" not in weights:
        return None
    if weights[first + "mlp.fc1.weight"].ndim != 2:
        return None  # timm's own small ones, whose feed-forward layers are convolutions; timm has many of them
    second = first + "mlp.grn.weight" in weights
    family = "convnextv2" if second else "convnext"
    depths = _depths(weights, r"stages\.(\d+)\.", r"stages\.{}\.blocks\.(\d+)\.")
    widths = [weights[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in range(len(depths))]
    channels, patch = weights["stem.0.weight"].shape[1:3]
    args: dict[str, Any] = {"in_chans": channels} if channels != 3 else {}
    if patch != 4:
        args["patch_size"] = patch
    size = _CONVNEXTS.get((widths[0], max(depths)))
    doubled = widths == [widths[0] * 2**stage for stage in range(4)]
    shape = [depths[1], depths[1], max(depths), depths[1]] if len(depths) == 4 else []
    if size and timm.is_model(f"{family}_{size}") and doubled and depths == shape:
        # Their authors' small ones have linear layers, timm's convolutions of one pixel.
        args |= {"conv_mlp": False} if size in {"atto", "femto", "pico", "nano"} else {}
        return Network(f"{family}_{size}", args)
    return Network(f"{family}_tiny", args | {"depths": depths, "dims": widths})


_CMTS = {(46, 10): "tiny", (52, 12): "xsmall", (64, 16): "small", (76, 20): "base"}


def _cmt(weights: State, converted: Converted) -> Network | None:
    bias = weights.get("stages.0.pos_bias")
    if bias is None:
        return None
    depths = _depths(weights, r"stages\.(\d+)\.", r"stages\.{}\.blocks\.(\d+)\.")
    width = next(value.shape[0] for key, value in weights.items() if key.startswith("stages.0.") and value.ndim == 4)
    size = _CMTS.get((width, max(depths)))
    return None if size is None else Network(f"cmt_{size}", {}, 4 * math.isqrt(bias.shape[1]))


def _depths(weights: Mapping[str, Tensor], stages: str, blocks: str) -> list[int]:
    return [count(weights, blocks.format(stage)) for stage in range(count(weights, stages))]


# What makes a network another one in timm's words: not to be set where the user has named the network.
SIZES: Sequence[str] = (
    *("embed_dim", "depth", "patch_size", "mlp_ratio"),
    *("depths", "embed_dims", "dims", "num_heads", "mlp_ratios", "sr_ratios"),
)
