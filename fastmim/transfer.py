# SPDX-License-Identifier: Apache-2.0
"""``finetune`` and ``distill``: from labelled images and a start to a classifier that is measured and handed over."""

import contextlib
import functools
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastmim.config import DistillConfig, FinetuneConfig, TransferConfig, update
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.data.sources.scan import first_look
from fastmim.data.splits import Splits
from fastmim.errors import UserError
from fastmim.export import export_timm
from fastmim.outcome import measure, worst_table, write_outcome
from fastmim.recipes import finetune as recipes
from fastmim.report.page import write_report
from fastmim.run_folder import Run, holds_run, locked, named_folder
from fastmim.run_images import crop_place, eval_loader, plain_pictures, training_loader, training_pictures
from fastmim.run_network import count_steps, with_micro_batch
from fastmim.run_training import new_folder, open_run, train_run
from fastmim.starts import plain_name
from fastmim.tasks.classify import Classify
from fastmim.tasks.pretrain import viewable
from fastmim.train.checkpoint import Checkpoints, write_file
from fastmim.train.device import pick_device, pick_workers
from fastmim.train.distributed import Ranks, ranks
from fastmim.train.log import RunLog
from fastmim.transfer_setup import Parts, again, augment_of, begin, order_of, read_splits

# Side of the pictures of mistakes in the report, in pixels.
_THUMB = 96
# Options that a run resolves, where they are not given.
_OPEN = ("model", "mean", "std", "crop_on", "global_batch", "micro_batch", "lr", "layer_decay")


def finetune(
    data: str | Path | None = None, start: str | Path | Run | None = None, config: FinetuneConfig | None = None,
    **words: Any,
) -> Run:  # fmt: skip
    """Fine-tunes a network on labelled images, measures it on others, exports it and writes a report.

    ``fastmim.finetune("labelled/", "runs/swin", out="runs/tuned", resolution=224)``: the words are the command line's.

    Args:
        data: class folders, train/ and val/ or test/ with class folders, or a .csv with the columns path and label.
        start: a run, a timm name, ``local-dir:FOLDER``, a checkpoint file, or ``scratch`` (with ``model=``).
        config: a whole configuration instead of words, or to be changed by them.
        words: options by name; see ``fastmim finetune --help``.

    Raises:
        UserError: something in the options, the images or the weights does not fit.
    """
    config = config or recipes.load(str(words.get("recipe", FinetuneConfig().method.recipe)))
    return begin_run(update(config, {**_given(data=data, start=start), **words}))


def distill(
    data: str | Path | None = None, teacher: str | Path | Run | None = None, config: DistillConfig | None = None,
    **words: Any,
) -> Run:  # fmt: skip
    """Teaches a small network what a fine-tuned run has learnt; all else is as in `finetune`.

    ``fastmim.distill("labelled/", "runs/tuned", model="mobilenetv3_small_100", out="runs/small")``
    """
    config = config or recipes.load_distill(str(words.get("recipe", DistillConfig().method.recipe)))
    return begin_run(update(config, {**_given(data=data, teacher=teacher), **words}))


