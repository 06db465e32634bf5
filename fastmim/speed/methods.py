# SPDX-License-Identifier: Apache-2.0
"""Which methods are compared: recipes, changed by words, at one size or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmim import recipes
from fastmim.backbones.adapter import ways_to_hide
from fastmim.backbones.blueprint import Blueprint
from fastmim.cli_options import read_words
from fastmim.config import Config, locate, update
from fastmim.errors import UserError

BASELINE_PX = 224  # SimMIM's size (Xie et al. 2022, table 6)
FASTMIM_SIZES = (96, 128, 160, 192)
# The same for all methods of a comparison, or without a meaning in one.
_FIXED = {"paths", "recipe", "model", "pretrained", "global_batch", "micro_batch"}


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: the recipe and what was changed of it, without the size.
        config: its options, not resolved.
    """

    name: str
    config: Config

    @property
    def px(self) -> str:
        """The side of its images in pixels; first and last of a method whose images grow."""
        sizes = [resolution for resolution, _ in self.config.data.course]
        return "-".join(dict.fromkeys([str(sizes[0]), str(sizes[-1])]))

    @property
    def label(self) -> str:
        """Name and size."""
        return f"{self.name} {self.px}"

    @property
    def parts(self) -> list[tuple[Config, float]]:
        """The options for each size that it goes through, and the share of the run for which it stays there."""
        return [(update(self.config, {"resolution": side}), share) for side, share in self.config.data.course]


def choose(
    names: Sequence[str] | None, sizes: Sequence[int] | None, model: str, words: Mapping[str, Any]
) -> tuple[list[Method], Method]:
    """The methods to measure, and which of them is the baseline.

    Args:
        names: recipes with words, as ``fastmim+hide=drop``; a list that fits the network when None.
        sizes: in pixels, for each method that does not bring its own; the recipes' own when None.
        model: the network.
        words: options that all methods share.

    Raises:
        UserError: an unknown network, recipe or word, or a value that does not fit.
    """
    blueprint = Blueprint(model, {})
    hides = ways_to_hide(blueprint.model)
    simmim = "simmim" if "tokens" in hides else "simmim+hide=pixels"
    words = {**words, "model": model}
    baseline = parse(f"{simmim}+resolution={BASELINE_PX}", words)
    found = []
    for name in names or _fitting(blueprint, hides, simmim, bool(sizes)):
        method = parse(name, words)
        if sizes and method.config.data.phases is None and "+resolution=" not in name:
            found += [Method(method.name, update(method.config, {"resolution": side}, "--sizes")) for side in sizes]
        else:
            found.append(method)
    return list({method.label: method for method in [*found, baseline]}.values()), baseline


def parse(text: str, words: Mapping[str, Any]) -> Method:
    """The method that is written as ``RECIPE+NAME=VALUE+...``, with ``words`` that it cannot change.

    Raises:
        UserError: an unknown recipe or word, or a value that does not fit.
    """
    recipe, *changes = text.strip().split("+")
    where = f"method {text.strip()}"
    config = recipes.load(recipe)
    for change in changes:
        name, equals, _ = change.partition("=")
        if not equals or name.startswith("-"):
            raise UserError(f"{where}: '{change}' is not NAME=VALUE, as in fastmim+hide=drop")
        section, field = locate(name, where)
        if section == "system" or field in _FIXED or field in words:
            raise UserError(f"{where}: '{name}' is the same for all methods; leave it out")
    config = update(update(config, words), read_words(Config, changes), where)
    kept = [change for change in changes if not change.startswith("resolution=")]
    return Method("+".join([recipe, *kept]), config)


def _fitting(blueprint: Blueprint, hides: frozenset[str], simmim: str, sized: bool) -> list[str]:
    """FastMIM at several sizes and with its variants, then every other recipe; what cannot be done is said later."""
    names = ["fastmim"] if sized else [f"fastmim+resolution={side}" for side in FASTMIM_SIZES]
    fastest = "fastmim+hide=drop" if "drop" in hides else "fastmim"
    names += [fastest] if "drop" in hides else []
    if len(set(blueprint.strides)) == 1:  # a plain network, which has a map for each of its blocks
        names.append(f"{fastest}+discard={len(blueprint.strides) // 3}")
    return names + [simmim if name == "simmim" else name for name in recipes.names() if name != "fastmim"]
