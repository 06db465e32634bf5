# SPDX-License-Identifier: Apache-2.0
"""What a table of images is made of: formats, sizes, channels, values, broken files, duplicates, and what to do."""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Num, Shaped

from fastmim.data.inspection import duplicates, found
from fastmim.data.inspection.advice import advise
from fastmim.data.inspection.findings import Broken, Findings, Range, Same
from fastmim.data.inspection.look import Look, crashed, see
from fastmim.data.inspection.pool import over_processes
from fastmim.data.inspection.statistics import pool, spread
from fastmim.data.read import BadImage, is_remote
from fastmim.data.sources.scan import FORMAT_OF_SUFFIX
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.machine import cores

PEEK = 32
"""Images from whose headers channels and values are chosen."""
MAX_HASHED_BYTES, MAX_HASHED = 2**30, 50_000
"""Bytes and files of equal sizes that are read for exact duplicates, beyond those that are opened anyway."""
AT_ONCE = 16  # images in one piece of work


def inspect(
    table: ImageTable,
    sample: int | None = 1000,
    channels: int | None = None,
    raw: bool | None = None,
    workers: int | None = None,
    remember: Path | None = None,
) -> Findings:
    """Opens images and says what was found; broken files are findings.

    Each image is read and decoded once, for its pixels' statistics, its hash and the proof that it can be decoded.

    Args:
        table: the images.
        sample: how many to open, evenly spread over the table; None for all.
        channels: that training is to see; from the headers of a few when None.
        raw: whether training is to see stored values; from the headers when None.
        workers: processes; as many as cores when None, this one alone when 0.
        remember: the file that holds what earlier scans found, see ``found.place``; None to open all anew.

    Raises:
        UserError: channels or values are asked of a prepared set that has others.
    """
    begun = time.monotonic()
    available = cores()
    memory = found.Memory.load(remember) if remember else found.Memory()
    chosen = spread(len(table), len(table) if sample is None else sample)
    to_hash, compared = _to_hash(table, chosen)
    indices = np.union1d(chosen, to_hash)
    opening, hashing = np.isin(indices, chosen), np.isin(indices, to_hash)
    keys = found.keys(table, indices) if remember else np.zeros((len(indices), 2), np.uint64)
    channels, raw = _settings(table, chosen, memory.rows(keys[opening], 1, False), channels, raw)
    rows = memory.rows(keys, channels, raw)
    to_do = np.stack([hashing & ~rows["hashed"], opening & ~rows["opened"]], axis=1)
    wanted = [(index, *flags) for index, flags in zip(indices.tolist(), to_do.tolist(), strict=True) if any(flags)]
    remembered = int((opening & rows["opened"]).sum())
    _look(Look(table, channels, raw), wanted, indices, rows, available if workers is None else workers)
    if remember and wanted:
        memory.store(remember, rows, channels, raw, most=max(len(table), 1000))
    findings = _summarise(table, indices[opening], rows[opening], channels, raw)
    exact = _exact(table, indices[hashing], rows[hashing], compared)
    findings = replace(
        findings,
        remembered=remembered,
        cores=available,
        seconds=time.monotonic() - begun,
        exact=exact,
        near=_near(table, indices[opening], rows[opening], exact),
    )
    return replace(findings, advice=advise(findings))


# ---- What to look at


