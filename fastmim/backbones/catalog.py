# SPDX-License-Identifier: Apache-2.0
"""What can be used as a backbone."""

from typing import Any

import timm

from fastmim.backbones.adapter import ways_to_hide
from fastmim.backbones.blueprint import Blueprint


def families() -> dict[str, list[str]]:
    """Every image network that timm registers, by the file of ``timm.models`` that defines it."""
    return {module: names for module in timm.list_modules() if (names := timm.list_models(module=module))}


def describe(name: str, resolution: int = 128) -> dict[str, Any]:
    """What ``fastmim models`` tells of a network, laid out without memory or weights.

    Returns:
        ``name``; ``params``, the number of weights without the head; ``stages``, the (channels, stride) of its maps,
        shallow to deep, equal neighbours once; ``hides``, the ways of hiding that work; ``fits``, whether it takes
        images of ``resolution`` pixels.

    Raises:
        UserError: timm has no such model.
    """
    blueprint = Blueprint(name, {})
    stages = [(info["num_chs"], info["reduction"]) for info in blueprint.model.feature_info]
    return {
        "name": name,
        "params": sum(weight.numel() for weight in blueprint.model.parameters()),
        "stages": list(dict.fromkeys(stages)),
        "hides": ways_to_hide(blueprint.model),
        "fits": blueprint.fits(resolution, blueprint.absolute((-1,))),
    }
