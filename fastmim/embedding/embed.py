# SPDX-License-Identifier: Apache-2.0
"""Features of every image, batch by batch, in a file; what is done is kept, whatever ends the process."""

import contextlib
import hashlib
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastmim import __version__
from fastmim.config import Config, update
from fastmim.data.loader import EvalLoader
from fastmim.data.table import ImageTable
from fastmim.data.workers import lost_workers
from fastmim.embedding import formats
from fastmim.embedding.folders import Classes, class_folders
from fastmim.embedding.parts import Parts, differing
from fastmim.errors import UserError
from fastmim.run_folder import Run, locked
from fastmim.run_images import find_images, plain_pictures
from fastmim.starts import Opened, open_backbone
from fastmim.tasks.features import features, pool, tokens
from fastmim.train.checkpoint import write_file
from fastmim.train.device import pick_device, pick_workers
from fastmim.train.signals import StopRequest

POOLS = {"mean": pool, "tokens": tokens}
# The same on every device: it decides which images are computed together, and with that the last bits of the result.
BATCH = 64
SECONDS = 10.0
"""After so long a part is written: what a killed process may lose."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; says how far it is, and how to go on."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote."""

    path: Path
    """The features, in the order of the images' paths."""
    pictures: tuple[Path, ...]
    """Some images with their nearest, and a map of all."""
    images: int
    """How many have features."""
    dim: int
    """Numbers of each image."""
    bad: int
    """How many cannot be read; listed with their reasons in ``<path>.bad.csv``."""
    complete: bool = False
    """Everything was there before, and nothing was computed."""


