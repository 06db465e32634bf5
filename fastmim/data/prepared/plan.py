# SPDX-License-Identifier: Apache-2.0
"""What a prepared set is to be, and the folder that it is written to."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastmim.data.prepared.records import MANIFEST, PLAN, Plan, Prepared
from fastmim.data.prepared.shards import read_record
from fastmim.data.prepared.writer import write_whole
from fastmim.data.read import is_remote
from fastmim.data.table import ImageTable
from fastmim.errors import UserError

BAD_IMAGES = "bad_images.csv"
OURS = re.compile(rf"\..*|(shard-\d{{5,}}\.(tar|npz|json)|{MANIFEST}|{PLAN}|{BAD_IMAGES})(\.tmp)?")
"""What may be in a folder to which a set is written; hidden files harm nobody."""
RAW_SHARD_BYTES = 256 * 2**20
SHARD_IMAGES = 4096
WORDS = {"side": "size", "stored": "format", "dtype": "values"}  # what options are called where the plan says otherwise


@dataclass(frozen=True)
class Options:
    """What the squares are to be; all of it changes the bytes of the set."""

    size: int = 256
    """Side in pixels; twice the largest training crop loses next to nothing."""
    format: Literal["jpeg", "raw"] | None = None
    """JPEG where values and channels allow it, when not given."""
    quality: int = 90
    """Of JPEG; above 94 colour is stored at full resolution (4:4:4, not 4:2:0)."""
    channels: int = 3
    values: Literal["8bit", "raw"] = "8bit"
    """0 to 255, or the stored ones as float32."""
    shard_images: int | None = None
    """Images in a shard; 4096, or less where a shard would pass some 256 MB, when not given."""


def parse_part(text: str | None) -> tuple[int, int] | None:
    """(2, 8) from "2/8".

    Raises:
        UserError: it is something else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"part = {text!r}: give it as 2/8, the second of eight parts")
    return int(found[1]), int(found[2])


def plan_of(table: ImageTable, options: Options) -> Plan:
    """What the set will be.

    Raises:
        UserError: there is nothing to prepare, or the options do not fit each other.
    """
    if table.squares is not None:
        raise UserError("these images are prepared already; train on them with fastmim pretrain, or give the originals")
    if not len(table):
        raise UserError("there are no images to prepare")
    fits = options.values == "8bit" and options.channels in (1, 3)
    if options.format == "jpeg" and not fits:
        what = "raw values" if options.values == "raw" else f"{options.channels} channels"
        raise UserError(f"format jpeg cannot store {what}, only 1 or 3 channels of 8 bits; give --format raw")
    stored: Literal["jpeg", "npy"] = "jpeg" if fits and options.format != "raw" else "npy"
    dtype: Literal["uint8", "float32"] = "float32" if options.values == "raw" else "uint8"
    count = options.shard_images
    if count is None:
        square = options.size**2 * options.channels * np.dtype(dtype).itemsize
        room = max(16, RAW_SHARD_BYTES // square)
        count = SHARD_IMAGES if stored == "jpeg" else min(SHARD_IMAGES, 2 ** (room.bit_length() - 1))
    return Plan(
        source=table.fingerprint,
        images=len(table),
        side=options.size,
        channels=options.channels,
        dtype=dtype,
        stored=stored,
        quality=options.quality if stored == "jpeg" else None,
        shard_images=count,
    )


def open_folder(out: str, table: ImageTable, plan: Plan) -> Path:
    """The folder, in which the plan stands.

    Raises:
        UserError: it is not ours, cannot be written to, or was begun with another plan.
    """
    if is_remote(out):
        raise UserError(f"prepare writes to a folder, not to {out!r}; copy the folder there when it is finished")
    folder = Path(out)
    for container in table.containers:
        refuse_inside(folder, container)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{out!r} is a file; prepare needs a folder")
    try:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208
    except OSError as error:
        raise UserError(f"{out!r} cannot be read: {error.strerror}") from None
    others = [name for name in names if not OURS.fullmatch(name)]
    if others:
        raise UserError(f"{out!r} holds other things, such as {others[0]!r}; give an empty or a new folder")
    begun = begun_plan(folder)
    if begun is None and any(name.startswith("shard-") for name in names):
        raise UserError(f"{out!r} holds shards of which nobody knows how they were made; give an empty or a new folder")
    if begun is not None and begun != plan:
        raise UserError(f"{out!r} {_difference(begun, plan)}; give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out!r} cannot be made: {error.strerror}") from None
    write_or_refuse(folder / PLAN, json.dumps(plan.model_dump()).encode())
    return folder


def begun_plan(folder: Path) -> Plan | None:
    """The plan of the set in ``folder``; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    plan = read_record(str(folder), PLAN, Plan)
    if plan is not None:
        return plan
    prepared = read_record(str(folder), MANIFEST, Prepared)
    return None if prepared is None else prepared.plan


def _difference(begun: Plan, plan: Plan) -> str:
    if begun.source != plan.source:
        return f"was begun with other images ({begun.images} then, {plan.images} now)"
    pairs = zip(begun.model_dump().items(), plan.model_dump().values(), strict=True)
    changed = [f"{WORDS.get(name, name)} {then} (now {now})" for (name, then), now in pairs if then != now]
    return f"was begun with {', '.join(changed)}; ask for the same as then"


def refuse_inside(folder: Path, place: str) -> None:
    """The set must not become part of the images that it is made of.

    Raises:
        UserError: ``folder`` is inside of ``place``.
    """
    if (
        place
        and not is_remote(place)
        and Path(place).is_dir()
        and folder.resolve().is_relative_to(Path(place).resolve())
    ):
        raise UserError(f"{str(folder)!r} is inside of the images in {place!r}; give an --out elsewhere")


def write_or_refuse(path: Path, content: bytes) -> None:
    """Replaces a file as a whole.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from None
