# SPDX-License-Identifier: Apache-2.0
"""``fastmim embed``: the features of every image, for search, clustering and labelling by other tools."""

import sys
from typing import Annotated, Any, Literal

from pydantic import Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build
from fastmim.cli_output import INTERRUPTED, OK
from fastmim.config import Section


class Embed(Section):
    """Write the features of every image, with pictures of what is alike.

    One row for each image, with its path. Resumable: after Ctrl-C or a crash, the same command goes on.
    """

    target: Positional[Annotated[str, arg(metavar="RUN|MODEL")]]
    """A run folder, the name of a timm model, or local-dir:FOLDER."""
    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA..."), Field(min_length=1)]]
    """Images; as for scan."""
    out: str = "features.npz"
    """The file to write; .npz, .parquet or .csv says in which format."""
    pool: Literal["mean", "tokens"] = "mean"
    """One vector of the last map: the mean over its positions, or all of them."""
    resolution: int | None = Field(default=None, ge=8)
    """Side of the square image in pixels; that of the pre-training when not given."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images at a time; 64 when not given."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images; from the cores when not given."""
    pictures: bool = True
    """Also draw some images beside their nearest, and a map of all; --no-pictures leaves them out."""
    overwrite: bool = False
    """Begin again, and replace what is there."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the map."""


def embed(words: dict[str, Any]) -> int:
    """Prints what was written, and how many images could not be read."""
    options = build(Embed, words, "embed")
    from fastmim.embedding import embed as embedding

    try:
        done = embedding.embed(**options.model_dump())
    except embedding.Interrupted as stopped:
        print(f"fastmim: {stopped}", file=sys.stderr)
        return INTERRUPTED
    there = "; all there already, --overwrite computes them again" if done.complete else ""
    print(f"features: {done.images:,} images of {done.dim:,} numbers in {options.out}{there}")
    for name, picture in zip(("nearest", "map"), done.pictures, strict=False):
        print(f"{name + ':':10}{picture}")
    if done.bad:
        print(f"left out: {done.bad:,} that cannot be read, listed in {options.out}.bad.csv")
    return OK
