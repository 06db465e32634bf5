# SPDX-License-Identifier: Apache-2.0
"""A linear classifier on frozen features as papers train it: SGD, and the best of several learning rates."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fastmim.tasks.probing.linear import accuracy, standardised
from fastmim.tasks.probing.sweep import BATCH, batches, choose_rate, cosine, count_steps

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_MOMENTUM = 0.9


def linear_sgd_accuracy(
    train_x: Float[Tensor, "N D"],
    train_y: Int64[Tensor, "N"],
    val_x: Float[Tensor, "M D"],
    val_y: Int64[Tensor, "M"],
    seed: int = 0,
) -> float:
    """Percent of the validation images that a linear layer, trained by SGD on the features, names rightly.

    The field's protocol on features that are computed once. As in DINOv2 (Oquab et al. 2023; its evaluation code),
    plain linear layers without batch norm are trained in one pass, one a learning rate, with SGD of momentum 0.9, a
    cosine and no weight decay; the rate is scaled by batch / 256. As in CAPI (Darcet et al. 2025; likewise), it is
    chosen on a held-out part of the training images, not on the validation part: a fifth, or the middle rate with one
    image a class. MAE (He et al. 2022, appendix A.1) puts a batch norm without weights before the layer; over frozen
    features that is standardising, which is done here with the statistics of the whole training part.

    Not as in the papers: no random crops, as the features are those of whole images. Over those, the loss is convex and
    `linear_accuracy` finds its regularised minimum; this method says the same (on photos of hands, from 1 label a class
    to half of them, at most 3 points apart and mostly below 1) and is there to be compared with papers.
    """
    train_x, val_x = standardised(train_x, val_x)
    classes = int(max(train_y.max(), val_y.max())) + 1

    def train(kept: Tensor, out: Tensor) -> Tensor:
        weight, bias = fit_sgd(train_x[kept], train_y[kept], classes, RATES, seed)
        return train_x[out] @ weight + bias

    rate = choose_rate(RATES, train_y, seed, train)
    weight, bias = fit_sgd(train_x, train_y, classes, [rate], seed)
    return accuracy(val_x @ weight[0] + bias[0], val_y)


@torch.no_grad()
def fit_sgd(
    x: Float[Tensor, "N D"], y: Int64[Tensor, "N"], classes: int, rates: Sequence[float], seed: int
) -> tuple[Float[Tensor, "S D K"], Float[Tensor, "S 1 K"]]:
    """Weights and biases of S linear layers, one a rate, trained from zero side by side on the same batches."""
    weight, bias = torch.zeros(len(rates), x.shape[1], classes), torch.zeros(len(rates), 1, classes)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    scaled = torch.tensor(rates)[:, None, None] * min(BATCH, len(x)) / BATCH
    steps = count_steps(len(x))
    for step, batch in enumerate(batches(len(x), steps, seed)):
        images, wanted = x[batch], F.one_hot(y[batch], classes)
        # The gradient of the mean cross-entropy with respect to the logits.
        error = ((images @ weight + bias).softmax(2) - wanted) / len(batch)
        weight_speed.mul_(_MOMENTUM).add_(images.T @ error)
        bias_speed.mul_(_MOMENTUM).add_(error.sum(1, keepdim=True))
        weight -= scaled * cosine(step, steps) * weight_speed
        bias -= scaled * cosine(step, steps) * bias_speed
    return weight, bias
