# SPDX-License-Identifier: Apache-2.0
"""The one seam to timm: any of its image networks, at any size it can take, as a backbone that returns dense maps."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.layers.format import Format
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastmim.backbones.blueprint import LOCAL, Blueprint, Plan, TimmModel, create, intermediates, probe
from fastmim.backbones.dropping import GatherVisible, unit_size, visible_tokens
from fastmim.backbones.resizing import Carry, plan_carry
from fastmim.backbones.scales import choose_maps
from fastmim.errors import UserError

__all__ = ["Backbone", "Stage", "TimmBackbone", "TimmModel", "build", "patch_size", "ways_to_hide"]


@dataclass(frozen=True)
class Stage:
    """A map that a backbone returns: its channels, and the pixels between two of its positions."""

    channels: int
    stride: int


@runtime_checkable
class Backbone(Protocol):
    """What every backbone offers; any ``nn.Module`` with these three members is one."""

    stages: tuple[Stage, ...]

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        """One dense map for each of ``stages``, shallow to deep; ``h = H / stride``."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What to hand over after training, by the names that the receiver expects."""
        ...


class TimmBackbone(nn.Module):
    """A timm network that returns the maps of ``stages`` and can leave places out in its own way.

    Attributes:
        stages: channels and stride of each returned map, shallow to deep.
        resolution: side of the images in pixels.
        architecture: the name under which timm registers the network.
        create_args: ``timm.create_model(architecture, num_classes=0, **create_args)`` builds the stock network at this
            size; plain JSON values.
        discard: how many of the last blocks take no part.
        discarded: prefixes of the stock names of the blocks that take no part, such as ``("layers.3",)``.
        hides: the ways of hiding that work with this network. "pixels" always does (`fastmim.backbones.hiding`).
            "tokens" needs a patch embedding that looks at each patch alone: where patches overlap, hidden pixels would
            show in visible tokens. "drop" also needs attention over all tokens and no other mixing, so that a missing
            token changes nothing but what others can attend to: timm's VisionTransformer and Eva; or Hiera, which was
            made for it, where it leaves out units of 32 px from the deepest map.
        mask_stride: pixels per place of the masks for "tokens" and "drop"; 1 where neither works.
    """

    def __init__(
        self,
        model: TimmModel,
        stages: tuple[Stage, ...],
        *,
        blueprint: Blueprint,
        plan: Plan,
        indices: tuple[int, ...],
        norm: bool,
    ) -> None:
        super().__init__()
        self.model: TimmModel = model
        self.stages = stages
        self.resolution = plan.resolution
        self.architecture = plan.architecture
        self.create_args = plan.create_args
        self.discard, self.discarded = blueprint.discard, blueprint.cut.discarded
        self.hides = ways_to_hide(model)
        self.mask_stride = unit_size(model) if isinstance(model, Hiera) else patch_size(model) or 1
        self._blueprint, self._indices, self._norm = blueprint, indices, norm
        self.mask_token: nn.Parameter | None
        self.register_parameter("mask_token", None)
        self._mask: Bool[Tensor, "B h w"] | None = None
        self._gather: GatherVisible | None = None
        self._drops = False

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
        elif how == "drop" and isinstance(self.model, Hiera):
            strides = [stage.stride for stage in self.stages]
            if strides != [self.mask_stride]:
                raise UserError(
                    f"{self.architecture} can hide by 'drop' only in its map of stride {self.mask_stride}, not in "
                    f"those of {strides}; take that map alone, or hide by 'pixels'"
                )
        elif how == "drop":
            self._gather = GatherVisible(self.model.num_prefix_tokens, with_indices=isinstance(self.model, Eva))
        self._drops = how == "drop"
        self._hide_in(self.model)

    def check_resize(self, resolution: int) -> None:
        """Whether `resize` can go to ``resolution``, found without memory or weights.

        Raises:
            UserError: the network cannot take this size, or weights depend on the size in a way that no map can carry.
        """
        self._plan(resolution)

    def resize(self, resolution: int) -> Carry:
        """Go on at another size of images: FastMIM-P, which trains first at small sizes.

        The network is built anew and takes over the weights; those that depend on the size are carried, see
        `fastmim.backbones.resizing`. ``model`` and its parameters are other objects afterwards, of the same names, so
        that an optimiser must be made anew. Global randomness is not touched.

        Args:
            resolution: side of the images in pixels.

        Returns:
            ``carry(name, value)``, with names as in ``named_parameters()``, brings tensors of the parameters' old
            shapes to their new ones, such as the moments of an optimiser.

        Raises:
            UserError: as `check_resize`; nothing is changed then.
        """
        plan, carry = self._plan(resolution)
        if resolution == self.resolution:
            return carry
        with torch.random.fork_rng(devices=[]):
            model = create(plan.architecture, **plan.create_args)
        self._blueprint.cut.apply(model)
        _prune(model, self._indices, self._norm)
        _take_over(model, self.model, lambda name, value: carry(f"model.{name}", value))
        self._hide_in(model)
        self.model, self.resolution, self.create_args = model, resolution, plan.create_args
        return carry

    def at(self, resolution: int) -> "TimmBackbone":
        """A copy at another size, see `resize`, that shares nothing with this network."""
        other = copy.deepcopy(self)
        other.resize(resolution)
        return other

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B h w"] | None = None,
        hidden: int | None = None,
    ) -> list[Float[Tensor, "B _C _h _w"]]:
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
        if self._drops:
            return self._dropped(images, mask, _count(mask) if hidden is None else hidden)
        if self.mask_token is None:
            raise ValueError("a mask needs hide_by() first")
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
        return exempt | ({"mask_token"} if self.mask_token is not None else set())

    def _plan(self, resolution: int) -> tuple[Plan, Carry]:
        plan = self._blueprint.at(resolution, self._indices)
        _prune(plan.model, self._indices, self._norm)
        shapes = {f"model.{name}": tuple(weight.shape) for name, weight in plan.model.named_parameters()}
        now = {f"model.{name}": tuple(weight.shape) for name, weight in self.model.named_parameters()}
        return plan, plan_carry(self.architecture, now, shapes, getattr(self.model, "num_prefix_tokens", 0))

    def _hide_in(self, model: TimmModel) -> None:
        """Put what `hide_by` has prepared into a network."""
        if self.mask_token is not None:
            model.patch_embed.register_forward_hook(self._put_tokens)
        if self._gather is not None:
            model.patch_drop = self._gather

    def _dense(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        maps = intermediates(self.model, images, self._indices, self._norm)
        return [_resize(one, images.shape[-1] // stage.stride) for one, stage in zip(maps, self.stages, strict=True)]

    def _dropped(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B h w"], hidden: int
    ) -> list[Float[Tensor, "B _C _h _w"]]:
        places = mask[0].numel()
        # A stable sort lists the visible places first, in their order; nonzero() would wait for the device.
        keep = mask.flatten(1).byte().argsort(dim=1, stable=True)[:, : places - hidden]
        index = keep.unsqueeze(2)
        maps = [
            one.new_zeros(len(one), places, one.shape[2]).scatter(1, index.expand_as(one), one).transpose(1, 2)
            for one in self._visible(images, mask, keep)
        ]
        return [one.unflatten(2, mask.shape[1:]) for one in maps]

    def _visible(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B h w"], keep: Int64[Tensor, "B visible"]
    ) -> list[Float[Tensor, "B visible _C"]]:
        if self._gather is None:
            return [visible_tokens(self.model, images, mask, keep)]
        self._gather.keep = keep
        try:
            return intermediates(self.model, images, self._indices, self._norm, output_fmt="NLC")
        finally:
            self._gather.keep = None

    def _put_tokens(self, embed: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
        """Forward hook of the patch embedding, whose output is NLC, NHWC or NCHW."""
        if self._mask is None or self.mask_token is None:
            return None
        mask, token = self._mask, self.mask_token.to(tokens.dtype)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1).unsqueeze(2), token, tokens)
        if getattr(embed, "output_fmt", Format.NCHW) == Format.NHWC:
            return torch.where(mask.unsqueeze(3), token, tokens)
        return torch.where(mask.unsqueeze(1), token[:, None, None], tokens)


def build(
    name: str,
    resolution: int,
    *,
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    indices: Sequence[int] | None = None,
    scales: str | Sequence[int] | None = None,
    discard: int = 0,
) -> TimmBackbone:
    """A timm network for images of ``resolution`` x ``resolution`` pixels, without its head and unused layers.

    Position embeddings and windows follow the size: a window covers the same share of the map as at the size that the
    network was made for (Swin at 128 px: windows of 4, as in FastMIM).

    Args:
        name: a timm model, or ``local-dir:FOLDER`` with ``config.json`` and weights, which are then loaded.
        resolution: side of the images in pixels.
        model_args: further arguments for ``timm.create_model``.
        pretrained: load timm's released weights (needs the network).
        indices: which maps to return, counted as timm's ``forward_intermediates`` does, among those that are left when
            blocks are discarded; the deepest when not given.
        scales: or which, in the words of `fastmim.backbones.scales`.
        discard: how many of the last blocks take no part (FastMIM's layer discarding): they are not built, and to be
            trained by fine-tuning. With the last block of a stage the whole stage goes.

    Raises:
        UserError: no such model or folder, arguments that it does not take, a size that it cannot take, or too many
            blocks to discard.
    """
    blueprint = Blueprint(name, model_args or {}, discard)
    take = blueprint.absolute((-1,) if indices is None else indices)
    if scales is not None:
        take = choose_maps(blueprint.strides, scales, name)
    plan = blueprint.at(resolution, take)
    model = create(name, pretrained=pretrained or name.startswith(LOCAL), **plan.create_args)
    blueprint.cut.apply(model)
    norm, maps = probe(model, resolution, take)
    _prune(model, take, norm)
    _freeze_unreached(model, maps)
    stages = tuple(Stage(one.shape[1], blueprint.strides[index]) for one, index in zip(maps, take, strict=True))
    return TimmBackbone(model.train(), stages, blueprint=blueprint, plan=plan, indices=take, norm=norm)


def patch_size(model: TimmModel) -> int | None:
    """Pixels per token, where each token of the patch embedding sees its own square patch and nothing else."""
    match list(_convolutions(getattr(model, "patch_embed", None))):
        case [one] if one.kernel_size == one.stride == one.stride[::-1] and one.padding == (0, 0):
            return one.stride[0]
    return None


def ways_to_hide(model: TimmModel) -> frozenset[str]:
    """The ways of hiding that are exact for a timm network; see `TimmBackbone`."""
    if isinstance(model, Hiera):
        return frozenset({"pixels", "drop"})
    if patch_size(model) is None:
        return frozenset({"pixels"})
    drops = isinstance(model, VisionTransformer | Eva)
    return frozenset({"pixels", "tokens", "drop"} if drops else {"pixels", "tokens"})


def _prune(model: TimmModel, indices: tuple[int, ...], norm: bool) -> None:
    """Cut off what lies behind the deepest map."""
    model.prune_intermediate_layers(list(indices), prune_norm=not norm, prune_head=True)


def _take_over(new: TimmModel, old: TimmModel, carry: Callable[[str, Tensor], Tensor]) -> None:
    """Make ``new`` the same network as ``old`` at its own size: weights and statistics, what is frozen, device, mode.

    Buffers that follow from the size have other shapes, or are not part of the state; those of ``new`` are right.
    """
    place = next(old.parameters())
    new.to(device=place.device, dtype=place.dtype)
    before, state = dict(old.named_parameters()), new.state_dict()
    kept = {
        name: value
        for name, value in old.state_dict().items()
        if name not in before and value.shape == state[name].shape
    }
    with torch.no_grad():
        weights = {name: carry(name, weight) for name, weight in before.items()}
    new.load_state_dict(weights | kept, strict=False)
    for name, weight in new.named_parameters():
        weight.requires_grad_(before[name].requires_grad)
    modes = {name: part.training for name, part in old.named_modules()}
    for name, part in new.named_modules():
        part.training = modes[name]


def _freeze_unreached(model: TimmModel, maps: list[Tensor]) -> None:
    """Exclude weights that no map depends on and that timm does not prune, such as HRNet's other branches.

    A parameter without a gradient stops DistributedDataParallel. Cutting these out would need knowledge of each
    network; frozen, they stay as they were and the exported weights still fit the stock network.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad([one.sum() for one in maps], trained, allow_unused=True)
    for weight, gradient in zip(trained, gradients, strict=True):
        weight.requires_grad_(gradient is not None)


def _convolutions(module: nn.Module | None) -> Iterator[nn.Conv2d]:
    return (part for part in module.modules() if isinstance(part, nn.Conv2d)) if module is not None else iter(())


def _resize(one: Float[Tensor, "B C h w"], side: int) -> Float[Tensor, "B C side side"]:
    # Inception's convolutions have no padding: its maps are a little smaller than the image divided by the stride.
    return one if one.shape[-1] == side else F.interpolate(one, (side, side), mode="bilinear", align_corners=False)


def _count(mask: Bool[Tensor, "B h w"]) -> int:
    counts = mask.flatten(1).sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"'drop' needs equally many hidden places in every image, not {min(counts)} to {max(counts)}")
    return counts[0]
