# SPDX-License-Identifier: Apache-2.0
"""Pre-training as a Task: a backbone, what is hidden of an image, and what is predicted of it."""

import math
from typing import Any, cast

import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from fastmim.backbones.adapter import Backbone
from fastmim.backbones.hiding import HidingBackbone
from fastmim.config import Config
from fastmim.data.labelled import Labelled
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.mim.decoder import DECODERS, default_size
from fastmim.mim.masking import MASKINGS
from fastmim.mim.model import MIM, as_floats
from fastmim.mim.targets import TARGETS
from fastmim.tasks.features import features
from fastmim.tasks.param_groups import decay_groups
from fastmim.tasks.probe import effective_rank, knn_accuracy, linear_accuracy, nearest_neighbours

Batch = dict[str, Tensor]
# Enough to judge by, and quick even on a CPU.
_EVAL_IMAGES = 2000
_SHOWN = 8


class Pretrain(nn.Module):
    """Masked image modelling of one backbone, and what says whether it still learns.

    Args:
        mim: the model, whose backbone is a ``HidingBackbone``.
        config: resolved.
        held_out: unseen images for the reconstruction loss and the rank of the features, or None.
        labelled: images with labels for kNN and linear accuracy on the way, or None.
    """

    def __init__(
        self, mim: MIM, config: Config, held_out: EvalLoader | None = None, labelled: Labelled | None = None
    ) -> None:
        super().__init__()
        self.mim, self.config, self.held_out = mim, config, held_out
        self.labelled = None if labelled is None else _loaders(labelled, config)

    @property
    def hiding(self) -> HidingBackbone:
        """The backbone and its way of hiding."""
        assert isinstance(self.mim.backbone, HidingBackbone)
        return self.mim.backbone

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a batch ``{"images": UInt8["B C S S"], "keys": Int64["B"]}``."""
        return self.mim(batch["images"], batch["keys"]).loss, {}

    def param_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Weights that decay, and norms, biases, mask and position tokens, which do not."""
        skip = {f"mim.backbone.{name}" for name in self.hiding.no_weight_decay()}
        return decay_groups(self.named_parameters(), weight_decay, skip)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``val_loss`` and ``effective_rank`` on held-out images; ``knn`` and ``linear`` in percent with labels."""
        values: dict[str, float] = {}
        if self.held_out is not None:
            values["val_loss"] = self._held_out_loss(self.held_out)
            values["effective_rank"] = effective_rank(self._features(self.held_out)[0])
        if self.labelled is not None:
            (train_x, train_y), (val_x, val_y) = (self._features(loader) for loader in self.labelled)
            assert train_y is not None and val_y is not None
            values["knn"] = knn_accuracy(train_x, train_y, val_x, val_y)
            with torch.enable_grad():
                values["linear"] = linear_accuracy(train_x, train_y, val_x, val_y)
        return values

    def reconstruction(self, loader: EvalLoader) -> bytes:
        """The first images with their masks, targets and predictions, as the file that the report draws."""
        batch = self._to_device(next(iter(loader)))
        images, keys = batch["images"][:_SHOWN], batch["keys"][:_SHOWN]
        was_training = self.training
        self.eval()
        with torch.no_grad():
            out = self.mim(images, keys)
        self.train(was_training)
        content = {
            "images": viewable(images, self.config),
            "mask": out.mask,
            "target": self._shown(out.target),
            "prediction": self._shown(out.prediction.float()),
        }
        method = self.config.method
        metadata = {"target": method.target, "cell": str(self.mim.target.cell)}
        return safetensors.torch.save({name: value.cpu().contiguous() for name, value in content.items()}, metadata)

    def neighbours(self, loader: EvalLoader, queries: int = 6, count: int = 6) -> bytes:
        """Queries and their nearest images by the features' cosine, as the file that the report draws."""
        table, _ = self._features(loader)
        images = torch.cat([viewable(batch["images"], self.config) for batch in loader])
        chosen = torch.linspace(0, len(table) - 1, min(queries, len(table))).long()
        found, similarity = nearest_neighbours(table, chosen, min(count, len(table) - 1))
        rows = torch.cat([chosen[:, None], found], dim=1)
        return safetensors.torch.save({"thumbs": images[rows].contiguous(), "similarity": similarity.contiguous()})

    def _shown(self, cells: Tensor) -> Tensor:
        """Of pixels of many channels, those that ``viewable`` shows; histograms of all."""
        data, cell = self.config.data, self.mim.target.cell
        if self.config.method.target == "hog" or data.channels == 3:
            return cells
        colours = cells.unflatten(1, (data.channels, cell * cell))
        return colours[:, _shown_channels(data.channels)].flatten(1, 2)

    def _held_out_loss(self, loader: EvalLoader) -> float:
        was_training = self.training
        self.eval()
        total, count = torch.zeros(()), 0
        for batch in map(self._to_device, loader):
            # The masks hide equally much of every image, so batches count by their images.
            total += self.mim(batch["images"], batch["keys"]).loss.cpu() * len(batch["images"])
            count += len(batch["images"])
        self.train(was_training)
        return (total / max(count, 1)).item()

    def _features(self, loader: EvalLoader) -> tuple[Tensor, Tensor | None]:
        data = self.config.data
        assert data.mean is not None and data.std is not None
        return features(self.hiding.backbone, loader, self.mim.mean.device, data.mean, data.std)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.mim.mean.device) for name, value in batch.items()}


