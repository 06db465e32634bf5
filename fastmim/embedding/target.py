# SPDX-License-Identifier: Apache-2.0
"""The network whose features are wanted: that of a run, of timm, or of a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmim.backbones.adapter import build
from fastmim.backbones.hiding import whole_network
from fastmim.run_folder import Run
from fastmim.run_network import trained_network
from fastmim.seeding import derive

_RESOLUTION = 128


@dataclass(frozen=True)
class Opened:
    """A network with what it must be told of images."""

    backbone: Any
    """An nn.Module that is a `fastmim.Backbone`."""
    mean: tuple[float, ...]
    """What is subtracted from each channel: of 0 to 1, or of the stored values."""
    std: tuple[float, ...]
    """What each channel is divided by."""
    raw: bool
    """It wants stored values, not 0 to 255."""
    channels: int
    resolution: int
    """Side of the images in pixels."""
    name: str
    """What to tell people."""


def open_backbone(
    word: str | Path | Run, resolution: int | None = None, model: nn.Module | None = None, seed: int = 0
) -> Opened:
    """The network that ``word`` names, at one size.

    Args:
        word: a run or its folder, a timm model (its released weights are fetched) or ``local-dir:FOLDER``.
        resolution: side of the images in pixels; the run's own, or 128.
        model: the run's module, where it was not one of timm's.
        seed: of what is drawn where weights are missing.

    Raises:
        UserError: there is no such run or model, or it cannot take this size.
    """
    run = word if isinstance(word, Run) else Run(word) if (Path(word) / "config.yaml").is_file() else None
    if run is not None:
        data = run.config.data
        side = resolution or data.resolution
        assert data.mean is not None and data.std is not None
        network = trained_network(run, model, side)
        return Opened(network, data.mean, data.std, data.values == "raw", data.channels, side, run.config.method.model)
    side = resolution or _RESOLUTION
    torch.manual_seed(derive(seed, "init"))
    backbone = whole_network(build(str(word), side, pretrained=True), side)
    facts = backbone.model.pretrained_cfg
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return Opened(backbone, mean, std, False, len(mean), side, str(word))
