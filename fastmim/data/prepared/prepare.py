# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared set: each image once, as a small upright square, from which training reads far faster.

All that a set is made of stands in its plan. A shard follows from the images and the plan alone, so that it does not
matter which process of which machine makes it, in which sitting; what is there already is kept.
"""

import contextlib
import csv
import io
import itertools
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.data.prepared.plan import (
    BAD_IMAGES,
    Options,
    begun_plan,
    open_folder,
    parse_part,
    plan_of,
    refuse_inside,
    write_or_refuse,
)
from fastmim.data.prepared.pool import Watch, write_shards
from fastmim.data.prepared.records import MANIFEST, Plan, Prepared, ShardEntry, ShardNote
from fastmim.data.prepared.shards import is_prepared, npy_header
from fastmim.data.prepared.writer import is_done, store, stored_bytes
from fastmim.data.read import BadImage
from fastmim.data.table import ImageTable, Squares
from fastmim.errors import UserError
from fastmim.machine import cores

DEFAULTS = Options()
MEASURED = 32  # images from which the size of the set is foretold


@dataclass(frozen=True)
class Summary:
    """What there is after a sitting."""

    out: Path
    squares: Squares
    shards: int
    """Shards of the set, or of this part of it."""
    images: int
    """Images in them."""
    bad: int
    """Images that were left out."""
    bytes: int
    seconds: float
    """Of this sitting."""
    made: int
    """Images, good and bad, that were gone through in this sitting."""
    complete: bool
    """Whether the set can be trained on; False for a part."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; says how far it is, and how to go on."""


def prepare_images(
    data: Sequence[str],
    out: str | Path,
    *,
    resolution: int = 128,
    size: int | None = None,
    part: str | None = None,
    workers: int | None = None,
    max_bad: float = 0.05,
    quiet: bool = False,
    **options: Any,
) -> Summary:
    """Finds the images of ``data`` and writes them to ``out``.

    Args:
        data: folders, lists, archives or URLs, as ``scan`` takes them.
        out: the folder of the set; what is there of it already is kept.
        resolution: the largest training crop that is planned, in pixels.
        size: side of the squares; twice ``resolution`` when not given.
        part: "2/8" makes every eighth shard, beginning with the second.
        workers: processes; 0 uses this one, None all cores.
        max_bad: share of the images that may be unreadable.
        quiet: show no progress.
        options: the other fields of ``Options``.

    Raises:
        UserError: one line that says what is wrong; finished shards are kept.
        Interrupted: by Ctrl-C or SIGTERM; finished shards are kept.
    """
    from fastmim.data.sources.scan import scan

    chosen = Options(size=2 * resolution if size is None else size, **options)
    share = parse_part(part)
    for place in data:
        if is_prepared(place):
            raise UserError(f"{place!r} is prepared already; train on it with fastmim pretrain, or give the originals")
        refuse_inside(Path(out), place)
    return prepare(scan(data), out, chosen, part=share, workers=workers, max_bad=max_bad, quiet=quiet)


def prepare(
    table: ImageTable,
    out: str | Path,
    options: Options = DEFAULTS,
    *,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    max_bad: float = 0.05,
    quiet: bool = False,
) -> Summary:
    """Writes the images of ``table``; the arguments and errors of ``prepare_images``, with ``part`` as (2, 8)."""
    started = time.monotonic()
    plan = plan_of(table, options)
    folder = open_folder(str(out), table, plan)
    first, step = (part[0] - 1, part[1]) if part else (0, 1)
    numbers = range(first, plan.shards, step)
    notes = {number: is_done(folder, number, plan) for number in numbers}
    todo = [number for number, note in notes.items() if note is None]
    total, left = _images(plan, numbers), _images(plan, todo)
    _check_disk(table, todo, plan, folder)
    bad = {path: reason for note in notes.values() if note for path, reason in note.bad}
    workers = min(cores() if workers is None else workers, len(todo))
    try:
        with _sigterm_interrupts():
            _work(table, todo, plan, folder, workers, Watch(total, total - left, quiet), bad, max_bad * total)
    except KeyboardInterrupt:
        whole = sum(is_done(folder, number, plan) is not None for number in numbers)
        raise Interrupted(
            f"interrupted; {whole} of {len(numbers)} shards are whole; to go on, run the same command again"
        ) from None
    _judge(bad, max_bad * total, total, folder)
    if part is None:
        summary = merge(folder)
    else:
        summary = _summary(folder, plan, [note for number in numbers if (note := is_done(folder, number, plan))], False)
    return Summary(**{**vars(summary), "seconds": time.monotonic() - started, "made": left})


