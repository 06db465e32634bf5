# SPDX-License-Identifier: Apache-2.0
"""``fastmim select``: from a short run to the list of the images that are worth a long one."""

import csv
import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastmim.backbones.hiding import whole_network
from fastmim.config import Config
from fastmim.contact_sheet import stacked, thumbnails, tiled
from fastmim.data.loader import EvalLoader
from fastmim.data.table import WHOLE, ImageTable
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.run_images import find_images, plain_pictures, split
from fastmim.run_network import bare_network, trained_model
from fastmim.tasks.selection import Selector
from fastmim.train.checkpoint import write_file
from fastmim.train.device import pick_device, pick_workers

_LEARN_FROM = 2000
_BATCH = 64
_SHOWN, _TILE = 24, 96


@dataclass(frozen=True)
class Choice:
    """What `select` chose, and how."""

    path: Path
    """CSV with the columns path and score, highest first: ``fastmim.pretrain(data=path)`` reads it."""
    picture: Path
    """The images of the highest and of the lowest scores."""
    kept: int
    images: int
    """All that have a score."""
    scores: Float64[Tensor, " images"]
    """Of all images, highest first."""
    r2: float
    """How much of the blocks' losses the predictor explains on images that it has not seen, 1 at best."""
    bad: dict[str, str]
    """Path and reason of each image that cannot be read."""


def select(
    run: str | Path | Run,
    keep: float = 0.37,
    out: str | Path = "kept.csv",
    *,
    model: nn.Module | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Choice:
    """Scores a run's training images by its newest checkpoint and lists the best, after PASS (AAAI 2024).

    How they are scored: `fastmim.tasks.selection`. A picture of both ends is written beside the list.

    Args:
        run: the run or its folder, finished or not; a short one is enough.
        keep: share of the images to keep, above 0; 1 lists all of them with their scores.
        out: the list, a .csv file; replaced if it is there.
        model: the run's module, where it was not one of timm's.
        device: where to compute; the fastest there is.
        workers: loader processes.

    Raises:
        UserError: the run has no checkpoint, ``out`` cannot be written, or the images are no files of their own.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}, but must lie above 0 and be at most 1: the share of the images to keep")
    run = run if isinstance(run, Run) else Run(run)
    config, path = run.config, Path(out).absolute()
    _check_writable(path, config)
    mim, resolution = trained_model(run, model)
    files = find_images(config)
    _check_nameable(files)
    table = files.take(split(config, files)[0])
    at = pick_device(device)
    selector = Selector(mim.to(at), whole_network(bare_network(mim), resolution).to(at))

    def loader(some: ImageTable) -> EvalLoader:
        count = pick_workers(workers, at)
        return EvalLoader(plain_pictures(config, some), resolution=resolution, batch_size=_BATCH, workers=count)

    sample, every = loader(table.take(range(0, len(table), math.ceil(len(table) / _LEARN_FROM)))), loader(table)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        first = bar.add_task("learning what is hard", total=len(sample.pictures.table))
        predictor = selector.fit(sample, lambda images: bar.advance(first, images))
        second = bar.add_task("scoring", total=len(table))
        places, scores = selector.score(predictor, every, lambda images: bar.advance(second, images))
    # In the digits that are written, so that the last bits of the arithmetic decide nothing.
    texts = [f"{score:.5g}" for score in scores.tolist()]
    scores = torch.tensor([float(text) for text in texts], dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    rows, kept = places[order].tolist(), max(1, round(keep * len(order)))
    picture = path.with_suffix(".png")
    try:
        listed = zip(rows[:kept], order[:kept].tolist(), strict=True)
        write_file(path, _as_csv([(table.path(row), texts[place]) for row, place in listed]))
        write_file(picture, _contact_sheet(config, table.take(rows), scores[order]))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    return Choice(path, picture, kept, len(rows), scores[order], predictor.r2, every.bad)


def _check_writable(path: Path, config: Config) -> None:
    """Before anything costly begins.

    Raises:
        UserError: ``path`` cannot be written, or would not be read as a list, or is what the run was trained on.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"{str(path)!r} must end in .csv, so that pretrain reads it as a list")
    if not path.parent.is_dir():
        raise UserError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the name of a .csv file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{str(path)!r} cannot be written: Permission denied")
    if path.resolve() in [Path(data).expanduser().resolve() for data in config.data.paths]:
        raise UserError(f"{str(path)!r} is the list that the run was trained on; give another --out")


def _check_nameable(table: ImageTable) -> None:
    """Whether each image is a file of its own, whose path can stand in a list.

    Raises:
        UserError: some lie inside of larger files.
    """
    inside = (table.offset != WHOLE).nonzero()[0]
    if len(inside):
        container = table.containers[table.container[inside[0]]]
        raise UserError(
            f"a list cannot name the images inside of {container!r}; unpack them into a folder, pretrain on that for a"
            " short while, and select from that run"
        )


def _as_csv(rows: Sequence[tuple[str, str]]) -> bytes:
    """The list, with names of any bytes as they are."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # its own end of lines, \r\n: only then does it quote names with either of both
    writer.writerow(("path", "score"))
    writer.writerows((os.fsencode(path).decode("utf-8", "surrogateescape"), score) for path, score in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _contact_sheet(config: Config, table: ImageTable, scores: Float64[Tensor, " n"]) -> bytes:
    """The first images and the last ones of a sorted table, as PNG; the lowest score comes last."""
    count = min(_SHOWN, len(table))
    parts = []
    for title, rows in (("highest", range(count)), ("lowest", range(len(table) - count, len(table)))):
        first, last = scores[rows[0]], scores[rows[-1]]
        tiles = thumbnails(config, table.take(rows), _TILE)
        parts.append(tiled(tiles, f"the {count} {title} scores: {first:.4g} to {last:.4g}"))
    return stacked(parts)
