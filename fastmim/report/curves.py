# SPDX-License-Identifier: Apache-2.0
"""Curves as SVG paths in a square of 1000 x 1000, which the page stretches to any width; labels stay HTML text.

Colours, stroke widths and fonts are CSS, so that curves follow the reader's colour scheme and screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

Values = Float[np.ndarray, " n"]

SIDE = 1000.0
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """Numbers over samples seen; ``smooth`` draws a moving average in front of the numbers themselves."""

    label: str
    samples: Values
    values: Values
    colour: int = 0
    smooth: bool = False


@dataclass(frozen=True)
class Line:
    """What the page draws of a series: a path, the pale raw path behind it, dots where there are few readings."""

    label: str
    colour: int
    path: str
    raw: str
    dots: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ticks are (per cent from the left or top, label)."""

    title: str
    note: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str


def read_series(
    records: Sequence[dict[str, Any]], key: str, label: str, colour: int = 0, smooth: bool = False, scale: float = 1.0
) -> Series:
    """One number of the metrics over samples seen; readings that are absent or not finite are left out."""
    pairs = [(record["samples"], record[key] * scale) for record in records if is_number(record.get(key))]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Series(label, table[:, 0], table[:, 1], colour, smooth)


def is_number(value: object) -> bool:
    """A finite number: JSON may hold null and NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def draw_chart(
    title: str, note: str, series: Sequence[Series], from_zero: bool = False, from_start: bool = True
) -> Chart | None:
    """The chart of all series that have readings, or None when none has.

    Args:
        title: what is shown.
        note: how to read it, in a few words; may be empty.
        series: in the order of the legend.
        from_zero: let the vertical axis begin at 0.
        from_start: let the vertical axis hold the first twentieth of the run too. An untrained network's loss is ten
            times the trained one's, and would press the rest flat; without it, the curve enters from above.
    """
    filled = [one for one in series if len(one.values)]
    if not filled:
        return None
    # A little room, or the last dot would be cut in half.
    right = 1.012 * max(float(one.samples.max()) for one in filled) or 1.0
    held = filled if from_start else [_after(one, 0.05 * right) for one in filled]
    low, high = _range(held, from_zero)
    return Chart(
        title=title,
        note=note,
        lines=[_line(one, right, low, high) for one in filled],
        x_ticks=[(100 * tick / right, tick_label(tick)) for tick in nice_ticks(0, right, 5)],
        y_ticks=[(100 * (high - tick) / (high - low), tick_label(tick)) for tick in nice_ticks(low, high, 5)],
        summary=f"{title} over samples seen. " + " ".join(_describe(one) for one in filled),
    )


def smoothed(values: Values) -> Values:
    """A centred moving average over about a thirtieth of the readings; shorter at the ends, so that nothing lags."""
    half = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    # The same reach on both sides, or the ends of a falling curve would be pulled inwards.
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A short number: 250 k, 1.5 M, 0.05, 2e-5."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g} {unit}"
    return f"{value:.4g}".replace("e-0", "e-")


def _after(series: Series, samples: float) -> Series:
    """The series without its first readings, as long as two are left."""
    late = series.samples >= samples
    if late.sum() < 2:
        return series
    return replace(series, samples=series.samples[late], values=series.values[late])


def _range(series: Sequence[Series], from_zero: bool) -> tuple[float, float]:
    # The first readings and single spikes would press the rest of a noisy curve flat: they may leave the frame.
    lows = [np.quantile(one.values, 0.002) if one.smooth else one.values.min() for one in series]
    highs = [np.quantile(one.values, 0.99) if one.smooth else one.values.max() for one in series]
    low, high = float(min(lows)), float(max(highs))
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0, max(high, 0.0) + margin) if from_zero else (low - margin, high + margin)


def _line(series: Series, right: float, low: float, high: float) -> Line:
    def path(samples: Values, values: Values) -> str:
        across = np.clip(samples / right * SIDE, 0, SIDE)
        # Far outside the frame is as good as just outside, and keeps the numbers short.
        down = np.clip((high - values) / (high - low) * SIDE, -SIDE, 2 * SIDE)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across, down, strict=True))

    few = len(series.values) <= 40 and not series.smooth
    front = smoothed(series.values) if series.smooth else series.values
    chosen = np.unique(np.linspace(0, len(front) - 1, MOST_POINTS).round().astype(int))
    spikes = _envelope(series.values)
    return Line(
        label=series.label,
        colour=series.colour,
        path=path(series.samples[chosen], front[chosen]),
        raw=path(series.samples[spikes], series.values[spikes]) if series.smooth else "",
        dots=path(series.samples, series.values).replace("L", "h0M") + "h0" if few else "",
    )


def _envelope(values: Values) -> Int64[np.ndarray, " kept"]:
    """Where the smallest and the largest value of each of at most ``MOST_POINTS / 2`` stretches are: spikes stay."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    kept = {int(stretch[find(values[stretch])]) for stretch in stretches for find in (np.argmin, np.argmax)}
    return np.array(sorted(kept))


def _describe(series: Series) -> str:
    front = smoothed(series.values) if series.smooth else series.values
    return f"{series.label}: from {front[0]:.3g} to {front[-1]:.3g}."