def build_mim(config: Config, backbone: Backbone) -> MIM:
    """The model of a resolved configuration."""
    method, stage = config.method, backbone.stages[-1]
    assert method.block is not None and method.cell is not None
    assert config.data.mean is not None and config.data.std is not None
    target = TARGETS[method.target](config.data.channels, method.cell)
    size: dict[str, Any] = {}
    if method.decoder == "transformer":
        size = {"fill": method.hide == "drop", "dim": method.decoder_dim, "depth": method.decoder_depth}
    decoder = DECODERS[method.decoder](stage.channels, stage.stride, target.cell, target.channels, **size)
    hiding = HidingBackbone(cast(nn.Module, backbone), method.hide, config.data.channels)
    masking = MASKINGS["random"](method.mask_ratio)
    return MIM(hiding, decoder, target, masking, method.block, config.data.mean, config.data.std, method.loss)


def resolve(config: Config, backbone: Backbone, images: int, world: int = 1) -> Config:
    """Every choice that was left open and can change the result, but the micro-batch, which takes a measurement.

    Raises:
        UserError: sizes that do not fit together; the nearest that do are named.
    """
    chosen = {"method": _method(config, backbone), "optim": _optim(config, images, world)}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in chosen.items()}
    )


def _method(config: Config, backbone: Backbone) -> dict[str, Any]:
    """Block, cell and decoder that fit the crop and the network."""
    side, method, stage = config.data.resolution, config.method, backbone.stages[-1]
    block = method.block or _block(side, stage.stride)
    if side % block:
        raise UserError(f"resolution {side} is not a multiple of the block of {block} px; {_near(side, block)}")
    cell = method.cell or (_hog_cell(block, stage.stride) if method.target == "hog" else min(stage.stride, block))
    if block % cell or (cell % stage.stride and stage.stride % cell):
        raise UserError(
            f"cells of {cell} px do not divide blocks of {block} px and fit the network's stride of {stage.stride};"
            f" leave --cell out, or try {_hog_cell(block, stage.stride)}"
        )
    if method.decoder == "linear" and method.hide == "drop":
        raise UserError("the linear decoder sees nothing of dropped blocks; use decoder=transformer, or hide=tokens")
    blocks = (side // block) ** 2
    if not 0 < round(method.mask_ratio * blocks) < blocks:
        raise UserError(
            f"mask_ratio {method.mask_ratio} hides {round(method.mask_ratio * blocks)} of {blocks} blocks;"
            " a smaller --block or another ratio is needed"
        )
    if method.decoder_dim is not None and method.decoder_dim % 32:
        raise UserError(f"decoder_dim {method.decoder_dim} is not a multiple of 32; {_near(method.decoder_dim, 32)}")
    dim, depth = default_size(stage.channels, hierarchical=stage.stride > 16)
    size = {"decoder_dim": method.decoder_dim or dim, "decoder_depth": method.decoder_depth or depth}
    return {"block": block, "cell": cell, **size}


def _optim(config: Config, images: int, world: int) -> dict[str, Any]:
    """Global batch and learning rate."""
    optim = config.optim
    batch = optim.global_batch or _power_of_two(images / 32) // world * world
    if batch % world:
        raise UserError(f"global_batch {batch} is not a multiple of the {world} processes; {_near(batch, world)}")
    if optim.micro_batch is not None and batch % (optim.micro_batch * world):
        raise UserError(f"global_batch {batch} is not a multiple of {world} x micro_batch {optim.micro_batch}")
    lr = optim.lr or (optim.lr_per_256 * batch / 256 if optim.lr_per_256 else 2.4e-3 * math.sqrt(batch / 4096))
    return {"global_batch": batch, "lr": lr, "lr_per_256": None}


def _loaders(labelled: Labelled, config: Config) -> tuple[EvalLoader, EvalLoader]:
    data = config.data

    def some(table: ImageTable, labels: tuple[int, ...]) -> EvalLoader:
        rows = range(0, len(table), max(1, math.ceil(len(table) / _EVAL_IMAGES)))
        pictures = Pictures(table.take(rows), data.channels, data.values == "raw")
        return EvalLoader(pictures, resolution=data.resolution, batch_size=256, labels=[labels[row] for row in rows])

    return some(labelled.train, labelled.train_labels), some(labelled.val, labelled.val_labels)


def viewable(images: Tensor, config: Config) -> UInt8[Tensor, "N 3 S S"]:
    """Images as people can look at them: of other than 8-bit colour, the first channels, two deviations each way."""
    data = config.data
    if data.channels == 3 and data.values == "8bit":
        return images
    assert data.mean is not None and data.std is not None
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (data.mean, data.std))
    levels = ((as_floats(images.cpu()) - mean) / std)[:, _shown_channels(data.channels)] / 4 + 0.5
    return (levels.clamp(0, 1) * 255).round().to(torch.uint8)


def _shown_channels(channels: int) -> list[int]:
    return [0, 1, 2] if channels >= 3 else [0, 0, 0]


def _block(resolution: int, stride: int) -> int:
    """An eighth of the crop, as the paper's 16 px at 128, but a multiple of the stride that divides the crop."""
    most = max(stride, resolution // 8)
    return max((b for b in range(stride, most + 1, stride) if resolution % b == 0), default=stride)


def _hog_cell(block: int, stride: int) -> int:
    """The paper's 8 px, or the largest below that fits block and stride (7 for patches of 14 px)."""
    return max(c for c in range(1, 9) if block % c == 0 and (stride % c == 0 or c % stride == 0))


def _power_of_two(value: float) -> int:
    return min(4096, max(64, 2 ** round(math.log2(max(value, 1)))))


def _near(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"nearest that work: {', '.join(str(size) for size in (below, above) if size > 0)}"
