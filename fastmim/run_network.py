# SPDX-License-Identifier: Apache-2.0
"""The network of a run: built from its options, read again from its folder, handed over."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.backbones.adapter import build
from fastmim.backbones.hiding import HidingBackbone, backbone_side, whole_network
from fastmim.config import Config, ConfigT, RunConfig, update
from fastmim.errors import UserError
from fastmim.export import export_state, export_timm
from fastmim.mim.model import MaskedImageModel
from fastmim.run_folder import Run
from fastmim.seeding import derive
from fastmim.tasks.pretrain import build_mim
from fastmim.train.batch import find_micro_batch, free_memory
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.distributed import Ranks

# An nn.Module that is a Backbone: Python's types have no word for both at once.
Network = Any


def build_network(config: Config, network: nn.Module | None, side: int | None = None) -> Network:
    """The user's own module, or a timm network for images of ``side`` pixels; of the run's first phase when not given.

    Raises:
        UserError: the network does not fit the options; or it cannot change to the sizes of later phases.
    """
    method, course = config.method, config.data.course
    if network is not None:
        if method.discard:
            raise UserError("--discard is for timm's networks; leave the last layers out of your own module instead")
        if method.scales not in (None, "stages"):
            raise UserError(
                f"scales: your own module returns the maps that it chooses; use --scales stages for all of them, not"
                f" {method.scales}"
            )
        return _at_first(network, config, side)
    try:
        backbone = build(
            method.model,
            backbone_side(side or course[0][0], method.hide),
            model_args=network_args(method.model_args, config.data.channels),
            pretrained=method.pretrained,
            scales=method.scales,
            discard=method.discard,
        )
        for resolution, _ in course[1:]:
            backbone.check_resize(backbone_side(resolution, method.hide))
    except UserError as error:
        if method.hide == "compact" and "cannot take images" in str(error):
            raise UserError(f"hide: 'compact' gives the network images of half the side: {error}") from None
        raise
    return backbone


def _at_first(network: nn.Module, config: Config, side: int | None) -> Network:
    """The user's module; where it can change its size, at that of the first phase, and able to take the others."""
    backbone: Network = network
    if hasattr(backbone, "resize"):
        hide, (first, *others) = config.method.hide, [resolution for resolution, _ in config.data.course]
        for resolution in others:
            backbone.check_resize(backbone_side(resolution, hide))
        backbone.resize(backbone_side(side or first, hide))
    return backbone


def network_args(model_args: dict[str, Any], channels: int) -> dict[str, Any]:
    """Timm's arguments for images of ``channels``."""
    return model_args if channels == 3 else {"in_chans": channels, **model_args}


def untrained_network(config: Config, network: nn.Module | None, side: int) -> Network:
    """The network as the run began with it: the same seed, the same start."""
    if network is not None:
        raise UserError("a module of your own has no untrained twin here; probe it before and after training")
    torch.manual_seed(derive(config.optim.seed, "init"))
    return whole_network(build_network(update(config, {"pretrained": False}), None), side)


def trained_model(run: Run, network: nn.Module | None) -> tuple[MaskedImageModel, int]:
    """The run's model with the weights of its newest checkpoint, and the side in pixels of the images it is built for.

    Raises:
        UserError: there is no checkpoint yet, or none that is whole.
    """
    config = run.config
    found, _ = Checkpoints(run.path / "checkpoints").latest()
    if found is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    resolution = config.data.course[found.state.get("phase", 0)][0]
    mim = build_mim(config, build_network(update(config, {"pretrained": False}), network, resolution))
    mim.load_state_dict({name.removeprefix("mim."): value for name, value in found.tensors["model"].items()})
    return mim, resolution


def trained_network(run: Run, network: nn.Module | None, side: int | None = None) -> Network:
    """The run's network with the weights of its newest checkpoint, at another image size if asked for."""
    mim, resolution = trained_model(run, network)
    return whole_network(bare_network(mim), side or resolution)


def bare_network(mim: MaskedImageModel) -> Network:
    """The network of a model, without its way of hiding."""
    assert isinstance(mim.backbone, HidingBackbone)
    return mim.backbone.backbone


def export_network(run: Run, backbone: Network, folder: Path) -> Path:
    """Writes the network's weights, as a timm folder where it is one of timm's."""
    config, data, status = run.config, run.read("data.json") or {}, run.status
    backbone = whole_network(backbone, config.data.resolution)
    card = {
        "method": f"{config.method.recipe}: {config.method.target} targets, {config.method.mask_ratio:.0%} hidden",
        "images": f"{data.get('images', '?')} images, resolution {config.data.resolution} px",
        "samples seen": f"{status['samples']} ({status['step']} steps of {config.optim.global_batch})",
        "seed": str(config.optim.seed),
    }
    if not hasattr(backbone, "architecture"):
        return export_state(backbone.weights(), folder, card)
    assert config.data.mean is not None and config.data.std is not None
    return export_timm(
        backbone.architecture, backbone.create_args, backbone.weights(), folder,
        resolution=config.data.resolution, mean=config.data.mean, std=config.data.std, card=card,
        discarded=getattr(backbone, "discarded", ()),
    )  # fmt: skip


def count_steps(config: RunConfig, images: int) -> int:
    """Weight updates of a run."""
    assert config.optim.global_batch is not None
    return max(1, round(config.optim.epochs * images / config.optim.global_batch))


def with_micro_batch(config: ConfigT, task: nn.Module, device: torch.device, here: Ranks) -> ConfigT:
    """The configuration with the largest micro-batch that fits the device."""
    assert config.optim.global_batch is not None
    data = config.data
    side = data.course[0][0]

    def example(count: int) -> dict[str, Tensor]:
        dtype = torch.float32 if data.values == "raw" else torch.uint8
        images = torch.zeros(count, data.channels, side, side, dtype=dtype, device=device)
        keys, indices = torch.arange(count, device=device), torch.zeros(count, dtype=torch.long, device=device)
        return {"images": images, "keys": keys, "indices": indices}

    size = find_micro_batch(task, example, config.optim.global_batch // here.world, device, free_memory(device))
    return update(config, {"micro_batch": size})
