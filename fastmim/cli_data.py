# SPDX-License-Identifier: Apache-2.0
"""``fastmim scan``, ``prepare`` and ``select``: look at images, write them in the form that trains fastest, choose."""

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build
from fastmim.cli_output import print_styled
from fastmim.config import Config, DataConfig, Section
from fastmim.errors import UserError

if TYPE_CHECKING:
    from fastmim.data.table import Squares

_NAMED = 5


class Scan(Section):
    """See what your images are, which are broken, and how to train on them.

    Only names and sizes of all files are read; headers, pixels and duplicates of a sample, or of all with --all.
    """

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA..."), Field(min_length=1)]]
    """Folders, image files, .txt or .csv lists, .tar files, datasets folders, prepared sets, or URLs such as s3://."""
    sample: int = Field(default=1000, ge=1)
    """Images to open, evenly spread over all."""
    all: bool = False
    """Open every image."""
    channels: int | None = Field(default=None, ge=1)
    """Channels that training is to see; those that suit the images when not given."""
    values: Literal["8bit", "raw"] | None = None
    """What training is to see, values of 0 to 255 or the stored ones; what suits the images when not given."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that open images; as many as cores when not given."""
    out: str | None = None
    """Also write everything that was found to this file, as JSON."""
    cache: bool = True
    """Use what an earlier scan found in files that have not changed, and keep what is found; --no-cache opens all."""


class Prepare(Section):
    """Write your images as small squares, once, to train on them far faster.

    Tar shards that other tools read too, resumable, over any number of processes and machines.
    """

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA...")]] = ()
    """What to prepare; as for scan."""
    out: str
    """The folder to write to; what is there already is kept and gone on with."""
    resolution: int = Field(default=128, ge=8)
    """The largest training crop that is planned, in pixels; pretrain wants the same word."""
    size: int | None = Field(default=None, ge=8)
    """Side of the stored squares; twice the resolution when not given."""
    format: Literal["jpeg", "raw"] | None = None
    """How squares are stored; jpeg where values and channels allow it."""
    quality: int = Field(default=90, ge=1, le=100)
    """Of JPEG; above 94 colour is stored at full resolution."""
    channels: int = Field(default=3, ge=1)
    """Channels to store."""
    values: Literal["8bit", "raw"] = "8bit"
    """Values to store: 0 to 255, or the stored ones as float32."""
    shard_images: int | None = Field(default=None, ge=1)
    """Images in a shard; 4096, or less where it would pass some 256 MB, when not given."""
    part: str | None = None
    """Only this part of the shards, as 2/8, so that several machines share the work; --merge joins them."""
    merge: bool = False
    """Join the parts in --out into one set."""
    workers: int | None = Field(default=None, ge=0)
    """Processes; as many as cores when not given."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be read."""


class Select(Section):
    """List the images that are worth training on.

    After PASS: a short run scores its own images by how hard their most informative blocks are to predict.
    """

    run: Positional[str]
    """The run folder; it may be interrupted."""
    keep: float = Field(default=0.37, gt=0, le=1)
    """Share of the images to keep; 1 lists all of them with their scores."""
    out: str = "kept.csv"
    """The list that pretrain reads, with a picture of the highest and the lowest scores beside it."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images; from the cores when not given."""


def scan(words: dict[str, Any]) -> int:
    """Prints what was found, and advice."""
    options = build(Scan, words, "scan")
    out = None if options.out is None else Path(options.out)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {str(out.absolute().parent)!r}")
    from fastmim.data.inspection import found, page
    from fastmim.data.inspection.inspect import inspect
    from fastmim.data.sources.scan import scan as find

    findings = inspect(
        find(options.data),
        sample=None if options.all else options.sample,
        channels=options.channels,
        raw=None if options.values is None else options.values == "raw",
        workers=options.workers,
        remember=found.place(options.data) if options.cache else None,
    )
    if out is not None:
        try:
            out.write_text(json.dumps(dataclasses.asdict(findings), indent=1) + "\n", encoding="ascii")
        except OSError as error:
            raise UserError(f"--out {options.out}: {error.strerror}") from None
    if findings.statistics is None:
        counts = ", ".join(f"{count} {reason}" for reason, count in findings.reasons.items())
        first = findings.broken[0]
        raise UserError(
            f"none of {findings.opened} images that were opened can be read ({counts});"
            f" first {first.path!r}: {first.reason}"
        )
    for style, start, rest in page.lines(findings, options.data):
        print_styled(style, start, rest)
    return 0


