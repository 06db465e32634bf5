# SPDX-License-Identifier: Apache-2.0
"""An attentive probe: which places of the last map matter is learnt too, by one query with cross-attention."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from fastmim.tasks.probing.linear import accuracy, inverse_scale
from fastmim.tasks.probing.subsets import generator
from fastmim.tasks.probing.sweep import BATCH, batches, choose_rate, cosine, count_steps

RATES = (1e-3, 3e-3, 1e-2)
_HEAD_WIDTH = 64
_WEIGHT_DECAY = 0.01


class Probe(NamedTuple):
    """The weights of S probes: S of them, H heads of width W, K classes.

    Projections have no biases: one of the keys adds the same to every score, which a softmax does not see; one of the
    values adds a constant to the pooled vector, which the classifier's bias does as well.
    """

    query: Float[Tensor, "S H W"]
    keys: Float[Tensor, "S D H W"]
    values: Float[Tensor, "S D H W"]
    weight: Float[Tensor, "S HW K"]
    bias: Float[Tensor, "S 1 K"]


def attentive_accuracy(
    train_x: Float16[Tensor, "N T D"],
    train_y: Int64[Tensor, "N"],
    val_x: Float16[Tensor, "M T D"],
    val_y: Int64[Tensor, "M"],
    seed: int = 0,
    device: torch.device | None = None,
) -> float:
    """Percent of the validation images that an attentive probe on T tokens each names rightly.

    A learnt query attends to the tokens of the frozen last map (multi-head, projected keys and values), and a linear
    layer classifies what it gathers: CAE (Chen et al. 2022, section 4), V-JEPA (Bardes et al. 2024), CAPI (Darcet et
    al. 2025), whose one block without an MLP this is. Masked image modelling needs it most: its features are spread
    over the tokens, and their mean loses what differs between them.

    Tokens are standardised by channel with the training part's statistics. AdamW with a cosine; the rate is the one of
    ``RATES`` that does best on a held-out fifth of the training part, or the middle one with one image a class; then
    all of the training part is learnt with it.
    """
    device = device or torch.device("cpu")
    mean, scale = _statistics(train_x)
    classes = int(max(train_y.max(), val_y.max())) + 1

    def read(tokens: Tensor, batch: Tensor) -> Tensor:
        return ((tokens[batch].float() - mean) * scale).to(device)

    def fit(chosen: Tensor, rates: Sequence[float]) -> Probe:
        probe = _Training(train_x.shape[2], classes, rates, seed, device)
        steps = count_steps(len(chosen))
        for step, batch in enumerate(batches(len(chosen), steps, seed)):
            rows = chosen[batch]
            probe.step(read(train_x, rows), train_y[rows].to(device), cosine(step, steps))
        return probe.weights()

    @torch.no_grad()
    def judge(probe: Probe, tokens: Tensor, rows: Tensor) -> Tensor:
        parts = [attentive_logits(read(tokens, batch), probe) for batch in rows.split(BATCH)]
        return torch.cat(parts, dim=1).cpu()

    rate = choose_rate(RATES, train_y, seed, lambda kept, out: judge(fit(kept, RATES), train_x, out))
    probe = fit(torch.arange(len(train_y)), [rate])
    return accuracy(judge(probe, val_x, torch.arange(len(val_y)))[0], val_y)


def attentive_logits(tokens: Float[Tensor, "B T D"], probe: Probe) -> Float[Tensor, "S B K"]:
    """What S probes say of each image.

    The key projection is moved to the query, and the value projection behind the sum over the tokens: both are linear,
    so the result is the same, for T times less work.
    """
    asked = torch.einsum("sdhw,shw->sdh", probe.keys, probe.query) / math.sqrt(probe.query.shape[2])
    attention = torch.einsum("btd,sdh->bsht", tokens, asked).softmax(-1)
    gathered = torch.einsum("bsht,btd->bshd", attention, tokens)
    pooled = torch.einsum("bshd,sdhw->sbhw", gathered, probe.values).flatten(2)
    return pooled @ probe.weight + probe.bias


class _Training:
    """S probes that start alike and learn side by side, each at a rate of its own."""

    def __init__(self, width: int, classes: int, rates: Sequence[float], seed: int, device: torch.device) -> None:
        heads = max(1, width // _HEAD_WIDTH)
        each = width // heads
        noise = generator(seed, "probe-attentive")

        def normal(*shape: int, std: float) -> Tensor:
            return std * torch.randn(*shape, generator=noise)

        first = (
            normal(heads, each, std=0.02),  # so small that it begins as the mean over the tokens
            normal(width, heads, each, std=width**-0.5),
            normal(width, heads, each, std=width**-0.5),
            torch.zeros(heads * each, classes),
            torch.zeros(1, classes),
        )
        # Adam knows one rate for a tensor, so that each probe has tensors of its own, which are stacked in each step.
        self.probes = [[value.clone().to(device).requires_grad_() for value in first] for _ in rates]
        groups = [{"params": probe, "lr": rate} for probe, rate in zip(self.probes, rates, strict=True)]
        self.rates, self.optimiser = rates, torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)

    def weights(self) -> Probe:
        return Probe(*(torch.stack(values) for values in zip(*self.probes, strict=True)))

    def step(self, tokens: Tensor, labels: Tensor, share: float) -> None:
        """One update of all, at ``share`` of their rates."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.optimiser.zero_grad()
        with torch.enable_grad():
            # Summed over the probes, which share no weight: each gets the gradient of its own mean loss.
            logits = attentive_logits(tokens, self.weights())
            loss = sum(F.cross_entropy(one, labels) for one in logits)
            assert isinstance(loss, Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


def _statistics(tokens: Float16[Tensor, "N T D"]) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    """The mean of each channel and one over its deviation, part by part in float64: float32 of all is too much."""
    total = square = torch.zeros(tokens.shape[2], dtype=torch.float64)
    for part in tokens.split(BATCH):
        values = part.flatten(0, 1).double()
        total, square = total + values.sum(0), square + values.square().sum(0)
    mean = total / (tokens.shape[0] * tokens.shape[1])
    std = (square / (tokens.shape[0] * tokens.shape[1]) - mean.square()).clamp_min(0).sqrt()
    return mean.float(), inverse_scale(mean, std).float()