def embed(
    target: str | Path | Run,
    data: str | Sequence[str],
    *,
    out: str | Path = "features.npz",
    model: nn.Module | None = None,
    pool: str = "mean",
    resolution: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    pictures: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> Embedded:
    """Writes the features of all images with their paths, and two pictures of what the features find alike.

    An interrupted call goes on where it was when it is made again, and ends with the same bits on the same device.

    Args:
        target: a run, a timm model (its released weights are fetched), ``local-dir:FOLDER`` or a checkpoint file.
        data: what `fastmim.scan` reads: folders, lists, archives, URLs.
        out: the features: .npz (arrays features, paths, meta; labels and classes where images lie in class folders),
            .parquet (columns path, feature; label) or .csv (columns path, f0, f1 ...; meta in ``<out>.json``).
        model: the run's module, where it was not one of timm's.
        pool: "mean" over the positions of the last map, D = its channels; "tokens" keeps all of its positions, D =
            channels * height * width.
        resolution: side of the images in pixels; the run's own, or 128.
        batch_size: images at a time; 64.
        device: where to compute; the fastest there is.
        workers: loader processes.
        pictures: also draw them.
        overwrite: begin again, whatever is there.
        seed: of the map.

    Raises:
        UserError: no such network or images, ``out`` cannot be written, or holds what other weights, images or options
            gave.
        Interrupted: by Ctrl-C or SIGTERM; what was computed is kept.
    """
    if pool not in POOLS:
        raise UserError(f"pool is {pool!r}, but must be one of: {', '.join(POOLS)}")
    path = Path(out).absolute()
    formats.check_out(path)
    opened = open_backbone(target, resolution, model=model, seed=seed)
    config = _config([data] if isinstance(data, str) else list(data), opened)
    table = find_images(config)
    options = _options(opened, table, pool, batch_size or BATCH)
    parts = Parts(formats.beside(path, ".parts"), options)
    if not overwrite and (done := _complete(path, parts)):
        return done
    with _writing(path):
        parts.folder.mkdir(exist_ok=True)
        with locked(parts.folder):
            if overwrite:
                parts.clear()
            parts.begin()
            _compute(parts, opened, config, table, pick_device(device), workers)
            return _finish(path, parts, opened, config, table, pictures, seed)


def _config(data: list[str], opened: Opened) -> Config:
    """What `find_images` and `thumbnails` want to know."""
    words = {"data": data, "channels": opened.channels, "values": "raw" if opened.raw else "8bit"}
    return update(Config(), {**words, "resolution": opened.resolution, "mean": opened.mean, "std": opened.std})


def _options(opened: Opened, table: ImageTable, pool: str, batch_size: int) -> dict[str, Any]:
    """All that the features depend on."""
    places = hashlib.sha256("\0".join([table.fingerprint, *table.containers]).encode("utf-8", "surrogateescape"))
    backbone = opened.backbone
    return {
        "weights": weights_sum(backbone),
        "network": [getattr(backbone, "architecture", opened.name), getattr(backbone, "create_args", {})],
        "images": places.hexdigest(),
        "resolution": opened.resolution,
        "channels": opened.channels,
        "values": "raw" if opened.raw else "8bit",
        "mean": list(opened.mean),
        "std": list(opened.std),
        "pool": pool,
        "batch_size": batch_size,
    }


def weights_sum(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _complete(path: Path, parts: Parts) -> Embedded | None:
    """What is there already, if it is what is wanted; None if there is something to do.

    Raises:
        UserError: what is there was made of something else.
    """
    begun = parts.different()
    if begun:
        raise UserError(
            f"{str(parts.folder)!r} was begun with other {' and '.join(begun)}; --overwrite begins again, or give"
            " another --out"
        )
    if begun is not None or not path.exists():
        return None
    meta = formats.read_meta(path)
    if meta is None:
        raise UserError(f"{str(path)!r} is there, and not by fastmim embed; --overwrite replaces it")
    other = differing(meta, parts.options)
    if other:
        raise UserError(
            f"{str(path)!r} was made with other {' and '.join(other)}; --overwrite replaces it, or give another --out"
        )
    return Embedded(path, (), meta["count"], meta["dim"], meta["bad"], complete=True)


def _compute(
    parts: Parts, opened: Opened, config: Config, table: ImageTable, device: torch.device, workers: int | None
) -> None:
    """Adds what is missing to ``parts``.

    Raises:
        Interrupted: before the end.
    """
    size, start = parts.options["batch_size"], parts.done
    # It begins with a whole batch, so that images are computed together with the same ones as ever.
    rest = plain_pictures(config, table.take(range(start, len(table))))
    loader = EvalLoader(rest, resolution=opened.resolution, batch_size=size, workers=pick_workers(workers, device))
    pooling = POOLS[parts.options["pool"]]
    network = opened.backbone.to(device)
    waiting, saved = _Waiting(parts, len(table)), time.monotonic()
    with (
        StopRequest() as stop,
        lost_workers("the same command"),
        _bar() as bar,
        contextlib.closing(_closable(loader)) as batches,
    ):
        shown = bar.add_task("features", total=len(table), completed=start)
        for batch in batches:
            found, _ = features(network, [batch], device, opened.mean, opened.std, pooling=pooling)
            # The batches before it had no good image, if places are missing.
            last = start + (int(batch["indices"][0]) // size + 1) * size
            waiting.add(found, start + batch["indices"])
            bar.update(shown, completed=min(last, len(table)))
            stopped = bool(stop)
            if stopped or time.monotonic() - saved >= SECONDS:
                waiting.write(min(last, len(table)), loader.bad)
                saved = time.monotonic()
            if stopped:
                break
        else:
            waiting.write(len(table), loader.bad)
    if parts.done < len(table):
        raise Interrupted(
            f"interrupted after {parts.done:,} of {len(table):,} images; to go on, run the same command again, without"
            " --overwrite"
        )


def _closable(loader: EvalLoader) -> Generator[Mapping[str, Tensor], None, None]:
    yield from loader


def _bar() -> Progress:
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


class _Waiting:
    """Features that are in no part yet."""

    def __init__(self, parts: Parts, total: int) -> None:
        self.parts, self.total = parts, total
        self.features: list[Tensor] = []
        self.places: list[Tensor] = []
        self.known = dict(parts.bad)

    def add(self, features: Float[Tensor, "n D"], places: Tensor) -> None:
        self.features.append(features)
        self.places.append(places)

    def write(self, last: int, bad: Mapping[str, str]) -> None:
        """A part of all that waits, up to the image before ``last``."""
        if last <= self.parts.done:
            return
        new = {path: reason for path, reason in bad.items() if path not in self.known}
        self.known |= new
        empty = torch.zeros(0, self.parts.dim)
        places = torch.cat(self.places) if self.places else torch.zeros(0, dtype=torch.long)
        self.parts.add(last, torch.cat(self.features) if self.features else empty, places, new)
        self.features, self.places = [], []


def _finish(
    path: Path, parts: Parts, opened: Opened, config: Config, table: ImageTable, pictures: bool, seed: int
) -> Embedded:
    """Writes what is asked for, then lets the parts go."""
    bad, list_of_bad = parts.bad, formats.beside(path, ".bad.csv")
    if not parts.images:
        first = next(iter(bad.items()))
        parts.remove()
        raise UserError(f"none of {len(table)} images can be read; first {first[0]!r}: {first[1]}")
    places = parts.places()
    good = table.take(places)
    classes = class_folders(table)
    if classes is not None:
        classes = Classes(classes.names, tuple(classes.labels[place] for place in places.tolist()))
    facts = {"count": parts.images, "dim": parts.dim, "bad": len(bad), "model": opened.name, "fastmim": __version__}
    paths = [good.path(row) for row in range(len(good))]
    if bad:
        write_file(list_of_bad, formats.bad_list(bad))
    else:
        list_of_bad.unlink(missing_ok=True)
    formats.write(path, formats.Contents(parts, paths, classes, {**parts.options, **facts}))
    drawn: tuple[Path, ...] = ()
    if pictures:
        from fastmim.embedding.pictures import draw_pictures

        with _bar() as bar:
            bar.add_task("drawing", total=None)
            drawn = draw_pictures(path, config, good, parts, classes, opened.name, seed)
    done = Embedded(path, drawn, parts.images, parts.dim, len(bad))
    parts.remove()
    return done


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """One line where the system says no."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