def merge(out: str | Path) -> Summary:
    """Makes the shards in ``out``, from however many parts, one set: checks that all are there, and lists them.

    Raises:
        UserError: there is no set, or shards are missing.
    """
    folder = Path(out)
    plan = begun_plan(folder)
    if plan is None:
        raise UserError(f"{str(folder)!r} holds no part of a prepared set; give the --out of the parts")
    notes = [is_done(folder, number, plan) for number in range(plan.shards)]
    missing = [number for number, note in enumerate(notes) if note is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {plan.shards} shards in {str(folder)!r} are not there or not whole: {_ranges(missing)};"
            " wait for the process that is at them, or run what makes them (part I/N: shard I-1 and every Nth after it)"
        )
    found = [note for note in notes if note is not None]
    bad = [(path, reason) for note in found for path, reason in note.bad]
    _write_bad(folder, bad)
    count = sum(note.count for note in found)
    if not count:
        raise UserError(f"none of {plan.images} images can be read; see {str(folder / BAD_IMAGES)!r}")
    entries = [ShardEntry(count=note.count, tar=note.tar, index=note.index) for note in found]
    prepared = Prepared(plan=plan, count=count, bad=len(bad), shards=entries).sealed()
    write_or_refuse(folder / MANIFEST, json.dumps(prepared.model_dump()).encode())
    return _summary(folder, plan, found, True)


# ---- Parts of it


def _work(
    table: ImageTable,
    todo: list[int],
    plan: Plan,
    folder: Path,
    workers: int,
    watch: Watch,
    bad: dict[str, str],
    allowed: float,
) -> None:
    """Writes the shards ``todo``, and adds to ``bad``; ends early when those are more than ``allowed``."""
    reports = write_shards(table, todo, plan, folder, workers)
    try:
        for report in reports:
            watch.add(report.images)
            bad.update(report.bad)
            if len(bad) > allowed:
                return
    finally:
        watch.close()
        reports.close()  # type: ignore[attr-defined]  # a generator


def _judge(bad: dict[str, str], allowed: float, total: int, folder: Path) -> None:
    if len(bad) <= allowed:
        return
    _write_bad(folder, sorted(bad.items()))
    path, reason = next(iter(bad.items()))
    raise UserError(
        f"{len(bad)} of {total} images ({len(bad) / total:.1%}) cannot be read; first {path!r}: {reason}; those found"
        f" so far stand in {str(folder / BAD_IMAGES)!r}; allow more with max_bad, or mend them and give another --out"
    )


def _check_disk(table: ImageTable, todo: list[int], plan: Plan, folder: Path) -> None:
    images = _images(plan, todo)
    if plan.stored == "npy":
        squares = plan.squares
        values = squares.side**2 * squares.channels * np.dtype(squares.dtype).itemsize
        sizes = [len(npy_header(squares)) + values]
    else:
        rows = [row for number in todo for row in plan.rows(number)]
        sizes = []
        for row in rows[:: max(1, len(rows) // MEASURED)][:MEASURED]:
            with contextlib.suppress(BadImage):
                sizes.append(len(store(table, row, plan).content))
    if not images or not sizes:
        return
    need, free = images * sum(map(stored_bytes, sizes)) / len(sizes), shutil.disk_usage(folder).free
    if 0.9 * need > free:  # a tenth for the error of the estimate
        raise UserError(
            f"the set needs about {need / 1e9:.2f} GB in {str(folder)!r}, where {free / 1e9:.2f} GB are free;"
            " make room, or store less with --size, --quality or --format jpeg"
        )


def _images(plan: Plan, numbers: Sequence[int]) -> int:
    return sum(len(plan.rows(number)) for number in numbers)


def _summary(folder: Path, plan: Plan, notes: list[ShardNote], complete: bool) -> Summary:
    images, bad = sum(note.count for note in notes), sum(len(note.bad) for note in notes)
    size = sum(note.tar.bytes + note.index.bytes for note in notes)
    return Summary(folder, plan.squares, len(notes), images, bad, size, 0.0, 0, complete)


def _write_bad(folder: Path, bad: Sequence[tuple[str, str]]) -> None:
    """Lists bad images by path; no list where there are none."""
    if not bad:
        (folder / BAD_IMAGES).unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "reason"), *sorted(bad)])
    write_or_refuse(folder / BAD_IMAGES, text.getvalue().encode("utf-8", "surrogateescape"))


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as 3, 5-7 and so on; at most eight of them."""
    runs = [
        [number for _, number in group]
        for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    said = [f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs]
    return ", ".join(said[:8]) + (", ..." if said[8:] else "")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
