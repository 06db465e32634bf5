# SPDX-License-Identifier: Apache-2.0
"""Which images are worth training on: those whose most informative part is hard to predict (PASS, AAAI 2024).

PASS scores images for masked image modelling with a cheap mask predictor that always hides informative patches, during
the selection only, because random masks make scores noisy; and its score weighs the losses of patches instead of
averaging them. Its exact predictor, weights and schedule are not public. Ours:

1. The predictor is a ridge regression from a block's features, as the network sees it in the whole image, to the loss
   of that block where the run's own masks hide it. It has a closed form: no learning rate, the same every time.
2. Of each image, the blocks of the highest predicted loss are hidden, as many as the method hides. The score is the
   sum of their losses, weighted by the softmax of their predicted losses, standardised over them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from fastmim.errors import UserError
from fastmim.mim.masking import Masks, OneOfFour
from fastmim.mim.model import MaskedImageModel, MIMOutput, as_floats, cell_errors
from fastmim.tasks.features import Progress

STRENGTH = 1e-3
"""Of the ridge, beside standardised features of variance 1: it only calms features that are nearly copies of others."""
HELD_OUT = 10
"""Every n-th image is kept from the fit, to judge the predictor by."""
_DECIMALS = 4
_FLAT = 1e-3

Loader = Iterable[Mapping[str, Tensor]]
Gram = Float64[Tensor, "K K"]
"""Sums of the products of K = 1 + D + 1 numbers (1, features, loss) over blocks: all that a fit and its R^2 need."""


class Ridge(NamedTuple):
    """Predicts the loss of a block from its features, in standard deviations of the losses from their mean."""

    weight: Float64[Tensor, " D"]
    bias: float
    mean: float
    """Of the losses that it was fitted to."""
    deviation: float
    """Their standard deviation."""

    def __call__(self, features: Float[Tensor, "*n D"]) -> Float64[Tensor, "*n"]:
        """Predicted losses, rounded, so that noise of the arithmetic does not choose between equal blocks."""
        return (features.double() @ self.weight + self.bias).round(decimals=_DECIMALS)


class Predictor(NamedTuple):
    """What is known after the first look at some images."""

    ridge: Ridge
    r2: float
    """On every tenth image, which the fit left out; nan of fewer than ten images."""
    hidden: int
    """Blocks that the method hides of each image."""


def gram(features: Float[Tensor, "n D"], losses: Float[Tensor, " n"]) -> Gram:
    """The sums over ``n`` blocks; those of several batches are added up."""
    rows = torch.cat([torch.ones(len(losses), 1), features, losses[:, None]], dim=1).double()
    return rows.T @ rows


def fit_ridge(sums: Gram, strength: float = STRENGTH) -> Ridge:
    """The weight that minimises mean squared error + ``strength`` * its squared norm, all standardised.

    A feature that never changes gets no weight, and losses that never change are predicted as they are.
    """
    mean = sums[0] / sums[0, 0]
    covariance = sums / sums[0, 0] - mean.outer(mean)
    std = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)
    correlation = covariance * scale.outer(scale)
    ridge = strength * torch.eye(len(sums) - 2, dtype=torch.float64)
    weight = torch.linalg.solve(correlation[1:-1, 1:-1] + ridge, correlation[1:-1, -1]) * scale[1:-1]
    return Ridge(weight, -float(mean[1:-1] @ weight), float(mean[-1]), float(std[-1]))


def explained(ridge: Ridge, sums: Gram) -> float:
    """R^2 on blocks that it was not fitted to: 1 is a perfect prediction, 0 as good as their mean; nan of no blocks."""
    residual = torch.cat([-ridge.deviation * ridge.weight, torch.ones(1, dtype=torch.float64)])
    residual = torch.cat([torch.tensor([-ridge.mean - ridge.deviation * ridge.bias]).double(), residual])
    spread = sums[-1, -1] - sums[0, -1] ** 2 / sums[0, 0]
    return float(1 - residual @ sums @ residual / spread)


def block_losses(out: MIMOutput, kind: str, side: int) -> Float[Tensor, "N {side} {side}"]:
    """The loss of each block: the mean over its cells and their channels, of several scales the sum.

    A cell that is larger than a block lends its own to all of its blocks. It means something for predicted blocks only.
    """
    errors = [
        cell_errors(prediction, target.repeat(len(prediction) // len(target), 1, 1, 1), kind)
        for prediction, target in zip(out.predictions, out.targets, strict=True)
    ]
    return torch.cat([F.adaptive_avg_pool2d(error, side) for error in errors], dim=1).sum(dim=1)


def hardest(predicted: Float[Tensor, "B g g"], hidden: int, one_of_four: bool = False) -> Masks:
    """Masks that hide the blocks of the highest predicted loss of each image, and want all of them predicted.

    Args:
        predicted: losses of blocks; of equal ones the earlier is shown.
        hidden: number of blocks to hide.
        one_of_four: as grid masking does, show at most one block of each 2 x 2: that of the lowest predicted loss.
    """
    side = predicted.shape[-1]
    order = predicted
    if one_of_four:
        cells = F.pixel_unshuffle(predicted[:, None], 2)
        lowest = cells.argsort(dim=1, stable=True)[:, :1]
        others = torch.ones_like(cells, dtype=torch.bool).scatter(1, lowest, False)
        order = predicted.masked_fill(F.pixel_shuffle(others.byte(), 2).bool().squeeze(1), torch.inf)
    shown = order.flatten(1).argsort(dim=1, stable=True)[:, : side * side - hidden]
    mask = torch.ones_like(order.flatten(1), dtype=torch.bool).scatter(1, shown, False).unflatten(1, (side, side))
    return Masks(mask, mask, hidden, hidden)


def weighted_loss(
    losses: Float[Tensor, "B g g"], predicted: Float[Tensor, "B g g"], hidden: Bool[Tensor, "B g g"]
) -> Float64[Tensor, " B"]:
    """The score of each image: the losses of its hidden blocks, weighted by the softmax of their predicted losses.

    Those are standardised over the hidden blocks of the image, so that weights lie in one range for every method and
    network. Where they are all but equal (the standard deviation far below ``_FLAT`` of that of all losses), the
    weights are.
    """
    # The same number in every row, so that rows can be cut out.
    predicted, losses = (values.double()[hidden].view(len(hidden), -1) for values in (predicted, losses))
    variance, mean = torch.var_mean(predicted, dim=1, keepdim=True, correction=0)
    weights = ((predicted - mean) / (variance.sqrt() + _FLAT)).softmax(dim=1)
    return (weights * losses).sum(dim=1)


@dataclass(frozen=True)
class Selector:
    """Scores images by a model that has been trained for a while.

    Args:
        mim: the model, on its device; it is put into eval mode.
        network: its backbone for whole images (a Backbone), on the same device.
    """

    mim: MaskedImageModel
    network: nn.Module

    def __post_init__(self) -> None:
        self.mim.eval()
        self.network.eval()

    @torch.no_grad()
    def fit(self, loader: Loader, progress: Progress | None = None) -> Predictor:
        """Learns to predict losses under the run's own masks.

        Args:
            loader: yields batches as `fastmim.data.loader.EvalLoader` does.
            progress: called after each batch.

        Raises:
            UserError: the loader has no image.
        """
        sums: dict[bool, Tensor] = {}
        hidden = 0
        for batch in loader:
            images, features = self._look(batch)
            out = self.mim(images, batch["keys"].to(images.device), 1.0)
            side = features.shape[1]
            losses = block_losses(out, self.mim.loss, side).unflatten(0, (-1, len(images))).cpu()
            counted = out.masks.predicted.unflatten(0, (-1, len(images))).cpu()
            hidden = out.masks.hidden_count
            apart = batch["indices"] % HELD_OUT == HELD_OUT - 1
            for held, chosen in ((False, ~apart), (True, apart)):
                rows = counted & chosen[:, None, None]
                sums[held] = sums.get(held, 0) + gram(features.expand(*rows.shape, -1)[rows], losses[rows])
            if progress:
                progress(len(images))
        if not sums:
            raise UserError("none of the images to learn from can be read")
        # Of the few that are left of ten unreadable images, the only one may be a tenth.
        ridge = fit_ridge(sums[False] if sums[False].any() else sums[True])
        return Predictor(ridge, explained(ridge, sums[True]), hidden)

    @torch.no_grad()
    def score(
        self, predictor: Predictor, loader: Loader, progress: Progress | None = None
    ) -> tuple[Int64[Tensor, " N"], Float64[Tensor, " N"]]:
        """Places among the loader's pictures, and the score of each image; unreadable ones are missing."""
        places, scores = [], []
        for batch in loader:
            images, features = self._look(batch)
            predicted = predictor.ridge(features)
            masks = hardest(predicted, predictor.hidden, isinstance(self.mim.masking, OneOfFour))
            out = self._under(masks, images)
            losses = block_losses(out, self.mim.loss, features.shape[1]).cpu()
            scores.append(weighted_loss(losses, predicted, masks.hidden))
            places.append(batch["indices"])
            if progress:
                progress(len(images))
        return torch.cat(places), torch.cat(scores)

    def _look(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Float[Tensor, "B g g D"]]:
        """The images on the device, and the features of their blocks on the CPU, with nothing hidden."""
        images = batch["images"].to(self.mim.mean.device)
        seen = self.network((as_floats(images) - self.mim.mean) / self.mim.std)[-1]
        return images, F.adaptive_avg_pool2d(seen.float(), images.shape[-1] // self.mim.block).movedim(1, 3).cpu()

    def _under(self, masks: Masks, images: Tensor) -> MIMOutput:
        """What the model says under masks that were chosen beforehand."""
        device, own = images.device, self.mim.masking
        hidden = masks.hidden.to(device)
        self.mim.masking = _Chosen(masks._replace(hidden=hidden, predicted=hidden))
        try:
            return self.mim(images, torch.zeros(len(images), dtype=torch.long, device=device))
        finally:
            self.mim.masking = own


@dataclass
class _Chosen:
    """A masking that hands over what it was given."""

    given: Masks
    masks: int = 1

    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        return self.given
