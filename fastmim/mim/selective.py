# SPDX-License-Identifier: Apache-2.0
"""Masking that looks at the image: rich blocks are encoded and predicted, plain ones are left out."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fastmim.errors import UserError
from fastmim.mim.masks import Masks, Shares, as_masks, gumbel, noise, one_mask_only, ranks, shift, smallest, uniform
from fastmim.mim.targets import gradient_histograms

_CHOOSE, _FILL, _PREDICT = 1, 2, 3  # streams of noise


class SelectiveBlocks:
    """Encode and predict what is rich in edges (SelectiveMAE, Wang et al., ICCV 2025, section 4).

    How rich a block is: its mean gradient magnitude, which is what its histogram of gradients sums to, standardised
    over the blocks of the image; the softmax of that is the probability p of a block. Of the visible blocks, half
    (rounded up) are drawn from p without replacement. The others are chosen by the mean cosine similarity of their
    histogram to those of the first half, by a curriculum over the run: first the most similar, then the most
    dissimilar, then random ones. The predicted blocks are drawn from p among the hidden ones, without replacement.

    The paper's exact figures are not public in full; these are ours, chosen near them: similar blocks until
    ``SIMILAR`` of the run, dissimilar ones until ``DISSIMILAR``, random ones after it; over ``BLEND`` of the run after
    each of the two, the share of blocks that the rule before chooses falls linearly to none.

    The paper hides 85 % and predicts 25 %: ``ratio=0.85, predict=0.25``.

    Args:
        ratio: share of the blocks that is hidden.
        masks: 1.
        predict: share of all blocks that is predicted; all hidden ones when None.

    Raises:
        UserError: a share that cannot be, or several masks.
    """

    BINS = 9
    SIMILAR = 1 / 6
    DISSIMILAR = 0.98
    BLEND = 0.02

    def __init__(self, ratio: float, masks: int = 1, predict: float | None = None) -> None:
        one_mask_only(masks, "selective")
        self.shares, self.masks = Shares(ratio, predict), masks

    @torch.no_grad()
    def __call__(
        self,
        keys: Int64[Tensor, " B"],
        side: int,
        images: Float[Tensor, "B C H W"] | None = None,
        progress: Float[Tensor, ""] | float = 0.0,
    ) -> Masks:
        """See `fastmim.mim.masks.Masking`.

        Raises:
            UserError: there are no images, or their side is not a multiple of ``side``.
        """
        if images is None:
            raise UserError("selective masking looks at the images: call it with them, or choose masking=random")
        if images.shape[-1] % side:
            raise UserError(f"selective masking: {side} blocks do not divide images of {images.shape[-1]} px")
        blocks, (hidden, predicted) = side * side, self.shares.counts(side)
        cells = gradient_histograms(images, images.shape[-1] // side, self.BINS)
        histogram = cells.flatten(3).flatten(1, 2).transpose(1, 2)
        log_p = _standardised(histogram.sum(dim=2))
        seen = blocks - hidden
        chosen = smallest(-(log_p + gumbel(noise(keys, blocks, _CHOOSE))), (seen + 1) // 2)
        filled = self._fill(chosen, _similarity(histogram, chosen), noise(keys, blocks, _FILL), seen, progress)
        visible = chosen | filled
        drawn = None
        if predicted != hidden:
            order = log_p + gumbel(noise(keys, blocks, _PREDICT))
            drawn = smallest(torch.where(visible, torch.inf, -order), predicted)
        return as_masks(~visible, drawn, (hidden, predicted), side)

    def curriculum(self, progress: Float[Tensor, ""] | float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The shares that the rules (most similar, most dissimilar) choose; what is missing to 1 is random."""
        # A number becomes a tensor of the CPU, with which the device can calculate without waiting.
        progress = torch.as_tensor(progress, dtype=torch.float32)
        similar = (1 - (progress - self.SIMILAR) / self.BLEND).clamp(0, 1)
        ruled = (1 - (progress - self.DISSIMILAR) / self.BLEND).clamp(0, 1)
        return similar, ruled - similar

    def _fill(
        self,
        chosen: Bool[Tensor, "B n"],
        similarity: Float[Tensor, "B n"],
        bits: Int64[Tensor, "B n"],
        seen: int,
        progress: Float[Tensor, ""] | float,
    ) -> Bool[Tensor, "B n"]:
        """The second half of the ``seen`` visible blocks of each image, by the rules that hold at ``progress``."""
        candidates, count = chosen.shape[1] - (seen + 1) // 2, seen // 2
        similar, dissimilar = ((share * count).round() for share in self.curriculum(progress))
        # From the most similar candidate to the least; blocks alike, as empty ones, stand in random order.
        place = ranks(torch.where(chosen, torch.inf, 1e-6 * uniform(bits) - similarity))
        by_rule = (place < similar) | (place >= candidates - dissimilar)
        # The rules' blocks first, then all other candidates at random, never those that are chosen already.
        group = torch.where(chosen, 2, (~by_rule).long())
        return smallest((group << 57) | shift(bits, 7), count)


def _similarity(histogram: Float[Tensor, "B n D"], chosen: Bool[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """The mean cosine similarity of each block to the chosen ones."""
    direction = F.normalize(histogram, dim=2)
    mean = (direction * chosen[..., None]).sum(dim=1, keepdim=True) / chosen.sum(dim=1)[:, None, None]
    return (direction * mean).sum(dim=2)


def _standardised(energy: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Mean 0 and variance 1 in each row; 0 where all are alike."""
    variance, mean = torch.var_mean(energy, dim=1, keepdim=True, correction=0)
    return (energy - mean) / (variance.sqrt() + 1e-6)
