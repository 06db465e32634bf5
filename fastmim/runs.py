# SPDX-License-Identifier: Apache-2.0
"""``pretrain``, ``resume``, ``probe`` and ``export``: the commands as Python functions."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastmim import recipes
from fastmim.backbones.hiding import require_backbone, whole_network
from fastmim.config import Config, update
from fastmim.data.labelled import Labelled, labelled
from fastmim.data.loader import EvalLoader
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.export import verify
from fastmim.mim.targets import Target
from fastmim.report.page import write_report
from fastmim.run_folder import Run, as_run, default_folder, locked
from fastmim.run_images import (
    crop_place,
    eval_loader,
    find_images,
    split,
    training_loader,
    training_pictures,
    with_statistics,
)
from fastmim.run_network import (
    Network,
    build_network,
    count_steps,
    export_network,
    trained_network,
    untrained_network,
    with_micro_batch,
)
from fastmim.run_training import new_folder, open_run, train_run
from fastmim.seeding import derive
from fastmim.starts import fill, open_backbone, with_start
from fastmim.tasks.pretrain import Pretrain, build_mim
from fastmim.tasks.probing.run import run_probe
from fastmim.tasks.probing.settings import read_settings
from fastmim.tasks.resolve import resolve
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.device import pick_device, pick_workers
from fastmim.train.distributed import Ranks, ranks
from fastmim.train.log import RunLog


def pretrain(config: Config | None = None, *, model: str | nn.Module | None = None, **words: Any) -> Run:
    """Pre-trains a network on unlabelled images, exports its weights and writes a report.

    ``fastmim.pretrain(data="images/", model="vit_small_patch16_224", out="runs/a", epochs=100)``: the words are the
    command line's.

    Args:
        config: a whole configuration instead of words, or to be changed by them.
        model: a timm name, ``local-dir:FOLDER``, or a module that has the three members of ``fastmim.Backbone``.
        words: options by name; see ``fastmim pretrain --help``.

    Raises:
        UserError: something in the options, the images or the folder does not fit.
    """
    network = model if isinstance(model, nn.Module) else None
    if network is not None:
        require_backbone(network)
        words["model"] = type(network).__name__
    elif model is not None:
        words["model"] = model
    config = update(config or recipes.load(str(words.get("recipe", "fastmim"))), words)
    if network is None:
        config = with_start(config)
    elif config.method.init is not None:
        raise UserError("init: load the weights into your own module before you hand it over")
    files = find_images(config)
    if config.system.overwrite and network is None:
        config = with_statistics(config, files)
        _planned(config, files)  # what would be refused is refused before an earlier run is deleted
    device = pick_device(config.system.device)
    with ranks(device.type) as here:
        folder = new_folder(config.system, functools.partial(default_folder, config), here, config.method.init)
        return _train(folder, config, files, network, here)


def resume(run: str | Path | Run, *, model: nn.Module | None = None, changes: Mapping[str, Any] | None = None) -> Run:
    """Goes on with an interrupted run; a finished one is left as it is.

    Args:
        run: the run or its folder.
        model: the same module as before, where it was not one of timm's.
        changes: options of the machine (``workers``, ``device``) or ``epochs``, by name.

    Raises:
        UserError: the images have changed since the run began, or an option changes what is learnt.
    """
    run = run if isinstance(run, Run) else Run(run)
    if run.task != "pretrain":
        from fastmim.transfer import resume_transfer

        return resume_transfer(run, changes or {})
    config = _changed(run.config, changes or {})
    if run.status["state"] == "finished" and (run.path / "report.html").exists() and config == run.config:
        return run
    files = find_images(config)
    before = (run.read("data.json") or {}).get("fingerprint", files.fingerprint)
    if before != files.fingerprint and not config.system.allow_data_change:
        where = ", ".join(config.data.paths)
        raise UserError(f"the images under {where} have changed since {run.path} began; --allow-data-change goes on")
    with ranks(pick_device(config.system.device).type) as here:
        return _train(run.path, config, files, model, here)


def plan(config: Config) -> dict[str, Any]:
    """What a run would do, without doing it."""
    config = with_start(config)
    return _planned(config, find_images(config))


def _planned(config: Config, files: ImageTable) -> dict[str, Any]:
    torch.manual_seed(derive(config.optim.seed, "init"))
    backbone = build_network(config, None)
    told = fill(backbone, config) if config.method.init is not None else []
    device = pick_device(config.system.device)
    train, held_out = split(config, files)
    config = resolve(with_statistics(config, files), backbone, len(train))
    mim = build_mim(config, backbone)  # whatever would be refused, is refused here too
    assert config.optim.global_batch is not None
    cells = ", ".join(str(cast(Target, target).cell) for target in mim.targets)
    return {
        "images": len(train),
        "held out": len(held_out),
        "network": config.method.model,
        **({"weights": "; ".join(told) or config.method.init} if config.method.init is not None else {}),
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "stages": [dataclasses.astuple(stage) for stage in backbone.stages],
        "resolution": ", ".join(f"{resolution} ({share:.0%})" for resolution, share in config.data.course),
        "block": config.method.block,
        "target": f"{config.method.target}, cells of {cells} px",
        "masking": f"{config.method.masking}, {config.method.mask_ratio:.0%} hidden by {config.method.hide}"
        + (f", {config.method.masks} masks an image" if config.method.masks > 1 else ""),
        "decoder": _decoder(config),
        "steps": count_steps(config, len(train)),
        "global_batch": config.optim.global_batch,
        "lr": config.optim.lr,
        "device": str(device),
        "workers": pick_workers(config.system.workers, device),
        "out": config.system.out or str(default_folder(config)),
    }


def export(run: str | Path | Run, *, model: nn.Module | None = None, out: str | None = None) -> tuple[Path, float]:
    """Writes the weights of the newest checkpoint as a timm folder, loads it again and compares.

    Returns:
        The folder, and the largest difference of the last map between the run's network and the loaded one.
    """
    run = run if isinstance(run, Run) else Run(run)
    if run.task != "pretrain":
        raise UserError(
            f"{run.path} has learnt from labels: its weights are exported when it ends, into {run.exported}; 'fastmim"
            f" resume {run.path}' ends it"
        )
    side = run.config.data.resolution  # a run that was interrupted may be in a phase of another
    backbone = trained_network(run, model, side).eval()
    folder = export_network(run, backbone, Path(out) if out else run.exported)
    if not hasattr(backbone, "architecture"):
        return folder, 0.0
    images = torch.randn(2, run.config.data.channels, side, side, generator=torch.Generator().manual_seed(0))
    return folder, verify(folder, backbone, images, backbone.discard)


def probe(
    target: str | Path | Run,
    data: str,
    *,
    model: nn.Module | None = None,
    resolution: int | None = None,
    methods: str | Sequence[str] = "knn,linear",
    labels: str | float | Sequence[str | float] = "50%",
    repeats: int = 3,
    k: int = 20,
    seed: int = 0,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """How well classes are told apart by frozen features, against the same network untrained, over subsets of labels.

    Args:
        target: a run, a timm model (its released weights are fetched), ``local-dir:FOLDER`` or a checkpoint file.
        data: class folders, or train/ and val/ with class folders.
        model: the run's module, where it was not one of timm's.
        resolution: side of the images in pixels; the run's own, or 128.
        methods: of ``knn``, ``linear``, ``linear-sgd`` and ``attentive`` (fastmim/tasks/probing/methods.py).
        labels: the share of them, or how many of each class, to learn from: ``10%``, 0.1, ``5/class``, or several.
        repeats: other labels so often.
        k: neighbours that vote in kNN.
        seed: chooses the labels.
        device: where to compute; the fastest there is.
        workers: loader processes.

    Returns:
        The content of probe.json (docs/design.md), which is also written into the run's folder, with a new report.
    """
    settings = read_settings(methods, labels, repeats, k, seed)
    images = labelled(data, seed=seed)
    opened, at = open_backbone(target, resolution, model=model, seed=seed), pick_device(device)
    result = run_probe(
        opened.backbone.to(at), opened.untrained().to(at), images, settings, resolution=opened.resolution,
        mean=opened.mean, std=opened.std, device=at, workers=pick_workers(workers, at), raw=opened.raw,
        model=opened.name, show=True,
    )  # fmt: skip
    result = {"data": str(data), **result}
    run = as_run(target)
    if run is not None:
        run.write("probe.json", result)
        write_report(run.path)
    return result


def _train(folder: Path, config: Config, files: ImageTable, network: nn.Module | None, here: Ranks) -> Run:
    """Everything between a prepared folder and a finished or interrupted run."""
    with locked(folder) if here.first else contextlib.nullcontext():
        return _train_locked(folder, config, files, network, here)


def _train_locked(folder: Path, config: Config, files: ImageTable, network: nn.Module | None, here: Ranks) -> Run:
    device = pick_device(config.system.device, here.local)
    system = config.system
    train, held_out = split(config, files)
    pictures = training_pictures(config, files.take(train), folder, here)
    config = update(with_statistics(config, files), {"crop_on": crop_place(config, pictures, device)})
    torch.manual_seed(derive(config.optim.seed, "init"))
    started = bool(Checkpoints(folder / "checkpoints").steps())  # then its weights are there, and need no network
    backbone = build_network(update(config, {"pretrained": False}) if started else config, network)
    lines = fill(backbone, config) if config.method.init is not None and not started else []
    config = resolve(config, backbone, len(train), here.world)
    apart = eval_loader(config, files.take(held_out))
    unseen = apart if next(iter(apart), None) else None  # none held out, or the few that are cannot be read
    labels = labelled(system.eval_data, seed=config.optim.seed) if system.eval_data else None
    task = Pretrain(build_mim(config, backbone), config, unseen, labels).to(device)
    if config.optim.micro_batch is None:
        config = with_micro_batch(config, task, device, here)
    if system.compile:
        task.compile()
    run = open_run(folder, config, _facts(config, files, held_out), device, here)
    steps = count_steps(config, len(train))
    bad_log = folder / "bad_images.csv" if here.first else None
    loader = training_loader(config, pictures, steps, device, here, bad_log)
    with RunLog(folder, system.tensorboard, quiet=not here.first) as log:
        sizes = ", then ".join(f"{resolution} px" for resolution, _ in config.data.course)
        what = f"{config.method.model} on {len(train)} images of {sizes}"
        for line in [*lines, f"{folder}: {what}, {steps} steps on {device}"]:
            log.say(line)
        state = train_run(
            run, config, task, loader, pictures, steps=steps, looks=bool(unseen or labels), device=device, here=here,
            log=log,
        )  # fmt: skip
        if here.first and state == "finished":
            log.say("exporting the weights and writing the report")
            # Held-out images first: what is shown should be unseen; neighbours want more images than those.
            shown = eval_loader(config, files.take([*held_out, *train[:64]]))
            gallery = eval_loader(config, files.take(train[:: max(1, len(train) // 500)]))
            _finish(run, task, backbone, shown, gallery, labels, device)
    return run


def _finish(
    run: Run,
    task: Pretrain,
    backbone: Network,
    shown: EvalLoader,
    gallery: EvalLoader,
    labels: Labelled | None,
    device: torch.device,
) -> None:
    config = run.config
    assert config.data.mean is not None and config.data.std is not None
    export_network(run, backbone, run.exported)
    (run.path / "images").mkdir(exist_ok=True)
    (run.path / "images" / "reconstruction.safetensors").write_bytes(task.reconstruction(shown))
    (run.path / "images" / "neighbours.safetensors").write_bytes(task.neighbours(gallery))
    if labels is not None and hasattr(backbone, "architecture"):
        result = run_probe(
            whole_network(backbone, config.data.resolution),
            untrained_network(config, None, config.data.resolution).to(device), labels,
            read_settings(seed=config.optim.seed), resolution=config.data.resolution, mean=config.data.mean,
            std=config.data.std, device=device, raw=config.data.values == "raw", model=config.method.model,
        )  # fmt: skip
        run.write("probe.json", {"data": config.system.eval_data, **result})
    write_report(run.path)


def _facts(config: Config, files: ImageTable, held_out: list[int]) -> dict[str, Any]:
    """What data.json holds."""
    facts = {"images": len(files), "bytes": files.bytes, "formats": files.formats, "held_out": len(held_out)}
    return {"paths": config.data.paths, **facts, "fingerprint": files.fingerprint}


def _decoder(config: Config) -> str:
    method = config.method
    size = f", {method.decoder_dim} channels, depth {method.decoder_depth}" if method.decoder != "linear" else ""
    return method.decoder + size


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration to resume with: the machine may change and the run may be longer, but not what is learnt."""
    changed = update(config, changes)
    for section in ("data", "method", "optim"):
        for name, value in getattr(config, section):
            if name not in ("epochs", "max_bad") and getattr(changed, section) != getattr(config, section):
                new = getattr(getattr(changed, section), name)
                if new != value:
                    raise UserError(
                        f"{name} was {value} and cannot become {new} in the middle of a run; start another run"
                    )
    return changed
