# SPDX-License-Identifier: Apache-2.0
"""A probe from images to probe.json: features of each network in turn, and what the methods make of them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bars
from torch import nn

from fastmim.data.labelled import Labelled
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.tasks.features import Progress, TokenBank, features, pixel_features
from fastmim.tasks.probing.compare import compare, verdict
from fastmim.tasks.probing.methods import METHODS, Features
from fastmim.tasks.probing.settings import Settings


def run_probe(
    trained: nn.Module | None,
    untrained: nn.Module,
    data: Labelled,
    settings: Settings | None = None,
    *,
    resolution: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    raw: bool = False,
    model: str = "",
    show: bool = False,
) -> dict[str, Any]:
    """Everything that probe.json holds, but where the images lie.

    Args:
        trained: the Backbone after pre-training; None: only what is there is measured.
        untrained: the same Backbone before pre-training.
        data: labelled images, already split into a training and a validation part.
        settings: methods, labels and repeats; kNN and linear on half of the labels, three times, when not given.
        resolution: side in pixels at which the images are seen.
        mean: of each channel, as in pre-training.
        std: likewise.
        device: where to compute features and to train attentive probes; both networks are moved there.
        batch_size: images per forward pass.
        workers: loader processes.
        raw: images are stored values, not 0 to 255.
        model: the name that the report shows.
        show: show the progress on a terminal.
    """
    settings = settings or Settings()
    sizes = {"resolution": resolution, "batch_size": batch_size, "workers": workers}
    parts = [
        EvalLoader(Pictures(table, len(mean), raw), labels=labels, **sizes)
        for table, labels in ((data.train, data.train_labels), (data.val, data.val_labels))
    ]
    pairs = (("trained", trained), ("untrained", untrained))
    named = {name: network.to(device) for name, network in pairs if network is not None}
    with Bars(console=Console(stderr=True), transient=True, disable=not (show and sys.stderr.isatty())) as bar:
        seen = bar.add_task("computing features", total=(len(named) + 1) * (len(data.train) + len(data.val)))
        measured = bar.add_task("measuring", total=_measurements(settings, len(named)))

        def count(images: int) -> None:
            bar.advance(seen, images)

        tokens = any(METHODS[method].reads_tokens for method in settings.methods)
        of = partial(_features, device=device, mean=mean, std=std, tokens=tokens, progress=count)
        done = partial(bar.advance, measured)
        comparison = compare(_entries(named, parts, of, count), settings, device=device, done=done)
    counts = {"train": len(data.train) - len(parts[0].bad), "val": len(data.val) - len(parts[1].bad)}
    facts = {"model": model, "classes": len(data.classes), **counts, "resolution": resolution}
    return {**facts, **comparison, "verdict": verdict(comparison)}


def _entries(
    networks: Mapping[str, nn.Module], parts: Sequence[EvalLoader], of: Callable[..., Features], progress: Progress
) -> Iterator[tuple[str, Features, Features]]:
    """Features of the training and the validation images, one network after the other: their tokens are large."""
    for name, network in networks.items():
        yield name, of(network, parts[0]), of(network, parts[1])
    yield "pixels", _pixels(parts[0], progress), _pixels(parts[1], progress)


def _measurements(settings: Settings, networks: int) -> int:
    """How many numbers there will be: raw pixels have no tokens."""
    each = sum(networks + (not METHODS[method].reads_tokens) for method in settings.methods)
    return each * settings.repeats * len(settings.labels)


def _features(
    network: nn.Module,
    loader: EvalLoader,
    *,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tokens: bool,
    progress: Progress | None = None,
) -> Features:
    bank = TokenBank(len(loader.pictures.table)) if tokens else None
    keep = bank.add if bank else None
    vectors, labels = features(network, loader, device, mean, std, keep=keep, progress=progress)
    assert labels is not None
    return Features(vectors, labels, bank.tokens if bank else None)


def _pixels(loader: EvalLoader, progress: Progress) -> Features:
    vectors, labels = pixel_features(loader, progress=progress)
    assert labels is not None
    return Features(vectors, labels)
