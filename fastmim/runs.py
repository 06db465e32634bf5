# SPDX-License-Identifier: Apache-2.0
"""``pretrain``, ``resume``, ``probe`` and ``export``: the commands as Python functions."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmim import recipes
from fastmim.backbones.adapter import build
from fastmim.backbones.hiding import require_backbone
from fastmim.config import Config, update
from fastmim.data.labelled import Labelled, labelled
from fastmim.data.loader import EvalLoader, TrainLoader
from fastmim.data.scan import ImageFiles, first_look, scan
from fastmim.errors import UserError
from fastmim.export import export_state, export_timm, verify
from fastmim.report.page import write_report
from fastmim.run_folder import Run, default_folder, locked, prepare_folder, write_config
from fastmim.seeding import derive
from fastmim.tasks.pretrain import Pretrain, build_mim, resolve
from fastmim.tasks.probe import run_probe
from fastmim.train.batch import find_micro_batch, free_memory
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.device import environment, pick_device, pick_precision, pick_workers
from fastmim.train.distributed import Ranks, barrier, ranks
from fastmim.train.engine import Fit, Plan
from fastmim.train.log import RunLog

# An nn.Module that is a Backbone: Python's types have no word for both at once.
Network = Any


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
    files = _images(config)
    device = pick_device(config.system.device)
    with ranks(device.type) as here:
        if here.world > 1 and config.system.out is None:
            raise UserError("several processes need one run folder: give --out")
        folder = Path(config.system.out) if config.system.out else default_folder(config)
        if here.first:
            prepare_folder(folder, config.system.overwrite)
        barrier()
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
    config = _changed(run.config, changes or {})
    if run.status["state"] == "finished" and (run.path / "report.html").exists() and config == run.config:
        return run
    files = _images(config)
    before = (run.read("data.json") or {}).get("fingerprint", files.fingerprint)
    if before != files.fingerprint and not config.system.allow_data_change:
        where = ", ".join(config.data.paths)
        raise UserError(f"the images under {where} have changed since {run.path} began; --allow-data-change goes on")
    with ranks(pick_device(config.system.device).type) as here:
        return _train(run.path, config, files, model, here)


def plan(config: Config) -> dict[str, Any]:
    """What a run would do, without doing it."""
    files = _images(config)
    torch.manual_seed(derive(config.optim.seed, "init"))
    backbone = _backbone(config, None)
    device = pick_device(config.system.device)
    train, held_out = _split(config, files)
    config = resolve(config, backbone, len(train))
    assert config.optim.global_batch is not None
    return {
        "images": len(train),
        "held out": len(held_out),
        "network": config.method.model,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "stages": [dataclasses.astuple(stage) for stage in backbone.stages],
        "resolution": config.data.resolution,
        "block": config.method.block,
        "target": f"{config.method.target}, cells of {config.method.cell} px",
        "decoder": _decoder(config),
        "steps": _steps(config, len(train)),
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
    backbone = _trained(run, model)
    folder = _export(run, backbone, Path(out) if out else run.exported)
    if not hasattr(backbone, "architecture"):
        return folder, 0.0
    side = run.config.data.resolution
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return folder, verify(folder, backbone, images)


def probe(
    target: str | Path | Run,
    data: str,
    *,
    model: nn.Module | None = None,
    resolution: int | None = None,
    fraction: float = 0.5,
    subsets: int = 3,
    seed: int = 0,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """KNN and linear accuracy of frozen features against the same network untrained, over subsets of the labels.

    Args:
        target: a run, a timm model (its released weights are fetched) or ``local-dir:FOLDER``.
        data: class folders, or train/ and val/ with class folders.
        model: the run's module, where it was not one of timm's.
        resolution: side of the images in pixels; the run's own, or 128.
        fraction: share of the training labels in each subset.
        subsets: how many subsets.
        seed: chooses the subsets.
        device: where to compute; the fastest there is.
        workers: loader processes.

    Returns:
        The content of probe.json (docs/design.md), which is also written into the run's folder, with a new report.
    """
    labels = labelled(data, seed=seed)
    run = target if isinstance(target, Run) else Run(target) if (Path(target) / "config.yaml").is_file() else None
    if run is not None:
        config = run.config
        side = resolution or config.data.resolution
        trained, untrained = _trained(run, model, side), _untrained(config, model, side)
        mean, std, name = config.data.mean, config.data.std, config.method.model
    else:
        side, name = resolution or 128, str(target)
        trained = build(name, side, pretrained=True)
        torch.manual_seed(derive(seed, "init"))
        # A folder's network may differ from timm's of that name; its size is chosen here.
        shape = {word: value for word, value in trained.create_args.items() if word != "img_size"}
        untrained = build(trained.architecture, side, model_args=shape)
        mean, std = trained.model.pretrained_cfg["mean"], trained.model.pretrained_cfg["std"]
    at = pick_device(device)
    result = run_probe(
        trained.to(at), untrained.to(at), labels, resolution=side, mean=mean, std=std, device=at, fraction=fraction,
        subsets=subsets, seed=seed, workers=pick_workers(workers, at), model=name,
    )  # fmt: skip
    result["data"] = str(data)
    if run is not None:
        run.write("probe.json", result)
        write_report(run.path)
    return result


def _train(folder: Path, config: Config, files: ImageFiles, network: nn.Module | None, here: Ranks) -> Run:
    """Everything between a prepared folder and a finished or interrupted run."""
    if here.first:
        with locked(folder):
            return _train_locked(folder, config, files, network, here)
    return _train_locked(folder, config, files, network, here)


def _train_locked(folder: Path, config: Config, files: ImageFiles, network: nn.Module | None, here: Ranks) -> Run:
    device = pick_device(config.system.device, here.local)
    system = config.system
    train, held_out = _split(config, files)
    torch.manual_seed(derive(config.optim.seed, "init"))
    started = bool(Checkpoints(folder / "checkpoints").steps())  # then its weights are there, and need no network
    backbone = _backbone(update(config, {"pretrained": False}) if started else config, network)
    config = resolve(config, backbone, len(train), here.world)
    side, workers = config.data.resolution, pick_workers(system.workers, device)
    apart = EvalLoader(held_out, resolution=side, batch_size=64)
    unseen = apart if next(iter(apart), None) else None  # none held out, or the few that are cannot be read
    labels = labelled(system.eval_data, seed=config.optim.seed) if system.eval_data else None
    task = Pretrain(build_mim(config, backbone), config, unseen, labels).to(device)
    if config.optim.micro_batch is None:
        config = _with_micro_batch(config, task, device, here)
    if system.compile:
        task.compile()
    run = _open(folder, config, files, held_out, device, here)
    assert config.optim.global_batch is not None and config.optim.micro_batch is not None
    loader = TrainLoader(
        train, resolution=side, crop_scale=config.data.crop_scale, flip=config.data.flip, seed=config.optim.seed,
        global_batch=config.optim.global_batch, micro_batch=config.optim.micro_batch, rank=here.rank,
        world_size=here.world, workers=workers, pin_memory=device.type == "cuda", max_bad=config.data.max_bad,
        bad_log=folder / "bad_images.csv" if here.first else None,
    )  # fmt: skip
    steps = _steps(config, len(train))
    course = Plan(
        optim=config.optim,
        steps=steps,
        images=len(train),
        log_every=system.log_every,
        eval_steps=max(1, math.ceil(system.eval_every * steps)) if unseen or labels else 0,
        checkpoint_seconds=60 * system.checkpoint_every,
        autocast=pick_precision(system.precision, device),
    )
    with RunLog(folder, system.tensorboard, quiet=not here.first) as log:
        log.say(f"{folder}: {config.method.model} on {len(train)} images of {side} px, {steps} steps on {device}")
        kept = Checkpoints(folder / "checkpoints", system.keep)
        state = Fit(task, loader, course, kept, log, device, here).run()
        if here.first and state == "finished":
            log.say("exporting the weights and writing the report")
            # Held-out images first: what is shown should be unseen; neighbours want more images than those.
            shown = EvalLoader([*held_out, *train[:64]], resolution=side, batch_size=64)
            gallery = EvalLoader(train[:: max(1, len(train) // 500)], resolution=side, batch_size=64)
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
    _export(run, backbone, run.exported)
    (run.path / "images").mkdir(exist_ok=True)
    (run.path / "images" / "reconstruction.safetensors").write_bytes(task.reconstruction(shown))
    (run.path / "images" / "neighbours.safetensors").write_bytes(task.neighbours(gallery))
    if labels is not None and hasattr(backbone, "architecture"):
        result = run_probe(
            backbone, _untrained(config, None, config.data.resolution).to(device), labels,
            resolution=config.data.resolution, mean=config.data.mean, std=config.data.std, device=device,
            seed=config.optim.seed, model=config.method.model,
        )  # fmt: skip
        run.write("probe.json", {**result, "data": config.system.eval_data})
    write_report(run.path)


def _open(
    folder: Path, config: Config, files: ImageFiles, held_out: list[str], device: torch.device, here: Ranks
) -> Run:
    """Writes what a run folder says of itself before the first step."""
    if here.first:
        write_config(folder, config)
        run = Run(folder)
        run.write("environment.json", environment(device))
        facts = {"images": len(files.files), "bytes": files.bytes, "formats": files.formats, "held_out": len(held_out)}
        run.write("data.json", {"paths": config.data.paths, **facts, "fingerprint": files.fingerprint})
    barrier()
    return Run(folder)


def _backbone(config: Config, network: nn.Module | None) -> Network:
    if network is not None:
        return network
    method = config.method
    return build(method.model, config.data.resolution, model_args=method.model_args, pretrained=method.pretrained)


def _untrained(config: Config, network: nn.Module | None, side: int) -> Network:
    """The network as the run began with it: the same seed, the same start."""
    if network is not None:
        raise UserError("a module of your own has no untrained twin here; probe it before and after training")
    torch.manual_seed(derive(config.optim.seed, "init"))
    return _backbone(update(config, {"resolution": side}), None)


def _trained(run: Run, network: nn.Module | None, side: int | None = None) -> Network:
    """The run's network with the weights of its newest checkpoint, at another image size if asked for."""
    config = run.config
    found, _ = Checkpoints(run.path / "checkpoints").latest()
    if found is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    backbone = _backbone(update(config, {"pretrained": False}), network)
    mim = build_mim(config, backbone)
    mim.load_state_dict({name.removeprefix("mim."): value for name, value in found.tensors["model"].items()})
    if side not in (None, config.data.resolution):
        folder = _export(run, backbone, run.exported)
        return build(f"local-dir:{folder.resolve()}", side, pretrained=True)
    return backbone


