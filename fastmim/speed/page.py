# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves behind: a table to read, a CSV to compute with, a picture to show."""

import csv
import dataclasses
from collections.abc import Iterator, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmim.report.facts import duration
from fastmim.speed.rows import PEAK, Bench, Row

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
OURS, BASELINE, OTHERS = "#0072B2", "#D55E00", "#999999"
_INK, _PALE = "#222222", "#666666"
# Recipes that are FastMIM or a variant of it.
_FAMILY = ("fastmim", "fastmim_p", "compact", "disjoint")


def lines(bench: Bench) -> Iterator[str]:
    """The tables as text: what was measured, then how long runs would take."""
    facts, rows = bench.facts, bench.rows
    yield f"{facts['model']}, {_settings(bench)}, torch {facts['torch']}"
    yield ""
    views = any(row.views_per_s != row.images_per_s for row in rows)
    heads = ["method", "px", "images/s", "ratio", "spread", "ms/image", *(["views/s"] if views else [])]
    heads += ["GMAC/image", "of matrix product", "memory"]
    yield from table(heads, [_cells(row, views) for row in rows])
    yield ""
    yield f"ratio: to {bench.baseline}. spread: of the rounds. memory: {facts['memory']}, of a batch."
    yield f"A matrix product reaches {facts['matrix_tflops']} TFLOP/s here."
    yield ""
    heads = [f"time for {bench.images:,} images", "px", "", "own epochs"]
    heads += [f"{bench.epochs:g} epochs"] if bench.epochs is not None else []
    fed = any(row.feed_images_per_s is not None for row in rows)
    yield from table([*heads, *(["loader", "limited by"] if fed else [])], [_times(row, fed) for row in rows])
    if bench.remedy:
        yield f"\nimages come faster with {bench.remedy}"
    if bench.left_out:
        yield ""
    for label, reason in bench.left_out.items():
        yield f"left out: {label}: {reason}"


def _cells(row: Row, views: bool) -> list[str]:
    cells = [
        row.method,
        row.px,
        number(row.images_per_s),
        f"{row.ratio:.2f}x",
        f"{row.spread:.0%}",
        number(row.ms_per_image),
    ]
    cells += [number(row.views_per_s)] if views else []
    return [*cells, number(row.gmac_per_image), f"{row.share:.0%}", f"{row.memory_mb:,.0f} MB"]


def _times(row: Row, fed: bool) -> list[str]:
    cells = [row.method, row.px, f"{row.epochs:g}:", duration(row.run_s)]
    cells += [duration(row.asked_s)] if row.asked_s is not None else []
    if not fed:
        return cells
    if row.feed_images_per_s is None:
        return [*cells, "-", "(stored squares are too small)"]
    return [*cells, f"{number(row.feed_images_per_s)} images/s", "images" if row.waits else "network"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_csv(bench: Bench) -> None:
    """bench.csv: a row for each method, with the machine's facts; those left out with their reasons."""
    fields = [field.name for field in dataclasses.fields(Row)]
    with (bench.folder / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*fields, "baseline", "images", "reason", *bench.facts])
        writer.writeheader()
        common = {"baseline": bench.baseline, "images": bench.images, **bench.facts}
        for row in bench.rows:
            values = dataclasses.asdict(row)
            short = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in values.items()}
            writer.writerow({**short, **common})
        for label, reason in bench.left_out.items():
            method, _, px = label.rpartition(" ")
            writer.writerow({"method": method, "px": px, "reason": reason, **common})


def write_picture(bench: Bench) -> None:
    """bench.png: images per second as bars, fastest on top, each with its number and its ratio; 1000 px wide."""
    rows, facts = bench.rows[::-1], bench.facts
    height = 1.25 + 0.36 * len(rows)
    figure = Figure(figsize=(10, height), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.29, 0.35 / height, 0.69, 1 - 1.2 / height))
    speeds = [row.images_per_s for row in rows]
    axes.barh(range(len(rows)), speeds, height=0.72, color=[_colour(row, bench) for row in rows])
    for place, row in enumerate(rows):
        text = (
            f" {number(row.images_per_s)}  ({row.ratio:.2f}x)"
            if row.label != bench.baseline
            else f" {number(row.images_per_s)}"
        )
        axes.text(row.images_per_s, place, text, va="center", fontsize=10, color=_INK)
    axes.set_yticks(range(len(rows)), [f"{row.method}  {row.px} px" for row in rows], fontsize=10, color=_INK)
    axes.set_xlim(0, 1.16 * max(speeds))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(length=0)
    axes.set_xticks([])
    kinds = {_colour(row, bench) for row in rows}
    names = {OURS: "FastMIM and its variants", BASELINE: "baseline", OTHERS: "other methods"}
    for line, colour in enumerate(colour for colour in (OTHERS, BASELINE, OURS) if colour in kinds):
        axes.text(
            1.1 * max(speeds), line * 0.62 - 0.3, names[colour], color=colour, ha="right", fontsize=10, weight="bold"
        )
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_PALE)
    figure.text(0.015, 1 - 0.32 / height, f"Pre-training {facts['model']}: images per second", fontsize=14, color=_INK)
    said = f"whole training steps, {_settings(bench)}; ratio to {bench.baseline} px"
    figure.text(0.015, 1 - 0.62 / height, said, fontsize=10, color=_PALE)
    figure.savefig(bench.folder / "bench.png")


def _settings(bench: Bench) -> str:
    facts = bench.facts
    compiled = ", compiled" if facts["compile"] == "true" else ""
    threads = "" if facts["memory"] == PEAK else f", {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return f"batches of {facts['batch']}, {facts['precision']}{compiled}, {facts['device']}{threads}"


def _colour(row: Row, bench: Bench) -> str:
    if row.label == bench.baseline:
        return BASELINE
    return OURS if row.method.split("+")[0] in _FAMILY else OTHERS