def _settings(
    table: ImageTable,
    chosen: Int64[np.ndarray, " n"],
    known: Shaped[np.ndarray, " n"],
    channels: int | None,
    raw: bool | None,
) -> tuple[int, bool]:
    """The channels and values that suit most of the images, where they are not given.

    Args:
        table: the images.
        chosen: those that will be opened.
        known: their rows as far as they are remembered.
        channels: that training is to see, if that is given.
        raw: whether it is to see stored values, if that is given.
    """
    if table.squares is not None:
        own = (table.squares.channels, table.squares.dtype != "uint8")
        if (channels if channels is not None else own[0], raw if raw is not None else own[1]) != own:
            values = "raw" if own[1] else "8bit"
            raise UserError(f"this prepared set has {own[0]} channels and {values} values; give neither option")
        return own
    if channels is not None and raw is not None:
        return channels, raw
    kinds: Counter[tuple[int, bool]] = Counter()
    for place in spread(len(chosen), PEEK).tolist():
        row = known[place].copy()
        with contextlib.suppress(BadImage):
            if not row["seen"]:
                see(row, table, table.read(int(chosen[place])))
            kinds[(int(row["channels"]), row["dtype"] != b"uint8")] += 1
    (number, deep), _ = kinds.most_common(1)[0] if kinds else ((3, False), 0)
    # Up to 4 channels of 8 bits are grey or colour, with transparency or without.
    raw = raw if raw is not None else deep or number > 4
    return channels if channels is not None else number if raw or number > 4 else 3, raw


def _to_hash(table: ImageTable, chosen: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " m"], int]:
    """Images whose bytes are compared, and how many images that decides about.

    That is all images if it is little work (files of different sizes need none), else those that are opened.
    """
    everywhere = duplicates.same_size(table.size)
    local = not any(is_remote(container) for container in table.containers)
    if local and len(everywhere) <= MAX_HASHED and int(table.size[everywhere].sum()) <= MAX_HASHED_BYTES:
        return everywhere, len(table)
    return chosen[duplicates.same_size(table.size[chosen])], len(chosen)


