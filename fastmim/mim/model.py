# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling in one screen: hide, encode, decode, compare with the target where it was hidden."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from fastmim.mask import resize_mask
from fastmim.mim.decoder import Decoder
from fastmim.mim.masking import Masking, Masks
from fastmim.mim.targets import Target

Images = UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]


def as_floats(images: Images) -> Float[Tensor, "B C H W"]:
    """Bytes as 0 to 1; floats, which are raw values, as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class MIMOutput(NamedTuple):
    """Everything that a step computes, so that it can be looked at. One prediction and target for each scale."""

    loss: Float[Tensor, ""]
    predictions: list[Float[Tensor, "N _channels _h _w"]]
    targets: list[Float[Tensor, "B _channels _h _w"]]
    masks: Masks


@runtime_checkable
class HidingEncoder(Protocol):
    """Encodes what is visible of images, such as ``fastmim.HidingBackbone``."""

    def __call__(
        self, images: Float[Tensor, "N C H W"], mask: Bool[Tensor, "N g g"], hidden: int
    ) -> list[Float[Tensor, "N _D _h _w"]]:
        """Dense maps, shallow to deep; ``hidden`` blocks of each image are True in ``mask``."""
        ...


class MaskedImageModel(nn.Module):
    """Masked image modelling with any backbone, masking, target and decoder.

    Args:
        backbone: images, a mask of blocks (True = hidden) and their number to dense maps, shallow to deep.
        masking: keys of samples to masks; ``masks`` of them for each image, whose target is computed once.
        target: images to what is predicted; several for several scales, whose losses are added up.
        decoder: maps and masks to a prediction on the target's grid; one for each target, and each then sees the map
            of its own place alone.
        block: side of a hidden block in pixels.
        mean: subtracted from each channel (bytes count as 0 to 1).
        std: each channel is divided by it.
        loss: "l2" or "l1".
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: HidingEncoder,
        masking: Masking,
        target: Target | Sequence[Target],
        decoder: Decoder | Sequence[Decoder],
        *,
        block: int = 16,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        loss: str = "l2",
    ) -> None:
        super().__init__()
        self.backbone, self.masking, self.block, self.loss = backbone, masking, block, loss
        self.targets = nn.ModuleList(cast(Any, target if isinstance(target, Sequence) else [target]))
        self.decoders = nn.ModuleList(cast(Any, decoder if isinstance(decoder, Sequence) else [decoder]))
        if len(self.targets) != len(self.decoders):
            raise ValueError(f"{len(self.targets)} targets need as many decoders, not {len(self.decoders)}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Images, keys: Int64[Tensor, " B"], progress: Tensor | float = 0.0) -> MIMOutput:
        """One prediction of the hidden part of each image, for each of its masks.

        Args:
            images: crops whose side is a multiple of ``block``; bytes, or floats in the units of mean and std.
            keys: one seed per image; its masks follow from it.
            progress: share of the run that is done, for maskings that change with it.
        """
        normalised = (as_floats(images) - self.mean) / self.std
        masks = self.masking(keys, images.shape[-1] // self.block, normalised, progress)
        maps = self.backbone(_repeated(normalised, self.masking.masks), masks.hidden, masks.hidden_count)
        # A single decoder may look at all maps; of several, each has the one of its own scale.
        seen = [maps] if len(self.decoders) == 1 else [[one] for one in maps]
        predictions = [decoder(some, masks) for decoder, some in zip(self.decoders, seen, strict=True)]
        targets = [target(normalised) for target in self.targets]
        losses = [
            # One rank evaluates alone; only training steps are made by all of them together.
            masked_loss(prediction, _repeated(target, self.masking.masks), masks.predicted, self.loss, self.training)
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        return MIMOutput(torch.stack(losses).sum(), predictions, targets, masks)


def masked_loss(
    prediction: Float[Tensor, "N C h w"],
    target: Float[Tensor, "N C h w"],
    mask: Bool[Tensor, "N g g"],
    kind: str = "l2",
    all_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Mean over predicted cells and channels of the squared ("l2") or absolute ("l1") error, in float32.

    A cell that is larger than the blocks of ``mask`` counts as much as of them is True (LocalMIM, Wang et al. 2023,
    section 3.2). So each image counts alike, however a step is cut into micro-batches. With ``all_ranks``, which all of
    them must then call, the cells are counted over all of them, and the result is scaled so that the mean of the ranks'
    gradients is the gradient of the mean over all cells.
    """
    blocks, cells = mask.shape[-1], target.shape[-1]
    counted = resize_mask(mask, max(blocks, cells))[:, None].float()
    counted = F.avg_pool2d(counted, blocks // cells) if cells < blocks else counted
    error = cell_errors(prediction, target, kind)
    count = counted.sum()
    if all_ranks and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    # Where nothing is True, the sum is 0 as well.
    return (error * counted).sum() / count.clamp(min=1e-6)


def cell_errors(
    prediction: Float[Tensor, "N C h w"], target: Float[Tensor, "N C h w"], kind: str = "l2"
) -> Float[Tensor, "N 1 h w"]:
    """Mean over the channels of the squared ("l2") or absolute ("l1") error of each cell, in float32."""
    error = prediction.float() - target
    return (error.square() if kind == "l2" else error.abs()).mean(dim=1, keepdim=True)


def _repeated(images: Float[Tensor, "B C h w"], masks: int) -> Float[Tensor, "N C h w"]:
    """All images under their first mask, then under their second ..."""
    return images if masks == 1 else images.repeat(masks, 1, 1, 1)
