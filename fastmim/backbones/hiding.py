# SPDX-License-Identifier: Apache-2.0
"""Hiding blocks of an image from any backbone, by one mask, whichever way it is done."""

from typing import Any, Protocol, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastmim.backbones.adapter import Backbone, Stage
from fastmim.backbones.compact import Spread, compacted, kept_blocks
from fastmim.backbones.resizing import Carry
from fastmim.errors import UserError
from fastmim.mask import resize_mask


class HidesItself(Backbone, Protocol):
    """A backbone that can hide in its own way, as `fastmim.backbones.adapter.TimmBackbone` does."""

    hides: frozenset[str]
    """Which of "tokens" and "drop" it can."""
    mask_stride: int
    """Pixels per place of the masks that its ``forward(images, mask, hidden)`` takes; ``hidden`` places in each."""

    def hide_by(self, how: str) -> None:
        """Prepare for masks."""
        ...


class HidingBackbone(nn.Module):
    """A backbone that takes the mask of blocks with the images and returns dense maps.

    Args:
        backbone: one of `fastmim.backbones.adapter.build`, or any module with the members of
            `fastmim.backbones.adapter.Backbone`.
        how: "pixels" paints hidden blocks in a learnt colour, in front of the network, and so works with every one;
            "compact" moves the visible blocks together in front of it, see `fastmim.backbones.compact`. "tokens" and
            "drop" are done by the backbone itself, see `HidesItself`.
        channels: of the images.
        block: side of a hidden block in pixels; only "compact" must know it beforehand.

    Attributes:
        stages: channels and stride of each map that ``forward`` returns.

    Raises:
        UserError: a member is missing, or the backbone cannot hide in this way.
    """

    def __init__(self, backbone: nn.Module, how: str = "pixels", channels: int = 3, block: int | None = None) -> None:
        super().__init__()
        require_backbone(backbone)
        ways = {"pixels", "compact"} | set(getattr(backbone, "hides", ()))
        if how not in ways:
            raise UserError(f"hide: this backbone cannot hide by '{how}'; what works: {', '.join(sorted(ways))}")
        self.backbone: Any = backbone
        self.how = how
        self.stages = cast(tuple[Stage, ...], self.backbone.stages)
        self.spread: Spread | None = None
        if how in ("pixels", "compact"):
            self.colour = nn.Parameter(torch.zeros(1, channels, 1, 1))  # images are normalised: 0 is their mean
        else:
            cast(HidesItself, backbone).hide_by(how)
        if how == "compact":
            if block is None:
                raise ValueError("'compact' needs the side of a block")
            self.spread = Spread(self.stages, block)
            self.stages = self.spread.stages

    def resize(self, resolution: int) -> Carry:
        """Prepares for images of ``resolution`` pixels, where the network's weights depend on the size.

        Returns:
            What brings a tensor of an old parameter's shape (by its name here) to the shape that it has now.

        Raises:
            UserError: the network cannot take that size, or cannot change it.
        """
        if not hasattr(self.backbone, "resize"):
            return Carry({})  # a network of the user's own: the size is its own matter
        carry: Carry = self.backbone.resize(backbone_side(resolution, self.how))
        return carry.under("backbone.")

    def weights(self) -> dict[str, Tensor]:
        """What to hand over: the backbone's weights, without what was learnt for hiding."""
        return self.backbone.weights()

    def no_weight_decay(self) -> set[str]:
        """Names in ``named_parameters()`` of what must not decay: what is learnt for hiding, and what timm exempts."""
        exempt = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        names = [name for name, _ in self.named_parameters()]
        return {
            name
            for name in names
            if name == "colour" or name.removeprefix("backbone.").removeprefix("model.") in exempt
        }

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B g g"] | None = None,
        hidden: int | None = None,
    ) -> list[Float[Tensor, "B _C _h _w"]]:
        """One dense map for each stage; after "drop" and "compact", hidden places are zero.

        Args:
            images: normalised, square.
            mask: True = hidden, on a grid of ``H / g`` pixels a block. Nothing is hidden without it, and maps are as
                the backbone's own stages say. "compact": at most one block of each 2 x 2 is visible.
            hidden: hidden blocks per image, the same in every image. "drop" must know it; when it is not given it is
                counted, which waits for the device.

        Raises:
            UserError: the blocks do not fit the images or the patches, or the backbone's maps are not of the shapes
                that its ``stages`` tell.
        """
        if mask is None:
            maps = self.backbone(images)
            _check_maps(maps, self.backbone.stages, images)
            return maps
        if self.how == "pixels":
            painted = resize_mask(mask, images.shape[-1]).unsqueeze(1)
            maps = self.backbone(torch.where(painted, self.colour.to(images.dtype), images))
        elif self.spread is not None:
            kept = kept_blocks(mask)
            maps = self.spread(self.backbone(compacted(images, mask, kept, self.colour.to(images.dtype))), mask, kept)
        else:
            block, patch = _block(images, mask), self.backbone.mask_stride
            if block % patch:
                raise UserError(
                    f"hide: '{self.how}' hides whole patches of {patch} px, but a block has {block} px; "
                    f"choose a block that is a multiple of {patch}"
                )
            places = None if hidden is None else hidden * (block // patch) ** 2
            maps = self.backbone(images, resize_mask(mask, images.shape[-1] // patch), places)
        _check_maps(maps, self.stages, images)
        return maps


def backbone_side(resolution: int, how: str) -> int:
    """Side in pixels of what the network itself sees of an image; half of it, where visible blocks are moved together.

    Raises:
        UserError: it cannot be halved.
    """
    if how != "compact":
        return resolution
    if resolution % 2:
        raise UserError(f"hide: 'compact' halves the side of images, which is {resolution} px; choose an even one")
    return resolution // 2


def whole_network(backbone: Any, resolution: int) -> Any:
    """The network for whole images of ``resolution`` pixels: itself, or a copy where it was built for others."""
    if not hasattr(backbone, "at") or backbone.resolution == resolution:
        return backbone
    return backbone.at(resolution)


def require_backbone(network: nn.Module) -> None:
    """Check that a network of the user's own has the three members of `Backbone`.

    Raises:
        UserError: the first member that is missing or of the wrong kind.
    """
    kind = type(network).__name__
    needs = "a backbone needs: stages, forward(images) -> list of maps, weights() -> dict of tensors"
    if not isinstance(network, nn.Module):
        raise UserError(f"{kind} is not a torch.nn.Module; {needs}")
    stages = getattr(network, "stages", ())
    if not stages or not all(hasattr(stage, "channels") and hasattr(stage, "stride") for stage in stages):
        raise UserError(f"{kind} has no 'stages', a tuple of Stage(channels, stride); {needs}")
    if type(network).forward is nn.Module.forward:
        raise UserError(f"{kind} has no method 'forward'; {needs}")
    if not callable(getattr(network, "weights", None)):
        raise UserError(f"{kind} has no method 'weights'; {needs}")


def _block(images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B g g"]) -> int:
    side, blocks = images.shape[-1], mask.shape[-1]
    if images.shape[-2] != side or side % blocks:
        raise UserError(f"a mask of {blocks} x {blocks} blocks does not divide images of {tuple(images.shape[-2:])} px")
    return side // blocks


def _check_maps(maps: list[Tensor], stages: tuple[Stage, ...], images: Float[Tensor, "B C H W"]) -> None:
    expected = [
        (len(images), stage.channels, images.shape[-2] // stage.stride, images.shape[-1] // stage.stride)
        for stage in stages
    ]
    found = [tuple(one.shape) for one in maps]
    if found != expected:
        raise UserError(f"the backbone's maps are {found}, but its stages promise {expected} (batch, channels, h, w)")
