# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as a Task: a network with a head, images and labels that are mixed, and a moving average."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchvision.transforms import v2

from fastmim.backbones.resizing import Carry
from fastmim.config import ClassifyConfig
from fastmim.mim.model import Images, as_floats
from fastmim.tasks.features import Progress

Batch = dict[str, Tensor]


class Classify(nn.Module):
    """A classifier that learns from labels.

    Args:
        network: images to logits, a stock timm model.
        method: how images and labels are varied.
        labels: of every training image.
        classes: how many there are.
        mean: subtracted from each channel (bytes count as 0 to 1).
        std: each channel is divided by it.
        layer_decay: each block learns slower than the next by this factor; 1 for all alike.
        shown: labelled images to measure on the way, or None. Nothing is ever chosen by what is measured.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        method: ClassifyConfig,
        labels: Int64[Tensor, " N"],
        classes: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layer_decay: float = 1.0,
        shown: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.method, self.classes, self.layer_decay, self.shown = (
            network, method, classes, layer_decay, shown,
        )  # fmt: skip
        self.average = ModelEmaV3(network, decay=method.ema, use_warmup=True) if method.ema else None
        if self.average is not None:
            self.average.requires_grad_(False)  # several processes would wait for its gradients
        self.updates = 0
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("labels", labels.clone(), persistent=False)
        weights = class_weights(labels, classes) if method.balance == "loss" else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.erase = v2.RandomErasing(method.erase, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random")
        self.mix = mixing(method, classes)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``{"images": UInt8["B C S S"], "indices": Int64["B"]}``, places among the training images."""
        images, target = self.varied(batch["images"], self.labels[batch["indices"]])
        return self.objective(self.network(images), images, target), {}

    def varied(
        self, images: Images, labels: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B C S S"], Float[Tensor, "B K"]]:
        """Normalised images after random erasing and mixing, and what share of each class they are."""
        images = (as_floats(images) - self.mean) / self.std
        if self.method.erase:
            images = torch.stack([self.erase(image) for image in images])
        if self.mix is None or len(images) < 2:
            return images, F.one_hot(labels, self.classes).float()
        mixed: tuple[Tensor, Tensor] = self.mix(images, labels)
        return mixed

    def objective(
        self, logits: Float[Tensor, "B K"], images: Float[Tensor, "B C S S"], target: Float[Tensor, "B K"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy with smoothed labels (Szegedy et al. 2016, section 7), in float32."""
        return F.cross_entropy(logits.float(), target, self.class_weights, label_smoothing=self.method.smoothing)

    def stepped(self) -> None:
        """Lets the moving average follow."""
        self.updates += 1
        if self.average is not None:
            self.average.update(self.network, step=self.updates)

    def get_extra_state(self) -> Tensor:
        """The number of updates, which the moving average's warm-up depends on."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the number of updates."""
        self.updates = int(state)

    def enter(self, phase: int) -> Carry:
        """There is one phase only."""
        raise NotImplementedError

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Timm's groups: by block, with ``lr_scale`` of layer decay (Clark et al. 2020); biases, norms and what the
        network itself names do not decay.
        """
        network: Any = self.network
        exempt = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            network, weight_decay, no_weight_decay_list=exempt, layer_decay=self.layer_decay
        )
        return groups

    @property
    def judged(self) -> nn.Module:
        """The network that is measured and handed over: the moving average, where there is one."""
        return self.network if self.average is None else cast(nn.Module, self.average.module)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``val_loss`` and ``accuracy`` (percent) on the images that are shown on the way; nothing, if none is read."""
        logits, labels, _ = self.answers(self.shown or ())
        if not len(labels):
            return {}
        return {
            "val_loss": float(F.cross_entropy(logits, labels)),
            "accuracy": 100 * float((logits.argmax(1) == labels).float().mean()),
        }

    def answers(
        self, loader: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Float[Tensor, "N K"], Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """Logits, labels and places of all images of a loader, as of `answers`."""
        return answers(self.judged, loader, self.mean, self.std, self.classes)


@torch.no_grad()
def answers(
    network: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    mean: Float[Tensor, "1 C 1 1"],
    std: Float[Tensor, "1 C 1 1"],
    classes: int,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "N K"], Int64[Tensor, " L"], Int64[Tensor, " N"]]:
    """What a classifier says of whole images, in eval mode; its modules are as before afterwards.

    Args:
        network: images to logits.
        loader: yields ``{"images", "indices"}``, perhaps with ``"labels"``.
        mean: subtracted from each channel, where the network is.
        std: each channel is divided by it.
        classes: how many the network knows.
        progress: called after each batch.

    Returns:
        Logits in float32, labels (none, where the loader has none) and places, on the CPU.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    logits, labels, places = [torch.zeros(0, classes)], [torch.zeros(0).long()], [torch.zeros(0).long()]
    try:
        for batch in loader:
            images = (as_floats(batch["images"].to(mean.device)) - mean) / std
            logits.append(network(images).float().cpu())
            places.append(batch["indices"].cpu())
            labels += [batch["labels"].cpu()] if "labels" in batch else []
            if progress:
                progress(len(images))
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(logits), torch.cat(labels), torch.cat(places)


def class_weights(labels: Int64[Tensor, " N"], classes: int) -> Float[Tensor, " K"]:
    """Weights that give every class the same part in the loss; 1 on average over the images."""
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (classes * counts.clamp_min(1).float())


def mixing(method: ClassifyConfig, classes: int) -> nn.Module | None:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019); a batch is mixed in one of the ways that are on."""
    ways: list[nn.Module] = []
    if method.mixup:
        ways.append(v2.MixUp(alpha=method.mixup, num_classes=classes))
    if method.cutmix:
        ways.append(v2.CutMix(alpha=method.cutmix, num_classes=classes))
    return v2.RandomChoice(ways) if ways else None
