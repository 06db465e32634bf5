# SPDX-License-Identifier: Apache-2.0
"""Which parameters decay."""

from collections.abc import Collection, Iterable

from torch import nn


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, skip: Collection[str] = ()
) -> list[dict[str, object]]:
    """Two groups of parameters: weights, which decay, and the rest, which do not.

    Norms and biases have one axis; mask tokens, class tokens, position embeddings and what the network itself names in
    ``skip`` are not weights of a layer either. (The released FastMIM code decays its mask token.)
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        free = parameter.ndim <= 1 or name in skip or any(word in leaf for word in ("token", "pos_embed", "colour"))
        (keep if free else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
