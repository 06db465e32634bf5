# SPDX-License-Identifier: Apache-2.0
"""The one seam to timm: any of its image networks, at any size it can take, as a backbone that returns dense maps."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.layers import Format
from timm.models import get_model_args
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastmim.errors import UserError

LOCAL = "local-dir:"


@dataclass(frozen=True)
class Stage:
    """A map that a backbone returns: its channels, and the pixels between two of its positions."""

    channels: int
    stride: int


class Backbone(Protocol):
    """What every backbone offers; any ``nn.Module`` with these three members is one."""

    stages: tuple[Stage, ...]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        """One dense map for each of ``stages``, shallow to deep; ``h = H / stride``."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What to hand over after training, by the names that the receiver expects."""
        ...


class TimmBackbone(nn.Module):
    """A timm network that returns the maps of ``stages`` and can leave places out in its own way.

    Attributes:
        stages: channels and stride of each returned map, shallow to deep.
        architecture: the name under which timm registers the network.
        create_args: ``timm.create_model(architecture, num_classes=0, **create_args)`` builds the stock network at this
            size; plain JSON values.
        hides: the ways of hiding that work with this network. "pixels" always does (`fastmim.backbones.hiding`).
            "tokens" needs a patch embedding that looks at each patch alone: where patches overlap, hidden pixels would
            show in visible tokens. "drop" also needs attention over all tokens and no other mixing, so that a missing
            token changes nothing but what others can attend to: timm's VisionTransformer and Eva.
        mask_stride: pixels per place of the masks for "tokens" and "drop"; 1 where neither works.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        indices: tuple[int, ...],
        norm: bool,
        architecture: str,
        create_args: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.stages = stages
        self.architecture = architecture
        self.create_args = create_args
        self.hides = ways_to_hide(model)
        self.mask_stride = patch_size(model) or 1
        self._indices, self._norm = indices, norm
        self._mask: Bool[Tensor, "B h w"] | None = None
        self._gather: GatherVisible | None = None

    def hide_by(self, how: str) -> None:
        """Prepare for masks in ``forward``; once, before the parameters are given to an optimiser.

        Args:
            how: "tokens" puts a learnt token in place of the embedding of each hidden patch (SimMIM, Xie et al. 2022,
                section 3.2); "drop" does not encode hidden patches at all (MAE, He et al. 2022, section 3).

        Raises:
            UserError: this network cannot hide in this way; those that work are named.
        """
        if how not in self.hides:
            raise UserError(f"{self.architecture} cannot hide by '{how}'; what works: {', '.join(sorted(self.hides))}")
        if how == "tokens":
            width = next(_convolutions(self.model.patch_embed)).out_channels
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
            self.model.patch_embed.register_forward_hook(self._put_tokens)
        elif how == "drop":
            self._gather = GatherVisible(self.model.num_prefix_tokens, with_indices=isinstance(self.model, Eva))
            self.model.patch_drop = self._gather

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        mask: Bool[Tensor, "B h w"] | None = None,
        hidden: int | None = None,
    ) -> list[Float[Tensor, "B C h w"]]:
        """Dense maps, one for each of ``stages``.

        Args:
            images: normalised images.
            mask: places to hide, True = hidden, on a grid of ``mask_stride`` pixels; needs `hide_by`. Maps of dropped
                places are zero.
            hidden: how many places each mask hides (the same in every image). Only "drop" needs it; when it is not
                given it is counted, which waits for the device.
        """
        if mask is None:
            return self._dense(images)
        if self._gather is not None:
            return self._dropped(images, mask, _count(mask) if hidden is None else hidden, self._gather)
        self._mask = mask
        try:
            return self._dense(images)
        finally:
            self._mask = None

    def weights(self) -> dict[str, Tensor]:
        """The network's weights under timm's own names, without the layers that were pruned."""
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def no_weight_decay(self) -> set[str]:
        """Stock names of the weights that timm exempts from decay, and ``mask_token`` where there is one."""
        exempt = set(self.model.no_weight_decay()) if hasattr(self.model, "no_weight_decay") else set()
        return exempt | ({"mask_token"} if hasattr(self, "mask_token") else set())

    def _dense(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        maps = _intermediates(self.model, images, self._indices, self._norm)
        return [_resize(one, images.shape[-1] // stage.stride) for one, stage in zip(maps, self.stages, strict=True)]

    def _dropped(
        self, images: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "B h w"], hidden: int, gather: "GatherVisible"
    ) -> list[Float[Tensor, "B C h w"]]:
        places = mask[0].numel()
        # A stable sort lists the visible places first and in their order: no nonzero(), which would wait for the device.
        gather.keep = mask.flatten(1).byte().argsort(dim=1, stable=True)[:, : places - hidden]
        try:
            tokens = _intermediates(self.model, images, self._indices, self._norm, output_fmt="NLC")
            index = gather.keep.unsqueeze(2)
        finally:
            gather.keep = None
        maps = [
            one.new_zeros(len(one), places, one.shape[2]).scatter(1, index.expand_as(one), one).transpose(1, 2)
            for one in tokens
        ]
        return [one.unflatten(2, mask.shape[1:]) for one in maps]

    def _put_tokens(self, embed: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
        """Forward hook of the patch embedding, whose output is NLC, NHWC or NCHW."""
        if self._mask is None:
            return None
        mask, token = self._mask, self.mask_token.to(tokens.dtype)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1).unsqueeze(2), token, tokens)
        if getattr(embed, "output_fmt", Format.NCHW) == Format.NHWC:
            return torch.where(mask.unsqueeze(3), token, tokens)
        return torch.where(mask.unsqueeze(1), token[:, None, None], tokens)


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


@dataclass(frozen=True)
class Plan:
    """A timm network at one input size, laid out on the meta device: shapes and names without memory or weights."""

    architecture: str
    create_args: dict[str, Any]
    model: nn.Module


def build(
    name: str,
    resolution: int,
    *,
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    indices: Sequence[int] | None = None,
) -> TimmBackbone:
    """A timm network for images of ``resolution`` x ``resolution`` pixels, without its head and unused layers.

    Position embeddings and windows follow the size: a window covers the same share of the map as at the size that the
    network was made for (Swin at 128 px: windows of 4, as in FastMIM, section 3.2).

    Args:
        name: a timm model, or ``local-dir:FOLDER`` with ``config.json`` and weights, which are then loaded.
        resolution: side of the images in pixels.
        model_args: further arguments for ``timm.create_model``.
        pretrained: load timm's released weights (needs the network).
        indices: which maps to return, counted as timm's ``forward_intermediates`` does; the deepest when not given.

    Raises:
        UserError: no such model or folder, arguments that it does not take, or a size that it cannot take.
    """
    model_args = dict(model_args or {})
    laid_out = plan(name, resolution, model_args)
    take = _absolute(laid_out.model, indices)
    strides = [laid_out.model.feature_info[i]["reduction"] for i in take]
    if resolution % max(strides):
        why = f"one position of its map covers {max(strides)} px"
        raise UserError(_refusal(name, resolution, model_args, take, why))
    load = pretrained or name.startswith(LOCAL)
    model = _create(name, pretrained=load, **laid_out.create_args)
    try:
        norm, maps = _probe(model, resolution, take)
    except Exception as error:
        raise UserError(_refusal(name, resolution, model_args, take, _line(error))) from error
    model.prune_intermediate_layers(list(take), prune_norm=not norm, prune_head=True)
    _freeze_unreached(model, maps)
    stages = tuple(Stage(one.shape[1], stride) for one, stride in zip(maps, strides, strict=True))
    return TimmBackbone(
        model.train(),
        stages,
        indices=take,
        norm=norm,
        architecture=laid_out.architecture,
        create_args=laid_out.create_args,
    )


def plan(name: str, resolution: int, model_args: Mapping[str, Any]) -> Plan:
    """How timm builds ``name`` for images of ``resolution`` pixels; takes a fraction of a second.

    Raises:
        UserError: no such model or folder, or arguments that it does not take.
    """
    _check_name(name)
    for word in ("img_size", "num_classes", "features_only"):
        if word in model_args:
            raise UserError(f"model_args: '{word}' is set by fastmim (the size is the option 'resolution'); remove it")
    with torch.device("meta"):
        model = _create(name, **model_args)
        if hasattr(model, "set_input_size"):
            # Here timm scales the windows with the size; the argument img_size alone leaves them as they were.
            model.set_input_size(img_size=resolution)
        else:
            model = _create(name, **model_args, img_size=resolution) if _takes_size(name, model_args) else model
    args = get_model_args(model)
    if "img_size" in args:
        args["img_size"] = resolution
    args = {word: value for word, value in (args | dict(model_args)).items() if word != "num_classes"}
    architecture = model.pretrained_cfg["architecture"] if name.startswith(LOCAL) else name.split(".")[0]
    return Plan(architecture, json.loads(json.dumps(args)), model)
