# SPDX-License-Identifier: Apache-2.0
"""Pre-training as a Task: a backbone, what is hidden of an image, and what is predicted of it."""

import math
from typing import Any, cast

import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from fastmim.backbones.adapter import Backbone, Stage
from fastmim.backbones.hiding import HidingBackbone, whole_network
from fastmim.backbones.resizing import Carry
from fastmim.config import Config, RunConfig
from fastmim.data.labelled import Labelled
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.data.table import ImageTable
from fastmim.mim.decoder import DECODERS
from fastmim.mim.masking import MASKINGS
from fastmim.mim.model import MaskedImageModel, as_floats
from fastmim.mim.targets import HOG, TARGETS, Target
from fastmim.tasks.features import features
from fastmim.tasks.param_groups import decay_groups
from fastmim.tasks.probe import effective_rank, knn_accuracy, linear_accuracy, nearest_neighbours
from fastmim.tasks.resolve import cells_of

Batch = dict[str, Tensor]
# Enough to judge by, and quick even on a CPU.
_EVAL_IMAGES = 2000
_SHOWN = 8
_HIDING = "mim.backbone."
_HOG_CELL = 8


class Pretrain(nn.Module):
    """Masked image modelling of one backbone, and what says whether it still learns.

    Args:
        mim: the model, whose backbone is a ``HidingBackbone``.
        config: resolved.
        held_out: unseen images for the reconstruction loss and the rank of the features, or None.
        labelled: images with labels for kNN and linear accuracy on the way, or None.
    """

    def __init__(
        self,
        mim: MaskedImageModel,
        config: Config,
        held_out: EvalLoader | None = None,
        labelled: Labelled | None = None,
    ) -> None:
        super().__init__()
        self.mim, self.config, self.held_out = mim, config, held_out
        self.labelled = None if labelled is None else _loaders(labelled, config)
        self.phase = 0

    @property
    def hiding(self) -> HidingBackbone:
        """The backbone and its way of hiding."""
        assert isinstance(self.mim.backbone, HidingBackbone)
        return self.mim.backbone

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a batch ``{"images": UInt8["B C S S"], "keys": Int64["B"], "progress": Float[""]}``."""
        return self.mim(batch["images"], batch["keys"], batch.get("progress", 0.0)).loss, {}

    def enter(self, phase: int) -> Carry:
        """Goes over to the images' size in another phase, as `fastmim.train.engine.Task` tells."""
        self.phase = phase
        device = self.mim.mean.device
        carry = self.hiding.resize(self.resolution)
        self.to(device)
        return carry.under(_HIDING)

    @property
    def resolution(self) -> int:
        """Side of the images in this phase."""
        return self.config.data.course[self.phase][0]

    def param_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Weights that decay, and norms, biases, mask and position tokens, which do not."""
        skip = {_HIDING + name for name in self.hiding.no_weight_decay()}
        return decay_groups(self.named_parameters(), weight_decay, skip)

    def stepped(self) -> None:
        """Nothing is kept besides the weights."""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``val_loss`` and ``effective_rank`` on held-out images; ``knn`` and ``linear`` in percent with labels."""
        values: dict[str, float] = {}
        if self.held_out is not None:
            unseen = self.held_out.at(self.resolution)
            values["val_loss"] = self._held_out_loss(unseen)
            values["effective_rank"] = effective_rank(self._features(unseen)[0])
        if self.labelled is not None:
            (train_x, train_y), (val_x, val_y) = (
                self._features(loader.at(self.resolution)) for loader in self.labelled
            )
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
        cells = [cast(Target, target).cell for target in self.mim.targets]
        scale = min(range(len(cells)), key=lambda place: abs(cells[place] - _HOG_CELL))
        content = {
            "images": viewable(images, self.config),
            "mask": out.masks.hidden[: len(images)],
            "target": self._shown(out.targets[scale], cells[scale]),
            "prediction": self._shown(out.predictions[scale][: len(images)].float(), cells[scale]),
        }
        method = self.config.method
        metadata = {"target": method.target.removesuffix("_colour"), "cell": str(cells[scale])}
        return safetensors.torch.save({name: value.cpu().contiguous() for name, value in content.items()}, metadata)

    def neighbours(self, loader: EvalLoader, queries: int = 6, count: int = 6) -> bytes:
        """Queries and their nearest images by the features' cosine, as the file that the report draws."""
        table, _ = self._features(loader)
        images = torch.cat([viewable(batch["images"], self.config) for batch in loader])
        chosen = torch.linspace(0, len(table) - 1, min(queries, len(table))).long()
        found, similarity = nearest_neighbours(table, chosen, min(count, len(table) - 1))
        rows = torch.cat([chosen[:, None], found], dim=1)
        return safetensors.torch.save({"thumbs": images[rows].contiguous(), "similarity": similarity.contiguous()})

    def _shown(self, values: Tensor, cell: int) -> Tensor:
        """What the report draws: of HOG with colours the histograms; of pixels of many channels, some of those."""
        data, target = self.config.data, self.config.method.target
        if target.startswith("hog"):
            return values[:, : HOG(data.channels, cell).channels]
        if data.channels == 3:
            return values
        colours = values.unflatten(1, (data.channels, cell * cell))
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
        """Features of whole images, at the size of this phase."""
        data = self.config.data
        assert data.mean is not None and data.std is not None
        # A network that sees compact images is built for half the side.
        network = whole_network(self.hiding.backbone, loader.resolution)
        return features(network, loader, self.mim.mean.device, data.mean, data.std)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.mim.mean.device) for name, value in batch.items()}


def build_mim(config: Config, backbone: Backbone) -> MaskedImageModel:
    """The model of a resolved configuration."""
    method, data = config.method, config.data
    assert method.block is not None and data.mean is not None and data.std is not None
    hiding = HidingBackbone(cast(nn.Module, backbone), method.hide, data.channels, method.block)
    stages = hiding.stages if method.scales else hiding.stages[-1:]
    targets = [TARGETS[method.target](data.channels, cell) for cell in cells_of(config, stages)]
    decoders = [_decoder(config, stage, target) for stage, target in zip(stages, targets, strict=True)]
    masking = MASKINGS[method.masking](ratio=method.mask_ratio, masks=method.masks, predict=method.predict_ratio)
    return MaskedImageModel(
        hiding, masking, targets, decoders, block=method.block, mean=data.mean, std=data.std, loss=method.loss
    )


def _decoder(config: Config, stage: Stage, target: Target) -> nn.Module:
    method = config.method
    size: dict[str, Any] = {}
    if method.decoder != "linear":
        size = {"fill": method.hide in ("drop", "compact"), "dim": method.decoder_dim, "depth": method.decoder_depth}
        size["grid"] = config.data.course[0][0] // stage.stride
    return DECODERS[method.decoder](stage.channels, stage.stride, target.cell, target.channels, **size)


def _loaders(labelled: Labelled, config: Config) -> tuple[EvalLoader, EvalLoader]:
    data = config.data

    def some(table: ImageTable, labels: tuple[int, ...]) -> EvalLoader:
        rows = range(0, len(table), max(1, math.ceil(len(table) / _EVAL_IMAGES)))
        pictures = Pictures(table.take(rows), data.channels, data.values == "raw")
        return EvalLoader(pictures, resolution=data.resolution, batch_size=256, labels=[labels[row] for row in rows])

    return some(labelled.train, labelled.train_labels), some(labelled.val, labelled.val_labels)


def viewable(images: Tensor, config: RunConfig) -> UInt8[Tensor, "N 3 S S"]:
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
