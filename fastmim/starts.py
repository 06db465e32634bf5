# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: a run, timm, a folder, a released checkpoint, or nowhere; read in one way for all."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from fastmim.backbones.adapter import build
from fastmim.backbones.blueprint import LOCAL, Blueprint, create
from fastmim.backbones.hiding import whole_network
from fastmim.backbones.loading import Loaded, load_weights, strip_sizes
from fastmim.config import Config, ConfigT, MethodConfig, update
from fastmim.errors import UserError
from fastmim.run_folder import Run, as_run
from fastmim.run_images import IMAGENET
from fastmim.run_network import Network, network_args, trained_network, untrained_network
from fastmim.seeding import derive
from fastmim.train.checkpoint import Checkpoints

SCRATCH = "scratch"
FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_LATER = ("global_pool", "window_size", "drop_path_rate")


@dataclass(frozen=True)
class Start:
    """Weights to begin with, and the network that they are for.

    Attributes:
        word: what the user said.
        name: what timm calls the network, perhaps with the tag of its weights.
        model_args: further arguments of ``timm.create_model``; no sizes of images.
        weights: by stock keys, at the size that they were trained at; None for an untrained network.
        resolution: side of the images that they were trained with, in pixels.
        mean: subtracted from each channel (0 to 1, or raw values).
        std: each channel is divided by it.
        raw: whether the network sees stored values, not 0 to 255.
        notes: what a user should know of them, a sentence each.
    """

    word: str
    name: str
    model_args: dict[str, Any]
    weights: Mapping[str, Tensor] | None
    resolution: int | None = None
    mean: tuple[float, ...] = IMAGENET["mean"]
    std: tuple[float, ...] = IMAGENET["std"]
    raw: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)


def read_start(
    word: str | Path | Run,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    heads: int | None = None,
) -> Start:
    """Weights from wherever ``word`` says.

    Args:
        word: a run or its folder, pre-trained or fine-tuned; a timm name, whose released weights are fetched;
            ``local-dir:FOLDER`` (a timm hub folder, such as an export); a checkpoint file of one of the layouts of
            `fastmim.backbones.official`; or ``scratch``.
        model: the network, where ``word`` does not tell: for ``scratch``, and for files that fit several.
        model_args: further arguments of ``timm.create_model``, which win over those of the weights.
        heads: attention heads of a plain ViT, which files of weights leave open.

    Raises:
        UserError: there is nothing of that name, or it does not say which network it is for.
    """
    args = strip_sizes(model_args or {})
    run = as_run(word)
    if run is not None:
        return _from_pretraining(run, args) if run.task == "pretrain" else _from_transfer(run, args)
    text = str(word)
    if text == SCRATCH:
        if model is None:
            raise UserError("start = scratch needs --model, a timm name, such as vit_small_patch16_224")
        args |= {"num_heads": heads} if heads else {}
        if model.startswith(LOCAL):  # only the architecture of the folder
            folder = _from_timm(model, args, pretrained=False)
            return Start(text, folder.name, folder.model_args, None)
        return Start(text, model, args, None)
    if text.endswith(FILES) and not text.startswith(LOCAL):
        return _from_file(text, model, args, heads)
    if text.startswith(LOCAL) or timm.is_model(plain_name(text)):
        return _from_timm(text, args)
    if Path(text).is_dir():
        raise UserError(f"start: {text!r} is no run folder (it has no config.yaml); a timm folder is local-dir:{text}")
    Blueprint(text, args)  # names what is near
    raise AssertionError(text)


def _from_pretraining(run: Run, further: Mapping[str, Any]) -> Start:
    data = run.config.data
    network = trained_network(run, None, data.resolution)
    if not hasattr(network, "architecture"):
        raise UserError(f"{run.path} trained a module of your own, which fastmim cannot build; load its export instead")
    assert data.mean is not None and data.std is not None
    notes = [f"discarded in pre-training, so fresh: {', '.join(network.discarded)}"] if network.discarded else []
    args = {**_chosen_args(network.architecture, network.create_args, data.resolution), **further}
    return Start(
        str(run.path), network.architecture, args, network.weights(), data.resolution, data.mean, data.std,
        data.values == "raw", tuple(notes),
    )  # fmt: skip