def _export(run: Run, backbone: Network, folder: Path) -> Path:
    config, data, status = run.config, run.read("data.json") or {}, run.status
    card = {
        "method": f"{config.method.recipe}: {config.method.target} targets, {config.method.mask_ratio:.0%} hidden",
        "images": f"{data.get('images', '?')} images, resolution {config.data.resolution} px",
        "samples seen": f"{status['samples']} ({status['step']} steps of {config.optim.global_batch})",
        "seed": str(config.optim.seed),
    }
    if not hasattr(backbone, "architecture"):
        return export_state(backbone.weights(), folder, card)
    return export_timm(
        backbone.architecture, backbone.create_args, backbone.weights(), folder,
        resolution=config.data.resolution, mean=config.data.mean, std=config.data.std, card=card,
    )  # fmt: skip


def _decoder(config: Config) -> str:
    method = config.method
    size = f", {method.decoder_dim} channels, depth {method.decoder_depth}" if method.decoder == "transformer" else ""
    return method.decoder + size


def _images(config: Config) -> ImageFiles:
    if not config.data.paths:
        raise UserError("no images given: name a folder, as in 'fastmim pretrain images/'")
    files = scan(config.data.paths)
    first_look(files.files)
    return files


def _split(config: Config, files: ImageFiles) -> tuple[list[str], list[str]]:
    """(training, held-out) images; a pure function of the seed and the files' names."""
    count = min(512, round(config.data.holdout * len(files.files)))
    order = np.random.default_rng(derive(config.optim.seed, "holdout")).permutation(len(files.files))
    unseen = set(order[:count].tolist())
    train = [file for index, file in enumerate(files.files) if index not in unseen]
    return train, [files.files[index] for index in sorted(unseen)]


def _steps(config: Config, images: int) -> int:
    assert config.optim.global_batch is not None
    return max(1, round(config.optim.epochs * images / config.optim.global_batch))


def _with_micro_batch(config: Config, task: Pretrain, device: torch.device, here: Ranks) -> Config:
    assert config.optim.global_batch is not None

    def example(count: int) -> dict[str, Tensor]:
        side = config.data.resolution
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
        return {"images": images, "keys": torch.arange(count, device=device)}

    size = find_micro_batch(task, example, config.optim.global_batch // here.world, device, free_memory(device))
    return update(config, {"micro_batch": size})


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration to resume with: the machine may change and the run may be longer, but not what is learnt."""
    changed = update(config, changes)
    for section in ("data", "method", "optim"):
        for name, value in getattr(config, section):
            if name != "epochs" and getattr(changed, section) != getattr(config, section):
                new = getattr(getattr(changed, section), name)
                if new != value:
                    raise UserError(
                        f"{name} was {value} and cannot become {new} in the middle of a run; start another run"
                    )
    return changed
