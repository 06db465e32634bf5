# SPDX-License-Identifier: Apache-2.0
"""What every run does, whatever it learns: makes its folder, writes what it is, and trains in it."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmim.config import RunConfig, SystemConfig
from fastmim.data.loader import TrainLoader
from fastmim.data.pictures import Pictures
from fastmim.data.workers import lost_workers
from fastmim.errors import UserError
from fastmim.run_folder import Run, prepare_folder, write_config
from fastmim.run_images import waiting_remedy
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.device import environment, pick_precision
from fastmim.train.distributed import Ranks, barrier
from fastmim.train.engine import Fit, Plan
from fastmim.train.log import RunLog


def new_folder(system: SystemConfig, default: Callable[[], Path], here: Ranks, *needed: str | None) -> Path:
    """The folder of a new run, made by the first rank.

    Args:
        system: says which.
        default: says which otherwise.
        here: this rank.
        needed: as of `fastmim.run_folder.prepare_folder`.

    Raises:
        UserError: it cannot be used, or several processes have none in common.
    """
    if here.world > 1 and system.out is None:
        raise UserError("several processes need one run folder: give --out")
    folder = Path(system.out) if system.out else default()
    if here.first:
        prepare_folder(folder, system.overwrite, *needed)
    barrier()
    return folder


def open_run(folder: Path, config: RunConfig, facts: Mapping[str, Any], device: torch.device, here: Ranks) -> Run:
    """Writes what a run folder says of itself before the first step; ``facts`` of the images go to data.json."""
    if here.first:
        write_config(folder, config)
        run = Run(folder)
        run.write("environment.json", environment(device))
        run.write("data.json", facts)
    barrier()
    return Run(folder)


def train_run(
    run: Run,
    config: RunConfig,
    task: nn.Module,
    loader: TrainLoader,
    pictures: Pictures,
    *,
    steps: int,
    looks: bool,
    device: torch.device,
    here: Ranks,
    log: RunLog,
) -> str:
    """Makes the steps that are left of a resolved configuration; "finished" or "interrupted".

    Args:
        run: its folder.
        config: resolved.
        task: on ``device``.
        loader: gives its batches, of ``pictures``.
        pictures: as many as the training images.
        steps: weight updates of the whole run.
        looks: whether the task has something to evaluate on the way.
        device: where the task is.
        here: this rank.
        log: for whoever watches.

    Raises:
        UserError: the loss is not finite, too many images are bad, or a loader worker was lost.
    """
    system = config.system
    course = Plan(
        optim=config.optim,
        steps=steps,
        phases=loader.phases,
        images=len(pictures.table),
        log_every=system.log_every,
        eval_steps=max(1, math.ceil(system.eval_every * steps)) if looks else 0,
        checkpoint_seconds=60 * system.checkpoint_every,
        autocast=pick_precision(system.precision, device),
        remedy=functools.partial(waiting_remedy, config, pictures, loader.workers, device),
    )
    kept = Checkpoints(run.path / "checkpoints", system.keep)
    with lost_workers(f"'fastmim resume {run.path}'"):
        return Fit(task, loader, course, kept, log, device, here).run()
