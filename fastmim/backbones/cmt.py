# SPDX-License-Identifier: Apache-2.0
"""CMT (Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", 2022), which timm lacks.

Importing this module registers ``cmt_tiny``, ``cmt_xsmall``, ``cmt_small`` and ``cmt_base`` with timm, whose networks'
interface they have. Where the paper leaves room, they are the variant that FastMIM released: `tests/goldens/` holds its
numbers. Two things differ from it by choice: the position biases begin small (the original draws them with a deviation
of 1, more than all that attention has to say in the beginning), and they do not decay.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from fastmim.backbones.cmt_layers import Head, Stage, conv_norm, initialise
from fastmim.backbones.resizing import PairMove

__all__ = ["CMT", "checkpoint_filter_fn", "convert_official"]


class CMT(nn.Module):
    """The network, with what timm's networks offer.

    Args:
        img_size: side of the images in pixels, or (height, width); multiples of 32. The position biases depend on it.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none, and no projection to ``head_dim`` channels either.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        stem_dim: channels of the stem.
        embed_dims: channels of each of the four stages.
        depths: their blocks.
        num_heads: heads of their attention.
        sr_ratios: by how much the side of their keys' maps is smaller.
        mlp_ratio: by how much the feed-forward networks are wider.
        head_dim: channels that the head is given.
        drop_rate: dropout before the classifier (0.1 in the original's fine-tuning).
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        head_dim: int = 1280,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        widths = ((in_chans, 2), (stem_dim, 1), (stem_dim, 1))
        self.stem = nn.Sequential(*(conv_norm(dim, stem_dim, 3, stride, act=nn.GELU(), **dd) for dim, stride in widths))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        plan = zip(pairwise((stem_dim, *embed_dims)), rates, num_heads, sr_ratios, strict=True)
        self.stages = nn.Sequential(
            *(Stage(dims, rates, heads, ratio, mlp_ratio, **dd) for dims, rates, heads, ratio in plan)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.head = Head(self.num_features, head_dim, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.out_features
        self.apply(initialise)
        self._set_grids(img_size)

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Go on at another size of images; the position biases are resized (`fastmim.backbones.resizing`)."""
        if img_size is not None:
            self._set_grids(img_size)
            update_model_input_size(self, img_size)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """The last stage's map; no norm follows it."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Float[Tensor, "B D h w"], pre_logits: bool = False) -> Float[Tensor, "B _ *_"]:
        """Logits, or with ``pre_logits`` what the classifier is given."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ *_"]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages: the last n, all, or those of ``indices``; see timm. There is no norm to apply."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps of CMT are 'NCHW', not '{output_fmt}'")
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int | None) else [*indices])
        x, maps = self.stem(x), []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off the stages behind the deepest of ``indices``, and the head, which without them has no input."""
        take, last = feature_take_indices(len(self.stages), indices if isinstance(indices, int) else [*indices])
        cuts = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if cuts:
            self.num_features = self.head.dim = self.feature_info[last]["num_chs"]
        if prune_head or cuts:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer; the projection before it stays, goes with the classes, or comes anew with them."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head.reset(num_classes, self.global_pool)
        self.head_hidden_size = self.head.out_features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output; what a stage's blocks share goes with its first block."""
        blocks = [(r"^stages\.(\d+)\.(?:downsample|pos_bias)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{index}.pos_bias" for index in range(len(self.stages))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self._typed_stages():
            stage.grad_checkpointing = enable

    def _typed_stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    def _set_grids(self, img_size: int | Sequence[int]) -> None:
        height, width = to_2tuple(img_size)
        step = self.feature_info[len(self.stages) - 1]["reduction"]
        if height % step or width % step:
            raise ValueError(f"images of {height} x {width} px: a multiple of {step} px is needed")
        for stage, info in zip(self._typed_stages(), self.feature_info, strict=False):
            stage.set_grid((height // info["reduction"], width // info["reduction"]))


# Parts of a block in the released checkpoints, and ours; then whole keys.
_PARTS = {
    **{name: name for name in ("norm1", "norm2", "attn.q", "attn.k", "attn.v", "attn.proj")},
    **{"proj": "lpu", "attn.sr.0": "attn.reduce.conv", "attn.sr.1": "attn.reduce.norm"},
    **{"mlp.conv1.0": "mlp.expand.conv", "mlp.conv1.2": "mlp.expand.norm", "mlp.proj": "mlp.conv"},
    **{"mlp.proj_bn": "mlp.norm", "mlp.conv2.0": "mlp.project.conv", "mlp.conv2.1": "mlp.project.norm"},
}
_RENAMED = [
    (r"stem_(conv|norm)([123])\.", lambda m: f"stem.{int(m[2]) - 1}.{m[1]}."),
    (r"patch_embed_([a-d])\.proj\.", lambda m: f"stages.{_place(m)}.downsample.conv."),
    (r"patch_embed_([a-d])\.norm\.", lambda m: f"stages.{_place(m)}.downsample.norm."),
    (r"relative_pos_([a-d])$", lambda m: f"stages.{_place(m)}.pos_bias"),
    (r"blocks_([a-d])\.(\d+)\.(.+)\.(?=\w+$)", lambda m: f"stages.{_place(m)}.blocks.{m[2]}.{_PARTS[m[3]]}."),
    (r"_fc\.", lambda m: "head.conv."),
    (r"_bn\.", lambda m: "head.norm."),
    (r"head\.(?=(weight|bias)$)", lambda m: "head.fc."),
]
# The released pre-training encoder has a last norm that it never applies.
_NEVER_APPLIED = {"norm.weight", "norm.bias"}


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CMT that FastMIM's code has trained, under the keys of `CMT`.

    Args:
        state: of a fine-tuned network, or of the encoder of a pre-trained one, with or without the prefix "encoder.".
            The last norm of the pre-training encoder, which its code never applies, has no counterpart and is left out.

    Raises:
        KeyError: a key that is none of CMT's, such as those of a decoder.
    """
    converted = {}
    for key, value in state.items():
        name = key.removeprefix("encoder.")
        if name not in _NEVER_APPLIED:
            converted[_rename(name)] = value
    return converted


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CMT) -> dict[str, Tensor]:
    """What timm calls before it loads weights: released ones are renamed, position biases brought to the model's size.

    Of a pre-training checkpoint, which holds a decoder too, the encoder is taken.
    """
    state = dict(state_dict.get("model", state_dict))
    inner = {key: value for key, value in state.items() if key.startswith("encoder.")}
    if inner or "stem_conv1.weight" in state:
        state = convert_official(inner or state)
    for index, stage in enumerate(model._typed_stages()):
        name = f"stages.{index}.pos_bias"
        if name in state and state[name].shape != stage.pos_bias.shape:
            move = PairMove.between(tuple(state[name].shape), tuple(stage.pos_bias.shape))
            state[name] = state[name] if move is None else move(state[name], False)
    return state


def _rename(name: str) -> str:
    for pattern, new in _RENAMED:
        if found := re.match(pattern, name):
            return new(found) + name[found.end() :]
    raise KeyError(f"'{name}' is not a key of CMT")


def _place(found: re.Match[str]) -> int:
    return "abcd".index(found[1])


def _cfg(size: int) -> dict[str, Any]:
    return {
        **{"url": "", "num_classes": 1000, "input_size": (3, size, size), "pool_size": (size // 32, size // 32)},
        **{"fixed_input_size": True, "crop_pct": 0.875, "interpolation": "bicubic"},
        **{"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        **{"first_conv": "stem.0.conv", "classifier": "head.fc", "license": "apache-2.0"},
    }


# The sizes of the paper, table 1: side of the images, stem, widths, blocks, expansion.
_SIZES = {
    "cmt_tiny": (160, 16, (46, 92, 184, 368), (2, 2, 10, 2), 3.6),
    "cmt_xsmall": (192, 16, (52, 104, 208, 416), (3, 3, 12, 3), 3.8),
    "cmt_small": (224, 32, (64, 128, 256, 512), (3, 3, 16, 3), 4.0),
    "cmt_base": (256, 38, (76, 152, 304, 608), (4, 4, 20, 4), 4.0),
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(size) for name, (size, *_) in _SIZES.items()})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    _, stem, widths, depths, ratio = _SIZES[name]
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        CMT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **{"stem_dim": stem, "embed_dims": widths, "depths": depths, "mlp_ratio": ratio, **kwargs},
    )


@register_model
def cmt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-Ti, for images of 160 px: 9.5 million parameters."""
    return _create("cmt_tiny", pretrained, kwargs)


@register_model
def cmt_xsmall(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-XS, for images of 192 px: 15.2 million parameters."""
    return _create("cmt_xsmall", pretrained, kwargs)


@register_model
def cmt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-S, for images of 224 px: 25.1 million parameters."""
    return _create("cmt_small", pretrained, kwargs)


@register_model
def cmt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-B, for images of 256 px: 45.7 million parameters."""
    return _create("cmt_base", pretrained, kwargs)
