# SPDX-License-Identifier: Apache-2.0
"""Neighbours: their votes as a classifier without training, and the most alike images to look at."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def knn_accuracy(
    train_x: Float[Tensor, "N D"],
    train_y: Int64[Tensor, "N"],
    val_x: Float[Tensor, "M D"],
    val_y: Int64[Tensor, "M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Percent of the validation images that their neighbours name rightly (Wu et al. 2018, section 3.4).

    Each of the ``k`` nearest training images (all of them, if there are fewer) votes with exp(cosine / temperature).
    Both sides are centred on the training mean first: pooled features share a large constant part, beside which the
    cosines of all images are alike.
    """
    centre = train_x.mean(0)
    bank = F.normalize(train_x - centre, dim=1)
    classes = int(train_y.max()) + 1
    right = 0
    for queries, labels in zip((val_x - centre).split(1024), val_y.split(1024), strict=True):
        similarity, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(queries), classes).scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(val_y)


def nearest_neighbours(
    vectors: Float[Tensor, "N D"], queries: Int64[Tensor, "Q"], k: int
) -> tuple[Int64[Tensor, "Q K"], Float[Tensor, "Q K"]]:
    """The K = min(k, N - 1) nearest images of each query and their cosine after centring, nearest first.

    ``queries`` are places in ``vectors``; no query is its own neighbour.
    """
    unit = F.normalize(vectors - vectors.mean(0), dim=1)
    similarity = unit[queries] @ unit.T
    similarity.scatter_(1, queries[:, None], -torch.inf)
    found, indices = similarity.topk(min(k, len(vectors) - 1))
    return indices, found
