# SPDX-License-Identifier: Apache-2.0
"""Mean, deviation and percentiles of each channel, in the units that training sees: 0 to 1, or stored values."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from fastmim.data.augment import Box
from fastmim.data.decoding.decode import open_image
from fastmim.data.read import BadImage
from fastmim.data.table import ImageTable
from fastmim.errors import UserError

SIDE = 64
"""Pictures are averaged to this many pixels first: enough for a mean, and one bad pixel weighs little."""
PERCENTILES = (1, 5, 50, 95, 99)
# Each picture keeps the middles of these parts of its sorted values, narrow at the ends, where percentiles of a whole
# set are read off; pooled over pictures they stand for all pixels.
_EDGES = np.array([0, 0.2, 0.8, 2, 4, 8, 15, 25, 40, 60, 75, 85, 92, 96, 98, 99.2, 99.8, 100]) / 100
NODES = len(_EDGES) - 1
_WEIGHTS, _MIDDLES = np.diff(_EDGES), (_EDGES[1:] + _EDGES[:-1]) / 2


@dataclass(frozen=True)
class Statistics:
    """Of each channel, over all pictures with equal weight; of values that are finite."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Above 0: 1 for a channel that is constant."""
    percentiles: tuple[tuple[float, ...], ...]
    """The 1st, 5th, 50th, 95th and 99th of each channel."""
    constant: tuple[int, ...]
    """Channels (from 0) that hold one value everywhere, or none."""
    images: int
    """Pictures that were measured."""


def measure(table: ImageTable, channels: int, raw: bool, count: int = 512) -> Statistics:
    """What is to be subtracted from each channel and what it is to be divided by, from ``count`` pictures.

    They are evenly spread over the table; those that cannot be read are left out. Nothing is random: the same table
    gives the same numbers.

    Args:
        table: the images.
        channels: channels that training sees.
        raw: whether training sees stored values; else 0 to 255 as 0 to 1.
        count: pictures to open.

    Raises:
        UserError: none of them can be read.
    """
    summaries: list[Float64[np.ndarray, "C f"]] = []
    first = ""
    chosen = spread(len(table), count)
    for index in chosen.tolist():
        try:
            summaries.append(summary(small_picture(table, table.read(index), channels, raw)))
        except BadImage as bad:
            first = first or f"{table.path(index)!r}: {bad.reason}"
    if not summaries:
        raise UserError(f"none of {len(chosen)} images that were tried (of {len(table)}) can be read; first {first}")
    return pool(np.stack(summaries))


def spread(total: int, count: int) -> Int64[np.ndarray, " m"]:
    """At most ``count`` of ``total`` indices, evenly spread, ascending."""
    count = min(total, count)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def small_picture(table: ImageTable, content: bytes, channels: int, raw: bool) -> Float64[np.ndarray, "C s s"]:
    """A whole picture as a square of at most 64 pixels, whatever its shape; 0 to 1, or stored values.

    Raises:
        BadImage: it cannot be decoded, or has other channels.
    """
    if table.squares is not None:
        from fastmim.data.decoding.resize import resize_crop
        from fastmim.data.prepared.shards import decode_square

        pixels = decode_square(content, table.squares)
        side = table.squares.side
        pixels = resize_crop(pixels, (0.0, 0.0, float(side), float(side)), min(SIDE, side))
    else:
        image = open_image(content, channels, raw)
        whole = Box(0, 0, image.width, image.height)
        pixels = image.crop(whole, min(SIDE, max(image.width, image.height)))
    values = pixels.numpy().astype(np.float64)
    return values if raw else values / 255


def summary(values: Float64[np.ndarray, "C s s"]) -> Float64[np.ndarray, "C f"]:
    """Mean, mean square about it and 17 sorted values of each channel; NaN for a channel without finite values."""
    flat = values.reshape(len(values), -1)
    if np.isfinite(flat).all():
        return _summary(flat)
    flat = np.where(np.isfinite(flat), flat, np.nan)
    rows = [_summary(row[None, ~np.isnan(row)]) if not np.isnan(row).all() else _nothing() for row in flat]
    return np.concatenate(rows)


def pool(summaries: Float64[np.ndarray, "n C f"]) -> Statistics:
    """The statistics of all pictures from the ``summary`` of each."""
    with warnings.catch_warnings():
        # A channel that is nowhere finite: it is constant.
        warnings.filterwarnings("ignore", message="Mean of empty slice", category=RuntimeWarning)
        mean = np.nanmean(summaries[:, :, 0], axis=0)
        square = np.nanmean(summaries[:, :, 1] + (summaries[:, :, 0] - mean) ** 2, axis=0)
    mean, std = np.nan_to_num(mean), np.sqrt(np.nan_to_num(square))
    constant = std <= 1e-6 * np.abs(mean)
    levels = [_percentiles(summaries[:, channel, 2:]) for channel in range(len(mean))]
    return Statistics(
        _numbers(mean),
        _numbers(np.where(constant, 1.0, std)),
        tuple(_numbers(row) for row in levels),
        tuple(np.flatnonzero(constant).tolist()),
        len(summaries),
    )


def _summary(flat: Float64[np.ndarray, "C p"]) -> Float64[np.ndarray, "C f"]:
    mean = flat.mean(1)
    square = ((flat - mean[:, None]) ** 2).mean(1)
    nodes = np.quantile(flat, _MIDDLES, axis=1).T
    return np.concatenate([mean[:, None], square[:, None], nodes], axis=1)


def _nothing() -> Float64[np.ndarray, "1 f"]:
    return np.full((1, 2 + NODES), np.nan)


def _percentiles(nodes: Float64[np.ndarray, "n k"]) -> Float64[np.ndarray, " p"]:
    """Percentiles of all pixels, each picture given by the middles of its parts."""
    there = ~np.isnan(nodes[:, 0])
    values = nodes[there].reshape(-1)
    if not len(values):
        return np.zeros(len(PERCENTILES))
    order = np.argsort(values, kind="stable")
    weights = np.tile(_WEIGHTS, int(there.sum()))[order]
    below = np.cumsum(weights) - weights / 2
    return np.interp(np.array(PERCENTILES) / 100, below / weights.sum(), values[order])


def _numbers(values: Shaped[np.ndarray, " n"] | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