def _from_transfer(run: Run, further: Mapping[str, Any]) -> Start:
    config = run.transfer
    data, method = config.data, config.method
    assert data.mean is not None and data.std is not None and method.model is not None
    args = {**_chosen_args(method.model, method.model_args, data.resolution), **further}
    return Start(
        str(run.path), method.model, args, transfer_weights(run), data.resolution, data.mean, data.std,
        data.values == "raw",
    )  # fmt: skip


def transfer_weights(run: Run) -> dict[str, Tensor]:
    """The weights of a fine-tuned run's newest checkpoint by stock keys, with its head; the average, if there is one.

    Raises:
        UserError: there is no checkpoint yet, or none that is whole.
    """
    found, _ = Checkpoints(run.path / "checkpoints").latest()
    if found is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    prefix = "network." if run.transfer.method.ema is None else "average.module."
    tensors = found.tensors["model"].items()
    return {key.removeprefix(prefix): value for key, value in tensors if key.startswith(prefix)}


def _chosen_args(architecture: str, create_args: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """The arguments that somebody chose: windows that fastmim made follow the size of the images again."""
    args = strip_sizes(create_args)
    if "window_size" not in args:
        return args
    free = {name: value for name, value in args.items() if name != "window_size"}
    blueprint = Blueprint(architecture, free)
    derived = blueprint.at(resolution, blueprint.absolute((-1,))).create_args.get("window_size")
    return free if derived == args["window_size"] else args


def _from_timm(word: str, args: dict[str, Any], *, pretrained: bool = True) -> Start:
    # What changes keys or shapes is left to `load_weights`: timm reads weights as they were written.
    read = {key: value for key, value in args.items() if key not in _LATER}
    model = create(word, pretrained=pretrained, **read)
    stock = model.pretrained_cfg
    name = stock["architecture"] if word.startswith(LOCAL) else plain_name(word)
    size = stock.get("input_size", (3, 224, 224))[-1]
    chosen = {key: value for key, value in {**get_model_args(model), **args}.items() if key != "num_classes"}
    return Start(
        word, name, _chosen_args(name, chosen, size), dict(model.state_dict()), size, tuple(stock["mean"]),
        tuple(stock["std"]),
    )  # fmt: skip


def _from_file(path: str, model: str | None, args: dict[str, Any], heads: int | None) -> Start:
    from fastmim.backbones.official import describe, read_official

    found = read_official(path, model, heads)
    return Start(
        path, found.architecture, {**found.model_args, **args}, found.weights, found.resolution,
        notes=tuple(describe(found)),
    )  # fmt: skip


# ---- Networks from a start


def with_start(config: Config) -> Config:
    """A pre-training configuration that begins with weights: their network and statistics, where none are chosen.

    Raises:
        UserError: as `read_start`.
    """
    method = config.method
    if method.init is None:
        return config
    if method.init == SCRATCH:
        raise UserError("init: scratch is no weights; leave --init out")
    if method.pretrained:
        raise UserError("--init and --pretrained both name weights; give one")
    chosen = method.model != MethodConfig().model
    start = read_start(method.init, model=method.model if chosen else None, model_args=method.model_args)
    words: dict[str, Any] = {} if chosen else {"model": start.name, "model_args": start.model_args}
    return with_start_statistics(update(config, words), start)


def with_start_statistics(config: ConfigT, start: Start) -> ConfigT:
    """The start's mean and std, where none are chosen and it saw images of the same kind."""
    data = config.data
    if (data.channels, data.values == "raw") != (start.channels, start.raw):
        return config
    return update(config, {name: getattr(start, name) for name in ("mean", "std") if getattr(data, name) is None})


def fill(backbone: Network, config: Config) -> list[str]:
    """Takes over the weights that ``init`` names; returns what a user should know of them."""
    method = config.method
    assert method.init is not None
    start = read_start(method.init, model=method.model, model_args=method.model_args)
    assert start.weights is not None
    loaded = load_weights(backbone.model, start.weights, start.word)
    return [*start.notes, *told(loaded, backbone.resolution)]


def plain_name(model: str) -> str:
    """A network's name without the tag of its weights."""
    return model if model.startswith(LOCAL) else model.partition(".")[0]


def told(loaded: Loaded, resolution: int) -> list[str]:
    """What became of weights, in sentences; empty where all fitted as they were."""
    lines = [f"{len(loaded.resized)} weights carried to {resolution} px"] if loaded.resized else []
    lines += [f"fresh besides the head: {_some(loaded.fresh)}"] if loaded.fresh else []
    return lines + ([f"not used: {_some(loaded.unused)}"] if loaded.unused else [])


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class Opened:
    """A network with its weights, ready to turn images into maps."""

    backbone: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]
    raw: bool
    channels: int
    resolution: int
    name: str
    untrained: Callable[[], Network]
    """Builds the same network before any training."""


