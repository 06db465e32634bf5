# SPDX-License-Identifier: Apache-2.0
"""What the layouts are made of: a state of named tensors, and how its names are brought to others."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
# A pattern that must match the whole key, and what it becomes; None: it is no weight (a buffer that timm computes).
Rule = tuple[str, str | None]


@dataclass(frozen=True)
class Content:
    """A checkpoint's tensors, by their names without wrappers, and what else it tells.

    Attributes:
        config: ``config.json`` beside the weights; empty where there is none.
        wrapped: whether the tensors lay in a larger checkpoint ("model" ...), as training code saves them.
        notes: sentences for the user.
    """

    state: State
    config: Mapping[str, Any] = field(default_factory=dict)
    wrapped: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """The tensors by timm's keys.

    Attributes:
        weights: by timm's keys.
        unused: foreign keys without a place.
        heads: of attention, where the layout tells; one number, or one a stage.
        act_layer: the activation in timm's words, where the checkpoint tells one that is not GELU.
        resolution: in pixels, where the checkpoint tells.
        notes: sentences for the user.
    """

    weights: State
    unused: tuple[str, ...] = ()
    heads: int | tuple[int, ...] | None = None
    act_layer: str | None = None
    resolution: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a project names its weights.

    Attributes:
        name: of the project.
        recognise: whether a checkpoint is of this kind.
        convert: to timm's keys.
    """

    name: str
    recognise: Callable[[Content], bool]
    convert: Callable[[Content], Converted]


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[State, tuple[str, ...]]:
    """The tensors under new names, each by the first rule that matches its whole key; and the keys without a rule."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    renamed: State = {}
    unused: list[str] = []
    for key, value in state.items():
        for pattern, new in compiled:
            match = pattern.fullmatch(key)
            if match is not None:
                if new is not None:
                    renamed[match.expand(new)] = value
                break
        else:
            unused.append(key)
    return renamed, tuple(unused)


def join(state: State, parts: Sequence[str], whole: str) -> State:
    """Puts linear layers side by side that another project keeps as one: ``q``, ``k`` and ``v`` as ``qkv``.

    Args:
        state: is left as it is.
        parts: the last names of the layers, such as ("q", "k", "v"), in the order of the rows.
        whole: the name of the one layer.
    """
    joined = dict(state)
    for key in state:
        layer, _, kind = key.rpartition(".")
        stem, _, last = layer.rpartition(".")
        names = [f"{stem}.{part}.{kind}" for part in parts]
        if last == parts[0] and all(name in state for name in names):
            joined[f"{stem}.{whole}.{kind}"] = torch.cat([joined.pop(name) for name in names])
    return joined


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the group of ``pattern`` finds at the beginning of a key; 0 without.

    Raises:
        ValueError: it is more than there are keys.
    """
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    number = max(found, default=-1) + 1
    if number > len(state):  # a network of as many blocks could fill the memory
        raise ValueError(f"{number} blocks, but {len(state)} weights")
    return number
