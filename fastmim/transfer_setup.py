# SPDX-License-Identifier: Apache-2.0
"""What a run that learns from labels is made of: its options resolved, its network, its task."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastmim.config import DistillConfig, TransferConfig, update
from fastmim.data.loader import EvalLoader
from fastmim.data.order import BalancedOrder
from fastmim.data.splits import Part, Splits, splits
from fastmim.data.vary import RandAugment
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.run_images import plain_pictures, with_statistics
from fastmim.seeding import derive
from fastmim.starts import SCRATCH, Start, build_classifier, create_classifier, read_start, transfer_weights
from fastmim.tasks.classify import Classify
from fastmim.tasks.distill import Distill, Teacher

TransferT = TypeVar("TransferT", bound=TransferConfig)
# Enough to judge by, and quick even on a CPU.
_SHOWN_IMAGES = 2000
_LAYER_DECAY = 0.75


@dataclass(frozen=True)
class Parts:
    """A resolved configuration, and the network that it begins with."""

    config: TransferConfig
    network: nn.Module
    lines: tuple[str, ...]
    """What a user should know of the weights."""


def read_splits(config: TransferConfig) -> Splits:
    """The labelled images of a run.

    Raises:
        UserError: as `fastmim.data.splits.splits`.
    """
    data = config.data
    if not data.path:
        raise UserError(f"{config.task} needs DATA, a folder of class folders; see: fastmim {config.task} --help")
    if data.folds is not None and data.fold is None:
        raise UserError("several folds are several runs: use fastmim.cross_validate, or give --fold")
    return splits(
        data.path, seed=data.label_seed, test_share=data.test_share, folds=data.folds, fold=data.fold,
        labels=data.labels, shuffle=data.shuffle_labels,
    )  # fmt: skip


def begin(config: TransferConfig, found: Splits, world: int = 1) -> Parts:
    """Every choice that was left open, made; and the network, from its start.

    Raises:
        UserError: the start, the network and the images do not fit together.
    """
    method = config.method
    if not method.start:
        raise UserError(f"{config.task} needs RUN|MODEL, what to start from; see: fastmim {config.task} --help")
    start = read_start(method.start, model=method.model, model_args=method.model_args, heads=method.heads)
    config = _with_images(config, start, found)
    torch.manual_seed(derive(config.optim.seed, "init"))
    network, args, loaded = build_classifier(
        start, len(found.classes), config.data.resolution, drop_path=method.drop_path, pool=method.pool
    )
    lines = list(start.notes)
    if loaded is not None:
        lines += [f"{len(loaded.resized)} weights carried to {config.data.resolution} px"] if loaded.resized else []
        lines += [f"fresh besides the head: {_some(loaded.fresh)}"] if loaded.fresh else []
        lines += [f"not used: {_some(loaded.unused)}"] if loaded.unused else []
    architecture = start.name.split(".")[0]
    config = update(config, {"model": architecture, "model_args": args, "heads": None})
    return Parts(_with_course(config, len(found.train), world), network, tuple(lines))


def again(config: TransferConfig, classes: int) -> nn.Module:
    """The network of a resolved configuration, whose weights a checkpoint holds."""
    assert config.method.model is not None
    return create_classifier(config.method.model, classes, config.method.model_args)


def task_of(config: TransferConfig, network: nn.Module, found: Splits) -> Classify:
    """What is trained, on the CPU."""
    data, optim = config.data, config.optim
    assert data.mean is not None and data.std is not None and optim.layer_decay is not None
    labels = torch.tensor(found.train.labels)
    settings: dict[str, Any] = {
        "mean": data.mean, "std": data.std, "layer_decay": optim.layer_decay, "shown": _shown(config, found.shown)
    }  # fmt: skip
    if isinstance(config, DistillConfig):
        teacher = read_teacher(config.method.teacher, found.classes)
        return Distill(network, teacher, config.method, labels, len(found.classes), **settings)
    return Classify(network, config.method, labels, len(found.classes), **settings)


def read_teacher(word: str, classes: tuple[str, ...]) -> Teacher:
    """The network of a fine-tuned run, with its head.

    Raises:
        UserError: it is no such run, or tells other classes apart.
    """
    run = Run(word)
    network, known = trained_classifier(run)
    if known != classes:
        raise UserError(
            f"the teacher {word} tells {len(known)} classes apart ({', '.join(known[:3])} ...), but the images have"
            f" {len(classes)} ({', '.join(classes[:3])} ...)"
        )
    data = run.transfer.data
    assert data.mean is not None and data.std is not None
    return Teacher(network, data.resolution, data.mean, data.std)


def trained_classifier(run: Run) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of a fine-tuned run with the weights of its newest checkpoint, and the names of its classes."""
    config = run.transfer
    classes = tuple((run.read("data.json") or {})["classes"])
    network = again(config, len(classes))
    network.load_state_dict(transfer_weights(run))
    return network.eval(), classes


