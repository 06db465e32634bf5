# SPDX-License-Identifier: Apache-2.0
"""The network of a run: built from its options, read again from its folder, handed over."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.backbones.adapter import build
from fastmim.config import Config, update
from fastmim.errors import UserError
from fastmim.export import export_state, export_timm
from fastmim.run_folder import Run
from fastmim.seeding import derive
from fastmim.tasks.pretrain import Pretrain, build_mim
from fastmim.train.batch import find_micro_batch, free_memory
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.distributed import Ranks

# An nn.Module that is a Backbone: Python's types have no word for both at once.
Network = Any


def build_network(config: Config, network: nn.Module | None) -> Network:
    """The user's own module, or a timm network for the run's images."""
    if network is not None:
        return network
    method = config.method
    return build(
        method.model,
        config.data.resolution,
        model_args=network_args(method.model_args, config.data.channels),
        pretrained=method.pretrained,
    )


def network_args(model_args: dict[str, Any], channels: int) -> dict[str, Any]:
    """Timm's arguments for images of ``channels``."""
    return model_args if channels == 3 else {"in_chans": channels, **model_args}


def untrained_network(config: Config, network: nn.Module | None, side: int) -> Network:
    """The network as the run began with it: the same seed, the same start."""
    if network is not None:
        raise UserError("a module of your own has no untrained twin here; probe it before and after training")
    torch.manual_seed(derive(config.optim.seed, "init"))
    return build_network(update(config, {"resolution": side}), None)


def trained_network(run: Run, network: nn.Module | None, side: int | None = None) -> Network:
    """The run's network with the weights of its newest checkpoint, at another image size if asked for."""
    config = run.config
    found, _ = Checkpoints(run.path / "checkpoints").latest()
    if found is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    backbone = build_network(update(config, {"pretrained": False}), network)
    mim = build_mim(config, backbone)
    mim.load_state_dict({name.removeprefix("mim."): value for name, value in found.tensors["model"].items()})
    if side not in (None, config.data.resolution):
        folder = export_network(run, backbone, run.exported)
        return build(f"local-dir:{folder.resolve()}", side, pretrained=True)
    return backbone


def export_network(run: Run, backbone: Network, folder: Path) -> Path:
    """Writes the network's weights, as a timm folder where it is one of timm's."""
    config, data, status = run.config, run.read("data.json") or {}, run.status
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


def count_steps(config: Config, images: int) -> int:
    """Weight updates of a run."""
    assert config.optim.global_batch is not None
    return max(1, round(config.optim.epochs * images / config.optim.global_batch))


def with_micro_batch(config: Config, task: Pretrain, device: torch.device, here: Ranks) -> Config:
    """The configuration with the largest micro-batch that fits the device."""
    assert config.optim.global_batch is not None
    data = config.data

    def example(count: int) -> dict[str, Tensor]:
        dtype = torch.float32 if data.values == "raw" else torch.uint8
        images = torch.zeros(count, data.channels, data.resolution, data.resolution, dtype=dtype, device=device)
        return {"images": images, "keys": torch.arange(count, device=device)}

    size = find_micro_batch(task, example, config.optim.global_batch // here.world, device, free_memory(device))
    return update(config, {"micro_batch": size})
