# SPDX-License-Identifier: Apache-2.0
"""Pre-training without the last blocks of a network (FastMIM's layer discarding): where they are, how they go."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmim.errors import UserError

# Names in a stage under which its blocks lie, when it is no list of blocks itself (NesT names them otherwise).
_BLOCKS = ("blocks", "transformer_encoder")


@dataclass(frozen=True)
class Cut:
    """What is left of a network without its last blocks.

    Attributes:
        maps: how many of its maps are left, from the shallowest.
        blocks: the blocks that the deepest of these loses.
        discarded: prefixes of the stock keys of all that is discarded, in order of depth.
    """

    maps: int
    blocks: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()

    def apply(self, model: Any) -> None:
        """Take ``blocks`` out of a network; what lies behind the deepest map is left to timm's own pruning.

        The names of what stays are stock names.
        """
        for name in self.blocks:
            parent, _, index = name.rpartition(".")
            if _is_flat(model, name):
                model.get_submodule(parent)[int(index)] = nn.Identity()  # timm counts its maps by places in this list
            else:
                delattr(model.get_submodule(parent), index)


@dataclass(frozen=True)
class _Stage:
    """What leads from one map to the next.

    Attributes:
        parts: the modules that it consists of.
        blocks: the blocks in them, in order.
    """

    parts: tuple[str, ...]
    blocks: tuple[str, ...]


def plan_cut(name: str, model: Any, discard: int) -> Cut:
    """How to discard the last ``discard`` blocks of a timm network.

    Those of the deepest stage go first. With its last one the whole stage goes, and what brought the map to its size,
    so that the deepest map is that of the stage before.

    Args:
        name: of the network, for messages.
        model: it.
        discard: how many blocks.

    Raises:
        UserError: too many, or this network does not keep its blocks in lists.
    """
    if discard == 0:
        return Cut(len(model.feature_info))
    stages = _stages(model)
    known = sum(len(stage.blocks) for stage in stages)
    if not stages or not stages[-1].blocks:
        raise UserError(f"discard: fastmim does not know where the blocks of {name} are; use discard 0")
    if not 0 <= discard < known:
        raise UserError(f"discard: {discard} of the {known} blocks of {name}; at most {known - 1} can be discarded")
    discarded: list[str] = []
    while discard >= len(stages[-1].blocks):
        gone = stages.pop()
        discarded[:0] = gone.parts
        discard -= len(gone.blocks)
    blocks = stages[-1].blocks[len(stages[-1].blocks) - discard :]
    return Cut(len(stages), blocks, (*blocks, *discarded))


def _stages(model: Any) -> list[_Stage]:
    """One for each map; a stem has no blocks. Empty where blocks of several branches run side by side (CoaT)."""
    if getattr(model, "parallel_blocks", None) is not None:
        return []
    plain = len({info["reduction"] for info in model.feature_info}) == 1
    names = [_actual(model, info["module"]) for info in model.feature_info]
    stages = []
    for before, here in zip(["", *names], names, strict=False):
        parts = tuple(_parts(model, before, here))
        # In a plain network each map is that of one block, even where the block is a list of layers (ConvMixer).
        blocks = parts if plain else _blocks(model, parts)
        modules = tuple(dict.fromkeys(filter(None, [*parts, here])))
        stages.append(_Stage(modules, blocks if _hold_weights(model, blocks) else ()))
    return stages


def _actual(model: Any, name: str) -> str:
    """The name of a module; timm's own list is wrong for MViTv2 and Twins. Empty where there is none."""
    modules = dict(model.named_modules())
    candidates = [name, name.replace("block.", "stages."), name.replace("block.", "blocks.")]
    return next((candidate for candidate in candidates if candidate in modules), "")


def _parts(model: Any, before: str, here: str) -> Iterator[str]:
    """Modules after ``before``, up to ``here``: neighbours in one list, as maps are counted in most networks."""
    parent, _, index = here.rpartition(".")
    before_parent, _, before_index = before.rpartition(".")
    if not index.isdigit():
        if before_index.isdigit():  # the rest of that list, before a last convolution
            names = [f"{before_parent}.{child}" for child, _ in model.get_submodule(before_parent).named_children()]
            yield from names[names.index(before) + 1 :]
        elif here:
            yield here
        return
    first = int(before_index) + 1 if before_parent == parent else 0
    yield from (f"{parent}.{number}" for number in range(first, int(index) + 1))


def _blocks(model: Any, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks in parts that are lists of them; parts of a list that are none (Hiera's) are blocks themselves."""
    lists = [names for part in parts if (names := _list(model, part)) is not None]
    numbered = tuple(part for part in parts if part.rpartition(".")[2].isdigit())
    return tuple(block for names in lists for block in names) if lists else numbered


def _list(model: Any, part: str) -> list[str] | None:
    module = model.get_submodule(part)
    for name in _BLOCKS:
        if isinstance(getattr(module, name, None), nn.Sequential | nn.ModuleList):
            module, part = getattr(module, name), f"{part}.{name}"
    children = [name for name, _ in module.named_children()]
    numbered = children and all(re.fullmatch(r"b\d+", name) for name in children)  # RegNet's
    if numbered or isinstance(module, nn.Sequential | nn.ModuleList):
        return [f"{part}.{name}" for name in children]
    return None


def _is_flat(model: Any, block: str) -> bool:
    """Whether the block lies in a list by whose places timm counts the maps, as Hiera's do."""
    parents = {_actual(model, info["module"]).rpartition(".")[0] for info in model.feature_info}
    return block.rpartition(".")[0] in parents


def _hold_weights(model: Any, blocks: Sequence[str]) -> bool:
    """A list of single layers (VGG) has some without any: it is no list of blocks."""
    return all(any(True for _ in model.get_submodule(block).parameters()) for block in blocks)