def open_backbone(
    word: str | Path | Run,
    resolution: int | None = None,
    *,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Opened:
    """The network of a start as a backbone for images of ``resolution`` pixels; of those it was trained with, or 128.

    Args:
        word: as of `read_start`; not ``scratch``.
        resolution: side of the images in pixels.
        model: the run's module, where it was not one of timm's.
        seed: of the untrained twin's weights, where it is not the run that knows them.

    Raises:
        UserError: as `read_start`.
    """
    run = as_run(word)
    if run is not None and run.task == "pretrain":
        config = run.config
        side = resolution or config.data.resolution
        mean, std, raw = config.data.mean, config.data.std, config.data.values == "raw"
        assert mean is not None and std is not None
        fresh = functools.partial(untrained_network, config, model, side)
        network = trained_network(run, model, side)
        return Opened(network, mean, std, raw, len(mean), side, config.method.model, fresh)
    start = read_start(word)
    side = resolution or start.resolution or 128
    args = network_args(start.model_args, start.channels)
    native = build(start.name, start.resolution or side, model_args=args)
    if start.weights is not None:
        load_weights(native.model, start.weights, start.word)

    def untrained() -> Network:
        torch.manual_seed(derive(seed, "init"))
        return build(start.name, side, model_args=args)

    return Opened(
        whole_network(native, side), start.mean, start.std, start.raw, start.channels, side, start.name, untrained
    )


def build_classifier(
    start: Start,
    classes: int,
    resolution: int,
    *,
    channels: int | None = None,
    drop_path: float = 0.0,
    pool: str | None = None,
) -> tuple[nn.Module, dict[str, Any], Loaded | None]:
    """A stock timm network with a fresh head for ``classes``, at ``resolution``, filled with the start's weights.

    Args:
        start: the weights.
        classes: outputs of the head.
        resolution: side of the images in pixels.
        channels: of the images; those that the start saw when not given.
        drop_path: the rate of stochastic depth in the last block.
        pool: how a plain ViT's tokens become one vector, "avg" or "token".

    Returns:
        The network; what ``timm.create_model(name, num_classes=classes, ...)`` needs to build it; what became of the
        weights, None for an untrained start.

    Raises:
        UserError: the network cannot take that size, or the weights do not fit.
    """
    args = _with_pool(start, network_args(start.model_args, channels or start.channels), pool)
    blueprint = Blueprint(start.name, args)
    plan = blueprint.at(resolution, blueprint.absolute((-1,)))
    chosen = {**plan.create_args, **({"drop_path_rate": drop_path} if drop_path else {})}
    network = create_classifier(plan.architecture, classes, chosen)
    loaded = None if start.weights is None else load_weights(network, start.weights, start.word)
    return network, chosen, loaded


def create_classifier(architecture: str, classes: int, args: Mapping[str, Any]) -> nn.Module:
    """A stock timm network with a head.

    Raises:
        UserError: it does not take an argument.
    """
    try:
        network: nn.Module = timm.create_model(architecture, num_classes=classes, **args)
    except TypeError as error:
        wrong = next((name for name in args if repr(name) in str(error)), None)
        if wrong is None:
            raise UserError(f"model '{architecture}' cannot be built: {error}") from None
        mend = "set drop_path=0" if wrong == "drop_path_rate" else "leave it out"
        raise UserError(f"{architecture} has no {wrong.removesuffix('_rate')}; {mend}") from None
    return network


def _with_pool(start: Start, args: dict[str, Any], pool: str | None) -> dict[str, Any]:
    """Arguments with the way of pooling: a plain ViT's tokens are averaged, as MAE and FastMIM fine-tune."""
    with torch.device("meta"):
        stock = getattr(create(start.name, **args), "global_pool", None)
    if stock in ("token", "avg") and (pool or stock == "token"):
        return {**args, "global_pool": pool or "avg"}
    if pool not in (None, stock):
        raise UserError(f"pool = {pool!r} is for plain ViTs; {start.name} pools by {stock!r}")
    return args
