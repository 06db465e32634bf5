# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling in one screen: hide, encode, decode, compare with the target where it was hidden."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from fastmim.mask import resize_mask
from fastmim.mim.decoder import Decoder
from fastmim.mim.masking import Masking
from fastmim.mim.targets import Target

Images = UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]


def as_floats(images: Images) -> Float[Tensor, "B C H W"]:
    """Bytes as 0 to 1; floats, which are raw values, as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class MIMOutput(NamedTuple):
    """Everything that a step computes, so that it can be looked at."""

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, "B channels cells cells"]
    target: Float[Tensor, "B channels cells cells"]
    mask: Bool[Tensor, "B g g"]


@runtime_checkable
class HidingEncoder(Protocol):
    """Encodes what is visible of images, such as ``fastmim.HidingBackbone``."""

    def __call__(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B g g"], hidden: int
    ) -> list[Float[Tensor, "B _D _h _w"]]:
        """Dense maps, shallow to deep; ``hidden`` blocks of each image are True in ``mask``."""
        ...


class MIM(nn.Module):
    """Masked image modelling with any backbone, masking, target and decoder.

    Args:
        backbone: images, a mask of blocks (True = hidden) and their number to dense maps, shallow to deep.
        decoder: maps and mask to a prediction on the target's grid.
        target: images to what is predicted.
        masking: keys of samples to masks.
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
        decoder: Decoder,
        target: Target,
        masking: Masking,
        block: int,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        loss: str = "l2",
    ) -> None:
        super().__init__()
        self.backbone, self.decoder, self.target, self.masking = backbone, decoder, target, masking
        self.block, self.loss = block, loss
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Images, keys: Int64[Tensor, " B"]) -> MIMOutput:
        """One prediction of the hidden part of each image.

        Args:
            images: crops whose side is a multiple of ``block``; bytes, or floats in the units of mean and std.
            keys: one seed per image; its mask follows from it.
        """
        normalised = (as_floats(images) - self.mean) / self.std
        side = images.shape[-1] // self.block
        mask = self.masking(keys, side)
        target = self.target(normalised)
        prediction = self.decoder(self.backbone(normalised, mask, self.masking.hidden(side)), mask)
        # One rank evaluates alone; only training steps are made by all of them together.
        loss = masked_loss(prediction, target, mask, self.loss, all_ranks=self.training)
        return MIMOutput(loss, prediction, target, mask)


def masked_loss(
    prediction: Float[Tensor, "B C h w"],
    target: Float[Tensor, "B C h w"],
    mask: Bool[Tensor, "B g g"],
    kind: str = "l2",
    all_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Mean over hidden cells and channels of the squared ("l2") or absolute ("l1") error, in float32.

    With ``all_ranks``, which all of them must then call, the hidden cells are counted over all of them, and the result
    is scaled so that the mean of the ranks' gradients is the gradient of the mean over all hidden cells.
    """
    hidden = resize_mask(mask, target.shape[-1])[:, None]
    error = prediction.float() - target
    error = (error.square() if kind == "l2" else error.abs()).mean(dim=1, keepdim=True)
    count = hidden.sum().float()
    if all_ranks and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return (error * hidden).sum() / count
