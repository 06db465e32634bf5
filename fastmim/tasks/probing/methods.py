# SPDX-License-Identifier: Apache-2.0
"""The ways to judge frozen features. A new one is a function and a line in ``METHODS``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from fastmim.tasks.probing.attentive import attentive_accuracy
from fastmim.tasks.probing.knn import knn_accuracy
from fastmim.tasks.probing.linear import linear_accuracy
from fastmim.tasks.probing.linear_sgd import linear_sgd_accuracy


@dataclass(frozen=True)
class Features:
    """What is known of some images: a vector each, perhaps T tokens each (the last map, not pooled), and the labels."""

    vectors: Float[Tensor, "N D"]
    labels: Int64[Tensor, "N"]
    tokens: Float16[Tensor, "N T E"] | None = None

    def take(self, rows: Int64[Tensor, "_"]) -> "Features":
        """Those of some images."""
        return Features(self.vectors[rows], self.labels[rows], None if self.tokens is None else self.tokens[rows])


@dataclass(frozen=True)
class Options:
    """What a measurement depends on besides the features."""

    seed: int = 0
    k: int = 20
    device: torch.device | None = None


class Method(NamedTuple):
    """One way to judge: its name in a sentence, the percent of the second part named rightly, what it reads."""

    name: str
    measure: Callable[[Features, Features, Options], float]
    reads_tokens: bool = False


def _knn(train: Features, val: Features, options: Options) -> float:
    return knn_accuracy(train.vectors, train.labels, val.vectors, val.labels, k=options.k)


def _linear(train: Features, val: Features, options: Options) -> float:
    return linear_accuracy(train.vectors, train.labels, val.vectors, val.labels, options.seed)


def _linear_sgd(train: Features, val: Features, options: Options) -> float:
    return linear_sgd_accuracy(train.vectors, train.labels, val.vectors, val.labels, options.seed)


def _attentive(train: Features, val: Features, options: Options) -> float:
    assert train.tokens is not None and val.tokens is not None
    return attentive_accuracy(train.tokens, train.labels, val.tokens, val.labels, options.seed, options.device)


METHODS = {
    "linear": Method("linear accuracy", _linear),
    "linear-sgd": Method("linear accuracy by SGD", _linear_sgd),
    "attentive": Method("attentive accuracy", _attentive, reads_tokens=True),
    "knn": Method("kNN", _knn),
}
