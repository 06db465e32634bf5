# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves to read: comparison.html for people, comparison.json with all it shows, comparison.csv."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmim.comparing.measure import Measured
from fastmim.comparing.plan import said
from fastmim.comparing.verdict import MOST_POINTS, chance_of
from fastmim.report.compare import COLOURS
from fastmim.report.curves import SIDE, Chart, Line, nice_ticks, tick_label
from fastmim.report.facts import duration
from fastmim.report.page import render
from fastmim.starts import SCRATCH
from fastmim.train.checkpoint import write_file

Record = dict[str, Any]
OUTCOMES = {"helped": "helped", "hurt": "hurt", "unclear": "no difference shown"}
KINDS = {
    "scratch": "untrained weights",
    "run": "a run of fastmim",
    "released": "released weights",
    "file": "a file of weights",
}


def write_all(folder: Path, facts: Record, measured: Measured) -> None:
    """The three files, each replaced as a whole."""
    text = json.dumps(_finite(facts), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    write_file(folder / "comparison.json", text.encode("utf-8", "backslashreplace"))
    write_file(folder / "comparison.csv", _csv(measured).encode("utf-8", "backslashreplace"))
    render("compare_starts.html.j2", folder / "comparison.html", content(json.loads(text)))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(measured: Measured) -> str:
    """A row for each run."""
    text = io.StringIO()
    names = ("start", "weights", "labels", "seed", "train", "test", "steps", "seconds", "top1")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for cell, result in measured.results.items():
        row = {"start": cell.start.name, "weights": cell.start.start, "labels": cell.labels, "seed": cell.seed}
        row |= {name: result[name] for name in ("train", "test", "steps", "seconds")}
        writer.writerow({**row, "top1": result["accuracy"]["top1"]})
    return text.getvalue()


# ---- The page


def content(facts: Record) -> Record:
    """What the template shows, from comparison.json alone."""
    colours = {start["name"]: place % COLOURS for place, start in enumerate(facts["starts"])}
    return {
        "title": Path(facts["data"]).name,
        "verdict": facts["verdict"],
        "shuffled": facts["shuffled"],
        "notes": facts["notes"],
        "tiles": _tiles(facts),
        "settings": [_setting(facts, labels, colours) for labels in facts["labels"]],
        "chart": _chart(facts, colours),
        "matrices": [_matrix(facts, labels, colours) for labels in facts["labels"]],
        "counts": _counts(facts),
        "several": len(facts["seeds"]) > 1,
        "cost": [_cost_row(row, colours) for row in facts["cost"]],
        "leaks": [_leak(leak, facts["test"]) for leak in facts["leakage"]],
        "left_out": facts["left_out"],
        "leaked": _with_leaked(facts, colours),
        "same": _same(facts),
        "command": facts["command"],
    }


def _tiles(facts: Record) -> list[tuple[str, str]]:
    best = max(facts["scores"], key=lambda score: score["mean"])
    seeds = len(facts["seeds"])
    return [
        (f"best: {best['start']}, {said(best['labels'])}", f"{best['mean']:.1f} %"),
        ("by always naming the most frequent class", f"{facts['chance']:.1f} %"),
        ("test images, the same for all", f"{facts['images']:,}"),
        ("seeds, the same for all", str(seeds)),
    ]


def _setting(facts: Record, labels: str, colours: dict[str, int]) -> Record:
    """The rows of one label setting, with the places of their dots on a common scale."""
    scores = [score for score in facts["scores"] if score["labels"] == labels]
    low, high = _scale([value for score in scores for value in score["accuracies"]], facts["chance"])
    rows = []
    for score in scores:
        against = next(
            (
                one
                for one in facts["differences"]
                if (one["labels"], one["a"], one["b"]) == (labels, score["start"], SCRATCH)
            ),
            None,
        )
        rows.append(
            {
                "name": score["start"],
                "colour": colours[score["start"]],
                "mean": _mean(score),
                "interval": f"{score['low']:.1f} to {score['high']:.1f}",
                "dots": [100 * (value - low) / (high - low) for value in score["accuracies"]],
                "centre": 100 * (score["mean"] - low) / (high - low),
                "said": ", ".join(f"{value:.1f} %" for value in score["accuracies"]),
                "above": score["beats_chance"],
                "against": _difference(against) if against else None,
            }
        )
    chance = facts["chance"]
    return {
        "title": said(labels)[0].upper() + said(labels)[1:],
        "train": scores[0]["train"],
        "rows": rows,
        "ends": (f"{low:g} %", f"{high:g} %"),
        "chance": 100 * (chance - low) / (high - low) if low <= chance <= high else None,
    }


def _mean(score: Record) -> str:
    spread = f" ± {score['spread']:.1f}" if score["spread"] is not None else ""
    return f"{score['mean']:.1f}{spread} %"


def _scale(values: Sequence[float], chance: float) -> tuple[float, float]:
    """Round ends around all values; around chance too where that is near."""
    low, high = min(values), max(values)
    if low - chance < high - low + 5:
        low = min(low, chance)
    low = min(low, 99.0)  # where all are at 100 %, a scale needs two ends too
    ticks = nice_ticks(low, max(high, low + 1), 4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return max(0.0, math.floor(low / step) * step), min(100.0, math.ceil(max(high, low + 1) / step) * step)


def _difference(one: Record) -> Record:
    """A difference as the page shows it."""
    spread = f", spread {one['spread']:.1f}" if one["spread"] is not None else ""
    return {
        "points": _unsigned_zero(one["points"]),
        "shown": one["outcome"] != "unclear",
        "interval": f"{one['low']:+.1f} to {one['high']:+.1f}",
        "chance": chance_of(one["corrected"]),
        "spread": spread,
        "outcome": OUTCOMES[one["outcome"]],
    }


def _unsigned_zero(points: float) -> float:
    """0.0 for what would be written as -0.0."""
    return points if abs(points) >= 0.05 else 0.0


def _chart(facts: Record, colours: dict[str, int]) -> Chart | None:
    """Accuracy over the number of labels: a line through the means of each start, a dot for each seed.

    None with one label setting, where the table shows every dot. The horizontal axis is logarithmic.
    """
    counts = sorted({score["train"] for score in facts["scores"]})
    if len(counts) < 2:
        return None
    left, right = math.log(counts[0]), math.log(counts[-1])
    margin = 0.04 * (right - left)
    values = [value for score in facts["scores"] for value in score["accuracies"]]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    low, high = max(low - room, 0.0), high + room

    def across(count: float) -> float:
        return SIDE * (math.log(count) - left + margin) / (right - left + 2 * margin)

    def down(value: float) -> float:
        return SIDE * (high - value) / (high - low)

    lines, said_lines = [], []
    for start in facts["starts"]:
        scores = sorted(
            (score for score in facts["scores"] if score["start"] == start["name"]), key=lambda score: score["train"]
        )
        path = "M" + "L".join(f"{across(score['train']):.1f} {down(score['mean']):.1f}" for score in scores)
        dots = "".join(
            f"M{across(score['train']):.1f} {down(value):.1f}h0" for score in scores for value in score["accuracies"]
        )
        lines.append(Line(start["name"], colours[start["name"]], path, "", dots))
        said_lines.append(f"{start['name']}: from {scores[0]['mean']:.1f} to {scores[-1]['mean']:.1f} %.")
    return Chart(
        title="Accuracy, %",
        note="over the number of labelled images (logarithmic); a line through the means, a dot for each seed",
        lines=lines,
        x_ticks=[(across(count) / 10, f"{count:,}") for count in counts],
        y_ticks=[(down(tick) / 10, tick_label(tick)) for tick in nice_ticks(low, high, 5)],
        summary="Accuracy over the number of labels. " + " ".join(said_lines),
    )


def _matrix(facts: Record, labels: str, colours: dict[str, int]) -> Record:
    """Every start (row) against every other (column)."""
    names = [start["name"] for start in facts["starts"]]
    table = {(one["a"], one["b"]): one for one in facts["differences"] if one["labels"] == labels}
    rows = []
    for name in names:
        cells: list[Record | None] = []
        for other in names:
            one = table.get((name, other)) or table.get((other, name))
            if one is None:
                cells.append(None)
                continue
            points = one["points"] if (name, other) in table else -one["points"]
            cells.append({**_difference(one), "points": _unsigned_zero(points)})
        rows.append({"name": name, "colour": colours[name], "cells": cells})
    needed = max(math.inf if one["detectable"] is None else one["detectable"] for one in table.values())
    if needed < MOST_POINTS:
        power = (
            f"True differences of {needed:.1f} points or more would have been shown, each four times out of five; "
            "smaller ones may be there unseen."
        )
    else:
        power = "With so few seeds, of such a spread, some of these differences could not have been shown at any size."
    return {
        "title": said(labels)[0].upper() + said(labels)[1:],
        "names": [{"name": name, "colour": colours[name]} for name in names],
        "rows": rows,
        "detectable": power,
    }


def _counts(facts: Record) -> tuple[int, int]:
    """Differences from untrained weights, and others."""
    first = sum(one["b"] == SCRATCH for one in facts["differences"])
    return first, len(facts["differences"]) - first


def _cost_row(row: Record, colours: dict[str, int]) -> Record:
    def time(seconds: float | None) -> str:
        return "not known" if seconds is None else "none" if seconds == 0 else duration(seconds)

    return {
        "name": row["start"],
        "colour": colours[row["start"]],
        "steps": f"{row['steps']:,}",
        "finetune": time(row["finetune_seconds"]),
        "pretrain": time(row["pretrain_seconds"]),
        "total": time(row["total_seconds"]),
    }


def _leak(leak: Record, test: int) -> Record:
    exact, near = len(leak["exact"]), len(leak["near"])
    if not leak["checked"]:
        text = f"not checked: {leak['note']}"
    else:
        found = f"{exact:,} the same byte for byte, {near:,} the same to the eye" if exact + near else "none"
        share = f" ({(exact + near) / test:.2%} of the test images)" if exact + near else ""
        plain = f"; {leak['plain']:,} test images are too plain to be told apart by the eye" if leak["plain"] else ""
        text = f"{found}{share}, among {leak['images']:,} images{plain}"
        text += f"; {leak['note']}" if leak["note"] else ""
    return {"of": leak["of"], "text": text, "bad": exact + near > 0, "examples": leak["examples"]}


def _with_leaked(facts: Record, colours: dict[str, int]) -> list[Record]:
    """Means with and without the leaked test images, where there are any."""
    rows = []
    for clean, every in zip(facts["scores"], facts.get("with_leaked_scores", ()), strict=False):
        row = {"name": clean["start"], "colour": colours[clean["start"]], "labels": said(clean["labels"])}
        rows.append({**row, "clean": _mean(clean), "every": _mean(every)})
    return rows


def _same(facts: Record) -> list[tuple[str, str]]:
    """What was the same for all runs, as names and values."""
    words = {name.replace("_", " "): str(value) for name, value in facts["words"].items()}
    labels = ", ".join(said(labels) for labels in facts["labels"])
    return [
        ("images", facts["data"]),
        ("classes", f"{len(facts['classes']):,}"),
        ("network", facts["network"]),
        ("labels", f"{labels}; with each seed the same ones for every start"),
        ("seeds", ", ".join(str(seed) for seed in facts["seeds"])),
        *words.items(),
        *((start["name"], f"{KINDS[start['kind']]}: {start['start']}") for start in facts["starts"]),
    ]