def prepare(words: dict[str, Any]) -> int:
    """Prints what was written, and how to train with it."""
    options = build(Prepare, words, "prepare")
    if options.merge and (options.data or options.part):
        raise UserError("--merge joins the parts in --out, and takes neither DATA nor --part")
    if not options.merge and not options.data:
        raise UserError("prepare needs DATA, the images; see: fastmim prepare --help")
    from fastmim.data.prepared import prepare as preparing
    from fastmim.data.prepared.plan import BAD_IMAGES

    try:
        if options.merge:
            done = preparing.merge(options.out)
        else:
            given = options.model_dump(exclude={"data", "out", "merge"})
            done = preparing.prepare_images(options.data, options.out, **given)
    except preparing.Interrupted as stopped:
        print(f"fastmim: {stopped}", file=sys.stderr)
        return 130
    print(f"prepared: {done.images:,} images in {done.shards:,} shards, {done.bytes / 1e6:,.1f} MB")
    if done.made:
        print(f"time:     {done.seconds:,.1f} s, {done.made / done.seconds:,.0f} images/s")
    if done.bad:
        listed = f", listed in {done.out / BAD_IMAGES}" if done.complete else ""
        print(f"left out: {done.bad:,} images that cannot be read{listed}")
    if done.complete:
        print(f"train:    fastmim pretrain {done.out}{_options_of(done.squares)}")
    else:
        print(f"then:     fastmim prepare --out {done.out} --merge, when all parts are in this folder")
    return 0


def select(words: dict[str, Any]) -> int:
    """Prints how many were kept, how scores lie, how far to trust them, and how to train on the list."""
    options = build(Select, words, "select")
    from fastmim.choose import select as choose
    from fastmim.run_folder import Run

    done = choose(**options.model_dump())
    quantiles = ((f"{place:.0%}", done.scores.quantile(place)) for place in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0))
    trust = "not measured, of fewer than ten images" if math.isnan(done.r2) else f"R^2 {done.r2:.2f} on unseen images"
    print(f"kept:      {done.kept:,} of {done.images:,} images, in {done.path}")
    print(f"scores:    {', '.join(f'{name} {score:.3g}' for name, score in quantiles)}")
    print(f"predictor: {trust}")
    if done.bad:
        named = "; ".join(f"{path!r}: {reason}" for path, reason in list(done.bad.items())[:_NAMED])
        more = f"; {len(done.bad) - _NAMED:,} more" if len(done.bad) > _NAMED else ""
        print(f"left out:  {len(done.bad):,} that cannot be read: {named}{more}")
    print(f"look:      {done.picture}")
    print(f"train:     fastmim pretrain {shlex.quote(str(done.path))}{_options_of_run(Run(options.run).config)}")
    return 0


def _options_of_run(config: Config) -> str:
    """The words without which pretrain would see other values than the run did."""
    data = config.data
    words = f" --channels {data.channels}" if data.channels != 3 else ""
    return words + (" --values raw" if data.values == "raw" else "")


def _options_of(squares: "Squares") -> str:
    """The words without which pretrain would not see what was stored, or at another size than was planned."""
    words = f" --channels {squares.channels}" if squares.channels != 3 else ""
    words += " --values raw" if squares.dtype == "float32" else ""
    return words + (f" --resolution {squares.side // 2}" if squares.side // 2 != DataConfig().resolution else "")