def _look(
    look: Look,
    wanted: Sequence[tuple[int, bool, bool]],
    indices: Int64[np.ndarray, " n"],
    rows: Shaped[np.ndarray, " n"],
    workers: int,
) -> None:
    """Fills ``rows`` in for the ``wanted`` images."""
    pieces = [wanted[start : start + AT_ONCE] for start in range(0, len(wanted), AT_ONCE)]
    with _progress(len(wanted)) as advance:
        for piece, answer in over_processes(look, pieces, workers if len(pieces) > 1 else 0):
            fresh = crashed(piece, look.channels) if answer is None else answer
            index, to_hash, to_open = np.array(piece, dtype=np.int64).T
            places = np.searchsorted(indices, index)
            for name in fresh.dtype.names or ():
                which = to_hash if name in found.SUM else to_open
                if name == "reason":  # a file of which only the sum is wanted may be unreadable too
                    which = to_open | ~rows["opened"][places]
                if name != "key":
                    rows[name][places[which > 0]] = fresh[name][which > 0]
            advance(len(piece))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A function that moves a bar on by a number of images: on a terminal, and when there is something to wait for."""
    if not sys.stderr.isatty() or not total:
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("looking at images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda number: bar.advance(task, number)


# ---- What it amounts to


def _summarise(
    table: ImageTable, indices: Int64[np.ndarray, " n"], rows: Shaped[np.ndarray, " n"], channels: int, raw: bool
) -> Findings:
    """All but the duplicates, from the rows of the images that were opened."""
    bad = rows["reason"] != b""
    good = rows[~bad]
    broken = tuple(
        Broken(table.path(index), reason.decode(errors="replace"))
        for index, reason in zip(indices[bad].tolist(), rows["reason"][bad].tolist(), strict=True)
    )
    sizes = np.stack([good["width"], good["height"]], axis=1) if table.true_size is None else table.true_size
    width, height = sizes.astype(np.float64).T
    wrong, example = _wrong_suffixes(table, indices, rows)
    return Findings(
        images=len(table),
        bytes=table.bytes,
        opened=len(rows),
        remembered=0,
        seconds=0.0,
        cores=1,
        prepared=table.squares.side if table.squares is not None else None,
        true_size=table.true_size is not None,
        formats=_counts(good["format"]),
        wrong_suffix=wrong,
        wrong_suffix_example=example,
        width=_range(width),
        height=_range(height),
        short_side=_range(np.minimum(width, height)),
        megapixels=_range(width * height / 1e6),
        aspect=_range(width / np.maximum(height, 1)),
        kinds=_kinds(table, indices[~bad], good),
        channels={int(number): count for number, count in _counts(good["channels"]).items()},
        depths=_counts(good["dtype"]),
        several_frames=int((good["frames"] > 1).sum()),
        turned=int(good["turned"].sum()),
        grey=int(good["grey"].sum()),
        broken=broken,
        reasons=dict(Counter(one.reason for one in broken).most_common()),
        exact=Same((), 0, 0),
        near=Same((), 0, 0),
        measured_channels=channels,
        measured_raw=raw,
        statistics=pool(good["summary"]) if len(good) else None,
        milliseconds=_mean(good["milliseconds"]),
    )


def _counts(values: Shaped[np.ndarray, " n"]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    found_values = [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
    return dict(Counter(found_values).most_common())


def _kinds(table: ImageTable, indices: Int64[np.ndarray, " n"], rows: Shaped[np.ndarray, " n"]) -> dict[str, int]:
    columns = (rows[name].tolist() for name in ("format", "channels", "dtype"))
    folders: dict[tuple[bytes, int, bytes], str] = {}
    counts: Counter[tuple[bytes, int, bytes]] = Counter()
    for index, kind in zip(indices.tolist(), zip(*columns, strict=True), strict=True):
        folder = table.name(index).rpartition("/")[0]
        folders[kind] = os.path.commonpath([folders.get(kind, folder), folder])
        counts[kind] += 1
    where = {kind: f" in {folder}/" if folder else "" for kind, folder in folders.items()}
    return {
        f"{form.decode()} of {number} x {dtype.decode()}{where[form, number, dtype]}": count
        for (form, number, dtype), count in counts.most_common()
    }


def _range(values: Num[np.ndarray, " n"]) -> Range | None:
    return Range(*(float(value) for value in np.percentile(values, (5, 50, 95)))) if len(values) else None


def _mean(values: Num[np.ndarray, " n"]) -> float:
    """The mean; the slowest hundredth counts as its fastest, as a first call and a sleeping disk are not typical."""
    return float(np.minimum(values, np.percentile(values, 99)).mean()) if len(values) else 0.0


def _wrong_suffixes(
    table: ImageTable, indices: Int64[np.ndarray, " n"], rows: Shaped[np.ndarray, " n"]
) -> tuple[dict[str, int], str]:
    found_lies: Counter[str] = Counter()
    example = ""
    if table.squares is not None:
        return {}, ""
    for index, content in zip(indices.tolist(), rows["format"].tolist(), strict=True):
        suffix = table.name(index).rpartition(".")[2].lower()
        if content and FORMAT_OF_SUFFIX.get(suffix, content.decode()) != content.decode():
            found_lies[f".{suffix} holds {content.decode()}"] += 1
            example = example or table.path(index)
    return dict(found_lies.most_common()), example


def _exact(table: ImageTable, indices: Int64[np.ndarray, " n"], rows: Shaped[np.ndarray, " n"], compared: int) -> Same:
    hashed = rows["hashed"]
    places = indices[hashed]
    groups = duplicates.exact(rows["digest"][hashed])
    return Same(_paths(table, places, groups), compared, 0)


def _near(table: ImageTable, indices: Int64[np.ndarray, " n"], rows: Shaped[np.ndarray, " n"], exact: Same) -> Same:
    good = rows["reason"] == b""
    detailed = good & (rows["detail"] >= duplicates.MIN_DETAIL)
    places, kept = indices[detailed], rows[detailed]
    small = np.maximum(kept["width"], kept["height"]) < duplicates.SMALL_PIXELS
    groups = _paths(table, places, duplicates.near(kept["hash"], kept["thumb"], small))
    known = {frozenset(group) for group in exact.groups}
    return Same(
        tuple(group for group in groups if not any(set(group) <= one for one in known)),
        len(places),
        int(good.sum()) - len(places),
    )


def _paths(
    table: ImageTable, indices: Int64[np.ndarray, " n"], groups: Sequence[Sequence[int]]
) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(table.path(int(indices[place])) for place in group) for group in groups)
