# SPDX-License-Identifier: Apache-2.0
"""``fastmim predict``: what a fine-tuned run says of images without labels, as a table."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from fastmim.data.sources.scan import scan
from fastmim.errors import UserError
from fastmim.outcome import predictions_csv
from fastmim.run_folder import Run
from fastmim.run_images import eval_loader
from fastmim.tasks.classify import answers
from fastmim.train.checkpoint import write_file
from fastmim.train.device import pick_device, pick_workers
from fastmim.transfer_setup import trained_classifier


@dataclass(frozen=True)
class Predictions:
    """What `predict` wrote."""

    path: Path
    """CSV: path, predicted, and the probability ``p:CLASS`` of every class."""
    images: int
    classes: tuple[str, ...]
    counts: dict[str, int]
    """How often each class was named."""
    bad: dict[str, str]
    """Path and reason of each image that cannot be read; these have no row."""


def predict(
    run: str | Path | Run,
    images: str | Sequence[str],
    out: str | Path = "predictions.csv",
    *,
    device: str | None = None,
    workers: int | None = None,
) -> Predictions:
    """Classifies images with a fine-tuned run: the largest centred square of each, at the run's resolution.

    Args:
        run: the fine-tuned (or distilled) run or its folder.
        images: folders, files, lists, archives or URLs.
        out: the table, a .csv file; replaced if it is there.
        device: where to compute; the fastest there is.
        workers: loader processes.

    Raises:
        UserError: the run is of another kind or has no checkpoint, there are no images, or ``out`` cannot be written.
    """
    run, path = run if isinstance(run, Run) else Run(run), Path(out).absolute()
    config = run.transfer
    if path.suffix.lower() != ".csv" or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{str(out)!r} cannot be written; name a .csv file in a folder that is there")
    network, classes = trained_classifier(run)
    table, at = scan([images] if isinstance(images, str) else list(images)), pick_device(device)
    network, data = network.to(at), config.data
    assert data.mean is not None and data.std is not None
    mean, std = (torch.tensor(numbers, device=at).view(1, -1, 1, 1) for numbers in (data.mean, data.std))
    loader = eval_loader(config, table, workers=pick_workers(workers, at))
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("classifying", total=len(table))
        logits, _, found = answers(network, loader, mean, std, len(classes), lambda count: bar.advance(line, count))
    if not len(logits):
        first = next(iter(loader.bad.items()))
        raise UserError(f"none of the images can be read; first {first[0]!r}: {first[1]}")
    probabilities, places = logits.softmax(1), found.tolist()
    try:
        write_file(path, predictions_csv([table.path(place) for place in places], probabilities, classes))
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written: {error.strerror}") from None
    named = torch.bincount(probabilities.argmax(1), minlength=len(classes)).tolist()
    counts = dict(zip(classes, named, strict=True))
    return Predictions(path, len(places), classes, counts, loader.bad)