def augment_of(config: TransferConfig) -> RandAugment | None:
    """What workers do to crops."""
    data, method = config.data, config.method
    assert data.mean is not None
    return RandAugment(method.rand_augment, data.resolution, data.mean) if method.rand_augment else None


def order_of(config: TransferConfig, part: Part) -> BalancedOrder | None:
    """In which order images are drawn, where it is not the usual one."""
    return BalancedOrder(part.labels, config.optim.seed) if config.method.balance == "sampler" else None


def part_loader(config: TransferConfig, part: Part, workers: int = 0) -> EvalLoader:
    """Every image of a part once, whole, with its label."""
    pictures = plain_pictures(config, part.table)
    side = config.data.resolution
    return EvalLoader(pictures, resolution=side, batch_size=64, labels=part.labels, workers=workers)


def _shown(config: TransferConfig, part: Part) -> EvalLoader:
    rows = range(0, len(part), max(1, math.ceil(len(part) / _SHOWN_IMAGES)))
    return part_loader(config, Part(part.table.take(rows), tuple(part.labels[row] for row in rows)))


def _with_images(config: TransferT, start: Start, found: Splits) -> TransferT:
    """Channels, values and statistics: those of the start, where the user does not say otherwise."""
    data = config.data
    words: dict[str, Any] = {}
    if (data.channels, data.values) == (3, "8bit"):
        words = {"channels": start.channels, "values": "raw" if start.raw else "8bit"}
    same = words and start.channels == words["channels"]
    for name, numbers in (("mean", start.mean), ("std", start.std)):
        if same and getattr(data, name) is None:
            words[name] = numbers
    config = with_statistics(update(config, words), found.train.table)
    squares = found.train.table.squares
    if squares is not None and squares.side < config.data.resolution:
        raise UserError(
            f"{config.data.path!r} holds squares of {squares.side} px, too small for --resolution"
            f" {config.data.resolution}; prepare them again, or use --resolution {squares.side}"
        )
    colours = config.data.channels == 3 and config.data.values == "8bit"
    return config if colours or not config.method.rand_augment else update(config, {"rand_augment": None})


def _with_course(config: TransferT, images: int, world: int) -> TransferT:
    """Global batch, learning rate and layer decay."""
    optim = config.optim
    batch = optim.global_batch or max(16, min(1024, 2 ** round(math.log2(max(images / 32, 1))))) // world * world
    if batch % world:
        raise UserError(f"global_batch {batch} is not a multiple of the {world} processes")
    lr = optim.lr or (optim.lr_per_256 * batch / 256 if optim.lr_per_256 else 2.4e-3 * math.sqrt(batch / 1024))
    decay = optim.layer_decay or (1.0 if config.method.start == SCRATCH else _LAYER_DECAY)
    return update(config, {"global_batch": batch, "lr": lr, "layer_decay": decay})


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
