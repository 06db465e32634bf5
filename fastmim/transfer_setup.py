# SPDX-License-Identifier: Apache-2.0
"""What a run that learns from labels is made of: its options resolved, its network, its task."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastmim.config import ClassifyConfig, DistillConfig, LabelledDataConfig, TransferConfig, update
from fastmim.data.loader import EvalLoader
from fastmim.data.order import BalancedOrder
from fastmim.data.splits import Part, Splits, splits
from fastmim.data.vary import RandAugment
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.run_images import check_squares, eval_loader, with_statistics
from fastmim.seeding import derive
from fastmim.starts import (
    FILES,
    SCRATCH,
    Start,
    build_classifier,
    create_classifier,
    plain_name,
    read_start,
    told,
    transfer_weights,
    with_start_statistics,
)
from fastmim.tasks.classify import Classify
from fastmim.tasks.distill import Distill, Teacher

TransferT = TypeVar("TransferT", bound=TransferConfig)
# Enough to judge by, and quick even on a CPU.
_SHOWN_IMAGES = 2000
_LAYER_DECAY = 0.75
_FEW = 10_000  # training images


@dataclass(frozen=True)
class Parts:
    """A resolved configuration, and what it begins to train."""

    config: TransferConfig
    task: Classify
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
        data.path, seed=data.split_seed, test_share=data.test_share, folds=data.folds, fold=data.fold,
        labels=data.labels, label_seed=data.label_seed, shuffle=data.shuffle_labels,
    )  # fmt: skip


def begin(config: TransferConfig, found: Splits, world: int = 1) -> Parts:
    """Every choice that was left open, made; and the network, from its start.

    Raises:
        UserError: the start, the network and the images do not fit together.
    """
    method = config.method
    if not method.start:
        raise UserError(f"{config.task} needs RUN|MODEL, what to start from; see: fastmim {config.task} --help")
    if config.data.test_share != LabelledDataConfig().test_share and (config.data.folds or "held out" not in found.how):
        reason = "folds say what is held out" if config.data.folds else "DATA has a part of its own to measure on"
        raise UserError(f"test_share = {config.data.test_share} has no effect, because {reason}; leave it out")
    start = read_start(method.start, model=method.model, model_args=method.model_args, heads=method.heads)
    _check_network(method, start)
    config = _with_images(config, start, found)
    augment_of(config)  # refuses words that it does not know
    torch.manual_seed(derive(config.optim.seed, "init"))
    network, args, loaded = build_classifier(
        start, len(found.classes), config.data.resolution, channels=config.data.channels, drop_path=method.drop_path,
        pool=method.pool,
    )  # fmt: skip
    lines = list(start.notes)
    if loaded is not None:
        lines += told(loaded, config.data.resolution)
    config = update(config, {"model": plain_name(start.name), "model_args": args})
    config = _with_course(config, len(found.train), world)
    lines += _check_batch(config, network, world)
    if method.recipe == "default" and len(found.train) < _FEW:
        lines.append(
            f"{len(found.train)} images are few: --recipe mild varies them less, which does better in few epochs"
        )
    return Parts(config, task_of(config, network, found), tuple(lines))


def again(config: TransferConfig, found: Splits) -> Parts:
    """The parts of a resolved configuration, whose weights a checkpoint holds."""
    return Parts(config, task_of(config, _untrained(config, len(found.classes)), found), ())


def _untrained(config: TransferConfig, classes: int) -> nn.Module:
    assert config.method.model is not None
    return create_classifier(config.method.model, classes, config.method.model_args)


def _check_network(method: ClassifyConfig, start: Start) -> None:
    """Refuses what would have no effect, because the weights say it."""
    if method.model is not None and plain_name(method.model) != plain_name(start.name) and start.word != SCRATCH:
        raise UserError(
            f"the weights of {start.word} are of {start.name}, not of {method.model}: leave --model out, or take"
            " another --recipe"
        )
    if method.heads is not None and not start.word.endswith((SCRATCH, *FILES)):
        raise UserError(f"--heads is for files of weights; {start.word} says how many heads it has, so leave it out")


def _check_batch(config: TransferConfig, network: nn.Module, world: int) -> list[str]:
    """What a micro-batch of one image means, where that is what the options come to.

    Raises:
        UserError: the network normalises over the images of a micro-batch, which one image does not allow.
    """
    optim, method = config.optim, config.method
    assert optim.global_batch is not None
    share = optim.global_batch // world
    # A micro-batch divides what a process has of a step, as `fastmim.run_images.phases` cuts it.
    largest = max(size for size in range(1, share + 1) if share % size == 0 and size <= (optim.micro_batch or share))
    if largest > 1:
        return []
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise UserError(
            f"{method.model} normalises over the images of a micro-batch, but with --global-batch {optim.global_batch}"
            f" and --micro-batch {optim.micro_batch or share} there is one image in each; choose a larger one that"
            " divides the batch"
        )
    return ["one image in a micro-batch: mixup and cutmix have none to mix it with"] * bool(
        method.mixup or method.cutmix
    )


def task_of(config: TransferConfig, network: nn.Module, found: Splits) -> Classify:
    """What is trained, on the CPU."""
    data, optim = config.data, config.optim
    assert data.mean is not None and data.std is not None and optim.layer_decay is not None
    labels = torch.tensor(found.train.labels)
    settings: dict[str, Any] = {
        "mean": data.mean, "std": data.std, "layer_decay": optim.layer_decay, "shown": _shown(config, found.shown)
    }  # fmt: skip
    if isinstance(config, DistillConfig):
        teacher = read_teacher(config.method.teacher, found.classes, data)
        return Distill(network, teacher, config.method, labels, len(found.classes), **settings)
    return Classify(network, config.method, labels, len(found.classes), **settings)


def read_teacher(word: str, classes: tuple[str, ...], images: LabelledDataConfig) -> Teacher:
    """The network of a fine-tuned run, with its head.

    Raises:
        UserError: it is no such run, or it tells other classes apart, or saw other channels.
    """
    run = Run(word)
    network, known = trained_classifier(run)
    data, seen = run.transfer.data, images
    if (data.channels, data.values) != (seen.channels, seen.values):
        raise UserError(
            f"the teacher {word} has learnt from images of {data.channels} channels ({data.values}), but these have"
            f" {seen.channels} ({seen.values}); try --channels {data.channels} --values {data.values}"
        )
    if known != classes:
        raise UserError(
            f"the teacher {word} tells {len(known)} classes apart ({', '.join(known[:3])} ...), but the images have"
            f" {len(classes)} ({', '.join(classes[:3])} ...)"
        )
    assert data.mean is not None and data.std is not None
    return Teacher(network, data.resolution, data.mean, data.std)


def trained_classifier(run: Run) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of a fine-tuned run with the weights of its newest checkpoint, and the names of its classes."""
    config = run.transfer
    classes = tuple((run.read("data.json") or {})["classes"])
    network = _untrained(config, len(classes))
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