def cross_validate(
    data: str | Path | None = None, start: str | Path | Run | None = None, config: FinetuneConfig | None = None,
    **words: Any,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """One run for each of ``folds``, in OUT/fold-0 and so on; every image is tested once. Words as of `finetune`.

    Returns:
        The folder, and what ``folds.json`` in it holds: accuracies of the folds, their mean and spread, and the
        accuracy over all images.

    Raises:
        UserError: as `finetune`.
    """
    config = config or recipes.load(str(words.get("recipe", FinetuneConfig().method.recipe)))
    config = update(config, {**_given(data=data, start=start), **words})
    folds = config.data.folds
    if folds is None:
        raise UserError("several folds need their number: folds=5")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--folds makes one run after another in one process; with torchrun, give --fold too")
    model = config.method.model or Path(config.method.start).name
    folder = Path(config.system.out) if config.system.out else named_folder("folds", model, config.data.path)
    if holds_run(folder):
        raise UserError(f"{folder} holds another run; give another --out for the folds")
    runs = []
    for fold in range(folds):
        out = folder / f"fold-{fold}"
        one = update(config, {"fold": fold, "out": str(out)})
        if holds_run(out) and not config.system.overwrite:
            _check_same(one, Run(out))
            runs.append(resume_transfer(Run(out), {}))
        else:
            runs.append(begin_run(one))
        if runs[-1].status["state"] != "finished":
            return folder, {}
    results = [run.read("finetune.json") or {} for run in runs]
    accuracies = [result["accuracy"]["top1"] for result in results]
    right = sum(result["accuracy"]["top1"] * result["test"] for result in results)
    summary = {
        "folds": accuracies,
        "mean": statistics.fmean(accuracies),
        "spread": statistics.stdev(accuracies),
        "pooled": right / sum(result["test"] for result in results),
    }
    (folder / "folds.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return folder, summary


def _check_same(config: FinetuneConfig, run: Run) -> None:
    """Refuses a fold that was made with other options.

    Raises:
        UserError: it was.
    """
    before = run.transfer
    changed = [
        name
        for section in ("data", "method", "optim")
        for name, value in getattr(config, section)
        if value != (known := getattr(getattr(before, section), name)) and not (name in _OPEN and value in (None, {}))
        # What the images or the start decide, and a tag of released weights, which only the start keeps.
        and not (name in ("channels", "values") and value in (3, "8bit")) and not (name == "rand_augment" and not known)
        and not (name == "model" and plain_name(value) == known) and name != "model_args"
    ]  # fmt: skip
    if changed:
        raise UserError(f"{run.path} was made with other {', '.join(changed)}; give another --out, or --overwrite")


def resume_transfer(run: Run, changes: Mapping[str, Any]) -> Run:
    """Goes on with an interrupted run; a finished one is left as it is.

    Raises:
        UserError: the images have changed since the run began, or an option changes what is learnt.
    """
    before = run.transfer
    config = update(before, changes)
    for section in ("data", "method", "optim"):
        if getattr(config, section) != getattr(before, section):
            raise UserError(f"{', '.join(changes)}: what is learnt cannot change in the middle of a run; start another")
    if run.status["state"] == "finished" and (run.path / "report.html").exists():
        return run
    found = read_splits(config)
    known = (run.read("data.json") or {}).get("fingerprint", found.fingerprint)
    if known != found.fingerprint and not config.system.allow_data_change:
        raise UserError(
            f"the images or labels of {config.data.path} have changed since {run.path} began; --allow-data-change goes"
            " on"
        )
    with ranks(pick_device(config.system.device).type) as here:
        # Killed before the first checkpoint, it begins anew; afterwards its weights are there, whatever became of the
        # start.
        begun = Checkpoints(run.path / "checkpoints").steps()
        parts = again(config, found) if begun else replace(begin(before, found, here.world), config=config)
        return _train(run.path, parts, found, here)


def plan_transfer(config: TransferConfig) -> dict[str, Any]:
    """What a run would do, without doing it."""
    found = read_splits(config)
    parts = begin(config, found)
    config, device = parts.config, pick_device(config.system.device)
    classes = ", ".join(name if name.isprintable() else repr(name) for name in found.classes[:6])
    classes += " ..." if len(found.classes) > 6 else ""
    return {
        "images": f"{len(found.train)} to learn from, {len(found.test)} for the result ({found.how})",
        "classes": f"{len(found.classes)}: {classes}",
        "network": config.method.model,
        "parameters": sum(parameter.numel() for parameter in parts.task.network.parameters()),
        "weights": "; ".join(parts.lines) or config.method.start,
        "resolution": config.data.resolution,
        "steps": steps_of(config, len(found.train)),
        "global_batch": config.optim.global_batch,
        "lr": config.optim.lr,
        "layer_decay": config.optim.layer_decay,
        "device": str(device),
        "out": config.system.out or str(_folder(config)),
    }


def steps_of(config: TransferConfig, images: int) -> int:
    """Weight updates of a run."""
    return config.optim.steps or count_steps(config, images)


def _given(**values: str | Path | Run | None) -> dict[str, str]:
    return {
        name: str(value.path if isinstance(value, Run) else value)
        for name, value in values.items()
        if value is not None
    }


def _folder(config: TransferConfig) -> Path:
    start = Path(config.method.start.removeprefix("local-dir:")).name
    return named_folder(config.task, config.method.model or start, config.data.path)


def begin_run(config: TransferConfig) -> Run:
    """A run of either kind; what can be wrong with options and images is found before its folder is made."""
    found = read_splits(config)
    with ranks(pick_device(config.system.device).type) as here:
        parts = begin(config, found, here.world)
        for part in (found.train, found.test):
            first_look(part.table, parts.config.data.channels, parts.config.data.values == "raw")
        teacher = config.method.teacher if isinstance(config, DistillConfig) else None
        folder = new_folder(config.system, functools.partial(_folder, config), here, config.method.start, teacher)
        return _train(folder, parts, found, here)


def _train(folder: Path, parts: Parts, found: Splits, here: Ranks) -> Run:
    """Everything between a prepared folder and a finished or interrupted run."""
    with locked(folder) if here.first else contextlib.nullcontext():
        return _train_locked(folder, parts, found, here)


def _train_locked(folder: Path, parts: Parts, found: Splits, here: Ranks) -> Run:
    config, device = parts.config, pick_device(parts.config.system.device, here.local)
    pictures = training_pictures(config, found.train.table, folder, here)
    # RandAugment is done by workers, and wants crops on the CPU.
    config = update(config, {"crop_on": "cpu" if config.method.rand_augment else crop_place(config, pictures, device)})
    task = parts.task.to(device)
    if config.optim.micro_batch is None:
        config = with_micro_batch(config, task, device, here)
    if config.system.compile:
        task.compile()
    run = open_run(folder, config, _facts(config, found), device, here)
    with RunLog(folder, config.system.tensorboard, quiet=not here.first, title=config.task) as log:
        for line in parts.lines:
            log.say(line)
        state = _fit(run, config, task, pictures, found, device, here, log)
        if here.first and state == "finished":
            log.say("measuring, exporting the weights and writing the report")
            try:
                _finish(run, config, task, found, device)
            except KeyboardInterrupt:
                log.say(f"the weights are kept; 'fastmim resume {folder}' measures them")
                raise
    return run


def _fit(
    run: Run, config: TransferConfig, task: Classify, pictures: Pictures, found: Splits, device: torch.device,
    here: Ranks, log: RunLog,
) -> str:  # fmt: skip
    steps = steps_of(config, len(found.train))
    bad_log = run.path / "bad_images.csv" if here.first else None
    loader = training_loader(
        config, pictures, steps, device, here, bad_log, augment_of(config), order_of(config, found.train)
    )
    what = (
        f"{config.method.model} from {config.method.start}, {len(found.train)} images of {len(found.classes)} classes"
    )
    log.say(f"{run.path}: {what} at {config.data.resolution} px, {steps} steps on {device}")
    return train_run(run, config, task, loader, pictures, steps=steps, looks=True, device=device, here=here, log=log)


def _finish(run: Run, config: TransferConfig, task: Classify, found: Splits, device: torch.device) -> None:
    """The result on the images that were kept for it, the weights, the report."""
    workers = pick_workers(config.system.workers, device)
    loader = eval_loader(config, found.test.table, found.test.labels, workers)
    logits, labels, places = task.answers(loader)
    if not len(labels):
        raise UserError(
            f"none of the {len(found.test)} test images can be read any more; the weights are kept, and 'fastmim resume"
            f" {run.path}' measures them"
        )
    outcome = measure(logits, labels, places, found)
    status, data = run.status, config.data
    facts = {
        "data": data.path, "start": config.method.start, "model": config.method.model, "resolution": data.resolution,
        "train": len(found.train), "split": found.how, "steps": status["step"], "labels": data.labels,
        "unreadable": len(loader.bad),
        "seconds": next((line["seconds"] for line in reversed(run.metrics) if line["kind"] == "train"), 0.0),
    }  # fmt: skip
    write_outcome(run, outcome, facts, found)
    assert config.method.model is not None and data.mean is not None and data.std is not None
    card = {
        "method": f"{config.task} from {config.method.start}",
        "images": f"{len(found.train)} of {len(found.classes)} classes, resolution {data.resolution} px",
        "accuracy": f"{outcome.facts['accuracy']['top1']:.1f} % on {outcome.facts['test']} others",
        "seed": str(config.optim.seed),
    }
    export_timm(
        config.method.model, config.method.model_args, task.judged.state_dict(), run.exported,
        resolution=data.resolution, mean=data.mean, std=data.std, card=card, classes=found.classes,
    )  # fmt: skip
    _show_mistakes(run, config, found)
    write_report(run.path)


def _show_mistakes(run: Run, config: TransferConfig, found: Splits) -> None:
    """images/mistakes.safetensors: the worst mistakes as pictures, in the order in which finetune.json names them."""
    mistakes = (run.read("finetune.json") or {})["mistakes"]
    if not mistakes:
        return
    table = worst_table(found, mistakes)
    (run.path / "images").mkdir(exist_ok=True)
    thumbs = torch.zeros(len(table), 3, _THUMB, _THUMB, dtype=torch.uint8)
    for batch in EvalLoader(plain_pictures(config, table), resolution=_THUMB, batch_size=len(table)):
        thumbs[batch["indices"]] = viewable(batch["images"], config)
    write_file(run.path / "images" / "mistakes.safetensors", save({"thumbs": thumbs}))


def _facts(config: TransferConfig, found: Splits) -> dict[str, Any]:
    """What data.json holds."""
    counts = {name: [part.labels.count(label) for label in range(len(found.classes))]
              for name, part in (("train", found.train), ("test", found.test))}  # fmt: skip
    return {
        "paths": [config.data.path], "images": len(found.train), "bytes": found.train.table.bytes,
        "formats": found.train.table.formats, "classes": found.classes, "split": found.how, "counts": counts,
        "shown": "test" if found.shown is found.test else "val", "fingerprint": found.fingerprint,
    }  # fmt: skip
