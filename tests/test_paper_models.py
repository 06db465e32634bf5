# SPDX-License-Identifier: Apache-2.0
"""The paper's networks at its sizes: pre-trained at 128 px and fine-tuned at 224, each by a real step on two images."""

import pytest
import torch
from torch import Tensor

import fastmim.backbones.cmt
from fastmim.config import update
from fastmim.data.order import permutation
from fastmim.recipes import finetune, load
from fastmim.run_network import build_network
from fastmim.starts import Start, build_classifier
from fastmim.tasks.classify import Classify
from fastmim.tasks.pretrain import Pretrain, build_mim
from fastmim.tasks.resolve import resolve
from fastmim.train.optim import adamw

MODELS = [name for name in finetune.names() if finetune.load(name).method.model is not None]


def step(task: torch.nn.Module, batch: dict[str, Tensor], lr: float) -> float:
    """One update; every parameter has a gradient and moves."""
    optimiser = adamw(task.param_groups(0.05), lr, (0.9, 0.95))  # type: ignore[operator]
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    loss = task(batch)[0]
    loss.backward()
    learning = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in learning.items() if parameter.grad is None]
    assert idle == []
    before = {name: float(parameter.detach().double().sum()) for name, parameter in learning.items()}
    optimiser.step()
    moved = sum(float(parameter.detach().double().sum()) != before[name] for name, parameter in learning.items())
    assert moved > 0.9 * len(learning)
    return float(loss.detach())


@pytest.mark.parametrize("name", MODELS)
def test_real_steps_of_pretraining_and_of_finetuning(name: str) -> None:
    tuning = finetune.load(name)
    torch.manual_seed(0)
    config = update(
        load("fastmim"), {"model": tuning.method.model, "data": "unused", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    )
    backbone = build_network(config, None)
    task = Pretrain(build_mim(resolve(config, backbone, 1_281_167), backbone), config)
    images = torch.from_numpy(permutation(2 * 3 * 256 * 256, 0, 0) % 256).to(torch.uint8).view(2, 3, 256, 256)
    batch = {"images": images[..., :128, :128].contiguous(), "keys": torch.arange(2)}
    assert 0.01 < step(task, batch, 1e-4) < 1  # of unit histograms
    weights = {key: value.clone() for key, value in backbone.weights().items()}
    start = Start("run", backbone.architecture, {}, weights, 128)
    del task, backbone

    side = tuning.data.resolution
    network, args, loaded = build_classifier(start, 1000, side, drop_path=tuning.method.drop_path)
    assert loaded is not None and len(loaded.fresh) < 30
    assert bool(loaded.resized) == (name.startswith(("vit", "swin", "cmt")))
    if name.startswith("swin"):
        assert args["window_size"][0] == [7, 7]
    tuned = Classify(
        network, tuning.method,
        torch.tensor([3, 999]), 1000, mean=(0.5,) * 3, std=(0.25,) * 3, layer_decay=tuning.optim.layer_decay or 1,
    )  # fmt: skip
    loss = step(tuned, {"images": images[..., :side, :side].contiguous(), "indices": torch.arange(2)}, 1e-4)
    assert 5 < loss < 9  # log(1000) = 6.9


def test_the_eight_networks_are_there() -> None:
    assert len(MODELS) == 8 and fastmim.backbones.cmt