def _shown(config: TransferConfig, part: Part) -> EvalLoader:
    rows = range(0, len(part), max(1, math.ceil(len(part) / _SHOWN_IMAGES)))
    return eval_loader(config, part.table.take(rows), [part.labels[row] for row in rows])


def _with_images(config: TransferT, start: Start, found: Splits) -> TransferT:
    """Channels, values and statistics: those of the start, where the user does not say otherwise."""
    if (config.data.channels, config.data.values) == (3, "8bit"):
        config = update(config, _kind(config, start))
    check_squares(config, found.train.table, config.data.path)
    config = with_statistics(with_start_statistics(config, start), found.train.table)
    named = config.method.model_args.get("in_chans", config.data.channels)
    if named != config.data.channels:
        raise UserError(f"model_args: in_chans = {named}, but images have {config.data.channels}; use --channels")
    colours = config.data.channels == 3 and config.data.values == "8bit"
    if colours and config.method.rand_augment and config.data.crop_on == "device":
        raise UserError("--crop-on device goes with --rand-augment none: RandAugment works on the CPU")
    return config if colours or not config.method.rand_augment else update(config, {"rand_augment": None})


def _kind(config: TransferConfig, start: Start) -> dict[str, Any]:
    """Channels and values that the start saw; in distillation, those that the teacher saw."""
    if isinstance(config, DistillConfig):
        seen = Run(config.method.teacher).transfer.data
        return {"channels": seen.channels, "values": seen.values}
    return {"channels": start.channels, "values": "raw" if start.raw else "8bit"}


def _with_course(config: TransferT, images: int, world: int) -> TransferT:
    """Global batch, learning rate and layer decay."""
    optim = config.optim
    batch = optim.global_batch or max(16, min(1024, 2 ** round(math.log2(max(images / 32, 1))))) // world * world
    batch = batch or world
    if batch % world:
        raise UserError(f"global_batch {batch} is not a multiple of the {world} processes")
    lr = optim.lr or (optim.lr_per_256 * batch / 256 if optim.lr_per_256 else 2.4e-3 * math.sqrt(batch / 1024))
    decay = optim.layer_decay or (1.0 if config.method.start == SCRATCH else _LAYER_DECAY)
    return update(config, {"global_batch": batch, "lr": lr, "layer_decay": decay})
