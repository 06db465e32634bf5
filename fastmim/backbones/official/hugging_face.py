# SPDX-License-Identifier: Apache-2.0
"""transformers' own networks: ViT, ViTMAE, DeiT, BEiT, DINOv2, Swin, PVTv2, ConvNeXt, as it saves them."""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fastmim.backbones.official.staged import later_downsampling
from fastmim.backbones.official.state import Content, Converted, Layout, Rule, State, join, rename
from fastmim.errors import UserError

_ATTENTION = r"encoder\.layer\.(\d+)\.attention\.attention\."
_VIT: tuple[Rule, ...] = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r".*\.relative_position_index", None),
    (_ATTENTION + r"relative_position_bias\.(.*)", r"blocks.\1.attn.\2"),
    (_ATTENTION + r"(query|key|value)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.relative_position_bias\.(.*)", r"rel_pos_bias.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(.*)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(.*)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.lambda_([12])", r"blocks.\1.gamma_\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\.(.*)", r"blocks.\1.\2.\3"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
    (r"pooler\.layernorm\.(weight|bias)", r"fc_norm.\1"),
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
)
_BLOCK = r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_SWIN: tuple[Rule, ...] = (
    (r".*\.relative_position_index", None),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(.*)", r"patch_embed.norm.\1"),
    (_BLOCK + r"attention\.self\.(.*)", r"layers.\1.blocks.\2.attn.\3"),
    (_BLOCK + r"attention\.output\.dense\.(.*)", r"layers.\1.blocks.\2.attn.proj.\3"),
    (_BLOCK + r"intermediate\.dense\.(.*)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
    (_BLOCK + r"output\.dense\.(.*)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
    (_BLOCK + r"layernorm_before\.(.*)", r"layers.\1.blocks.\2.norm1.\3"),
    (_BLOCK + r"layernorm_after\.(.*)", r"layers.\1.blocks.\2.norm2.\3"),
    (r"encoder\.layers\.(\d+)\.downsample\.(.*)", r"layers.\1.downsample.\2"),
    (r"layernorm\.(.*)", r"norm.\1"),
    (r"classifier\.(.*)", r"head.fc.\1"),
)
_PVT: tuple[Rule, ...] = (
    (r"encoder\.layers\.0\.patch_embedding\.proj\.(.*)", r"patch_embed.proj.\1"),
    (r"encoder\.layers\.0\.patch_embedding\.layer_norm\.(.*)", r"patch_embed.norm.\1"),
    (r"encoder\.layers\.(\d+)\.patch_embedding\.proj\.(.*)", r"stages.\1.downsample.proj.\2"),
    (r"encoder\.layers\.(\d+)\.patch_embedding\.layer_norm\.(.*)", r"stages.\1.downsample.norm.\2"),
    (_BLOCK + r"attention\.query\.(.*)", r"stages.\1.blocks.\2.attn.q.\3"),
    (_BLOCK + r"attention\.(key|value|proj)\.(.*)", r"stages.\1.blocks.\2.attn.\3.\4"),
    (_BLOCK + r"attention\.spatial_reduction\.(.*)", r"stages.\1.blocks.\2.attn.sr.\3"),
    (_BLOCK + r"attention\.layer_norm\.(.*)", r"stages.\1.blocks.\2.attn.norm.\3"),
    (_BLOCK + r"layer_norm_([12])\.(.*)", r"stages.\1.blocks.\2.norm\3.\4"),
    (_BLOCK + r"mlp\.dense([12])\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (_BLOCK + r"mlp\.dwconv\.dwconv\.(.*)", r"stages.\1.blocks.\2.mlp.dwconv.\3"),
    (r"encoder\.layers\.(\d+)\.layer_norm\.(.*)", r"stages.\1.norm.\2"),
    (r"classifier\.(.*)", r"head.\1"),
)
_LAYER = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
_CONVNEXT: tuple[Rule, ...] = (
    (r"embeddings\.patch_embeddings\.(.*)", r"stem.0.\1"),
    (r"embeddings\.layernorm\.(.*)", r"stem.1.\1"),
    (r"encoder\.stages\.(\d+)\.downsampling_layer\.([01])\.(.*)", r"stages.\1.downsample.\2.\3"),
    (_LAYER + r"dwconv\.(.*)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (_LAYER + r"layernorm\.(.*)", r"stages.\1.blocks.\2.norm.\3"),
    (_LAYER + r"pwconv([12])\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (_LAYER + r"layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
    (_LAYER + r"grn\.(.*)", r"stages.\1.blocks.\2.mlp.grn.\3"),
    (r"layernorm\.(.*)", r"head.norm.\1"),
    (r"classifier\.(.*)", r"head.fc.\1"),
)
_PARTS = ("query", "key", "value")
_PREFIX = re.compile(r"^(vit|deit|beit|swin|dinov2_with_registers|dinov2|pvt_v2|convnextv2|convnext)\.")
# Activations by timm's names.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}


def _convert(content: Content) -> Converted:
    state = {_PREFIX.sub("", key): value for key, value in content.state.items()}
    kind = str(content.config.get("model_type") or _kind(state))
    if kind not in _KINDS:
        raise UserError(f"transformers' {kind} is not read; what is: {', '.join(_KINDS)}")
    converted = _KINDS[kind](state)
    notes = list(converted.notes)
    activation = str(content.config.get("hidden_act", "gelu"))
    if activation != "gelu" and activation not in _ACTIVATIONS:
        notes.append(f"Its activation, {activation}, is not that of timm's network, which computes something else.")
    if "num_attention_heads" not in content.config and kind in _PLAIN:
        notes.append("Without its config.json, the number of heads of attention is a guess.")
    return Converted(
        converted.weights,
        converted.unused,
        heads=_heads(content.config.get("num_attention_heads")),
        act_layer=_ACTIVATIONS.get(activation),
        resolution=_side(content.config.get("image_size")) if kind == "swin" else None,
        notes=tuple(notes),
    )


def _kind(state: Mapping[str, Tensor]) -> str:
    """What the keys tell where there is no config.json."""
    signs = (
        ("beit", r".*\.lambda_1"),
        ("dinov2", r".*\.layer_scale1\.lambda1"),
        ("swin", r"encoder\.layers\.0\.blocks\.0\.attention\.self\..*"),
        ("pvt_v2", r"encoder\.layers\.0\.patch_embedding\..*"),
        ("convnext", r"encoder\.stages\.0\.layers\.0\.dwconv\..*"),
    )
    return next((kind for kind, sign in signs if any(re.fullmatch(sign, key) for key in state)), "vit")


def _vit(state: State) -> Converted:
    weights, unused = rename(state, _VIT)
    weights = join(weights, _PARTS, "qkv")
    unused = tuple(key for key in unused if key != "embeddings.mask_token")
    return Converted(weights, (*unused, *(("embeddings.mask_token",) if "embeddings.mask_token" in state else ())))


def _deit(state: State) -> Converted:
    converted = _vit(state)
    if "head_dist.weight" in converted.weights:
        return converted
    heads = ("head.weight", "head.bias")  # timm's distilled DeiT averages two heads
    weights = {key: value for key, value in converted.weights.items() if key not in heads}
    lost = tuple(key for key in state if key.startswith("classifier."))
    return Converted(weights, (*converted.unused, *lost))


def _beit(state: State) -> Converted:
    weights, unused = rename(state, _VIT)
    bias = {f"attn.{part}.bias": f"attn.{part[0]}_bias" for part in ("query", "value")}
    for key in list(weights):
        stem, _, last = key.partition("attn.")
        if f"attn.{last}" in bias:
            weights[stem + bias[f"attn.{last}"]] = weights.pop(key)
    return Converted(join(weights, _PARTS, "qkv"), unused)


def _dinov2(state: State) -> Converted:
    converted = _vit(state)
    weights = converted.weights
    if "reg_token" in weights:
        # timm's networks with registers embed the places of patches only; the class token's is added to the token.
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    unused = converted.unused
    if "head.weight" in weights and weights["head.weight"].shape[1] != weights["cls_token"].shape[2]:
        # transformers classifies the class token beside the mean of the patches.
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        unused = (*unused, "classifier.weight", "classifier.bias")
    return Converted(weights, unused)


def _swin(state: State) -> Converted:
    weights, unused = rename(state, _SWIN)
    return Converted(later_downsampling(join(weights, _PARTS, "qkv")), unused)


def _pvt(state: State) -> Converted:
    weights, unused = rename(state, _PVT)
    return Converted(join(weights, ("key", "value"), "kv"), unused)


def _convnext(state: State) -> Converted:
    weights, unused = rename(state, _CONVNEXT)
    weights = {key: value.flatten() if ".grn." in key else value for key, value in weights.items()}
    return Converted(weights, unused)


def _heads(value: object) -> int | tuple[int, ...] | None:
    if isinstance(value, int) and value > 0:
        return value
    if isinstance(value, Sequence) and value and all(isinstance(one, int) and one > 0 for one in value):
        return tuple(value)
    return None


def _side(value: object) -> int | None:
    if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else None


_PLAIN = ("vit", "vit_mae", "deit", "beit", "dinov2", "dinov2_with_registers")
_KINDS: dict[str, Callable[[State], Converted]] = {
    "vit": _vit,
    "vit_mae": _vit,
    "deit": _deit,
    "beit": _beit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "swin": _swin,
    "pvt_v2": _pvt,
    "convnext": _convnext,
    "convnextv2": _convnext,
}


def _is(content: Content) -> bool:
    first = re.compile(r"([a-z_0-9]+\.)?(embeddings\.patch_embeddings\.|encoder\.layers\.0\.patch_embedding\.)")
    return any(first.match(key) for key in content.state)


LAYOUTS: Sequence[Layout] = (Layout("Hugging Face", _is, _convert),)
