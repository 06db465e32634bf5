# SPDX-License-Identifier: Apache-2.0
"""Distillation as a Task: a student learns a teacher's answers to the same varied images."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastmim.config import DistillMethodConfig
from fastmim.tasks.classify import Classify


class Teacher(nn.Module):
    """A trained classifier that answers at its own size and with its own normalisation, without gradient.

    Args:
        network: images to logits.
        resolution: side of the images that it was trained with, in pixels.
        mean: that it expects subtracted.
        std: that it expects divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, resolution: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network, self.resolution = network.eval().requires_grad_(False), resolution
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B K"]:
        """Logits of images with values as they are stored (bytes as 0 to 1)."""
        if images.shape[-1] != self.resolution:
            images = F.interpolate(images, size=self.resolution, mode="bilinear", antialias=True)
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits.float()


class Distill(Classify):
    """VanillaKD (Hao et al. 2023, arXiv 2305.15781): plain logits, strong augmentation, a long schedule.

    The loss is ``alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy``, both answers at temperature T
    (Hinton et al. 2015, section 2), on the same mixed and erased images.

    Args:
        network: the student.
        teacher: the trained network.
        method: as of `Classify`, with ``alpha`` and ``temperature``.
        arguments: the others of `Classify`.
    """

    def __init__(
        self, network: nn.Module, teacher: Teacher, method: DistillMethodConfig, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(network, method, *arguments, **options)
        self.settings = method
        # In a list it is no part of this module: it is neither trained nor saved.
        self._teacher = [teacher]

    def objective(
        self, logits: Float[Tensor, "B K"], images: Float[Tensor, "B C S S"], target: Float[Tensor, "B K"]
    ) -> Float[Tensor, ""]:
        """The distance to the teacher's answer, and to the labels where ``alpha`` leaves them a part."""
        alpha, temperature = self.settings.alpha, self.settings.temperature
        loss = distance(logits, self._teacher[0].to(images.device)(images * self.std + self.mean), temperature)
        if alpha < 1:
            loss = alpha * loss + (1 - alpha) * super().objective(logits, images, target)
        return loss


def distance(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch, in float32."""
    answers = F.log_softmax(student.float() / temperature, 1), F.log_softmax(teacher.float() / temperature, 1)
    return temperature**2 * F.kl_div(*answers, reduction="batchmean", log_target=True)
