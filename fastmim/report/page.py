# SPDX-License-Identifier: Apache-2.0
"""The report of one run, and of several runs side by side: one HTML file without scripts and without network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastmim.config import Config, DataConfig
from fastmim.errors import UserError
from fastmim.report import facts, figures, verdict
from fastmim.report.compare import comparison
from fastmim.report.curves import Chart, draw_chart, read_series, tick_label
from fastmim.report.folder import RunFolder, TransferFolder, read_run
from fastmim.report.parts import common_parts
from fastmim.report.transfer import transfer_report


def write_report(run: Path, out: Path | None = None) -> Path:
    """One HTML file about a run, from nothing but its folder; what the folder lacks is named in the page.

    Args:
        run: the run folder.
        out: the file to write; ``report.html`` in the run folder when not given.

    Raises:
        UserError: ``run`` is not a run folder, or a file in it is damaged.
    """
    folder = read_run(run)
    out = out or run / "report.html"
    if isinstance(folder, TransferFolder):
        return _write("transfer.html.j2", out, transfer_report(folder))
    return _write("page.html.j2", out, _report(folder))


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """One HTML file about several runs: the options that differ, the results, and the curves on top of each other.

    Raises:
        UserError: fewer than two runs, runs of which only some learnt from labels, or a folder that holds no run.
    """
    if len(runs) < 2:
        raise UserError(f"a comparison needs two runs or more, but got {len(runs)}")
    return _write("compare.html.j2", out, comparison([read_run(run) for run in runs]))


def _write(template: str, out: Path, content: dict[str, Any]) -> Path:
    pages = Environment(
        loader=PackageLoader("fastmim.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template(template).render(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _readable(value: object) -> object:
    """Writes what a screen cannot show, or shows as something else, as an escape: file names can hold anything."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in value
    )


def _report(run: RunFolder) -> dict[str, Any]:
    config, probe = run.config, run.probe
    found = verdict.comparisons(probe) if probe else []
    shown, data = run.reconstruction, (config or Config()).data
    name = facts.dataset_name(data.paths)
    return {
        **common_parts(run),
        "title": run.config.method.model if run.config else run.path.resolve().name,
        "subtitle": f"pre-trained on {name}" if name else "",
        "lead": facts.lead(run),
        "verdict": probe["verdict"] if probe else "",
        "tiles": _tiles(run, found),
        "facts": facts.key_facts(run),
        "charts": _training_charts(run),
        "kind": shown.kind if shown else "",
        "samples": figures.reconstruction_rows(shown, *_colours(data)) if shown else [],
        "comparisons": found,
        "setting": verdict.setting(probe) if probe else "",
        "chance": 100 / probe["classes"] if probe else 0.0,
        "shortfalls": verdict.shortfalls(found),
        "neighbours": figures.neighbour_rows(run.neighbours) if run.neighbours else [],
        "snippet": facts.load_snippet(run.path) if run.parameters else "",
        "command": facts.rerun_command(config) if config else "",
    }


def _colours(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the three colours that pictures of pixels are drawn in (tasks/pretrain.py: viewable)."""
    if data.channels == 3 and data.values == "8bit" and data.mean and data.std:
        return data.mean, data.std
    return (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _tiles(run: RunFolder, found: Sequence[verdict.Comparison]) -> list[tuple[str, str]]:
    rows = []
    for one in found:
        trained, untrained = one.row("trained"), one.row("untrained")
        if trained and untrained:
            change = f"{untrained.mean:.1f} \N{RIGHTWARDS ARROW} {trained.mean:.1f} %"
            rows.append((f"{one.label}, untrained to pre-trained", change))
    losses, seconds, speed = facts.values(run.evals, "val_loss"), facts.seconds_spent(run), facts.speed(run)
    if losses:
        rows.append((f"loss on held-out images, from {losses[0]:.3g}", f"{losses[-1]:.3g}"))
    if seconds:
        rows.append(
            ("of training" + (f", at {speed[0]:,.0f} images a second" if speed else ""), facts.duration(seconds))
        )
    return rows


def _training_charts(run: RunFolder) -> list[Chart]:
    train, evals = run.train, run.evals
    loss = [
        read_series(train, "loss", "training", colour=0, smooth=True),
        read_series(evals, "val_loss", "held-out images", colour=1),
    ]
    accuracy = [read_series(evals, "knn", "kNN", colour=2), read_series(evals, "linear", "linear probe", colour=3)]
    rank, rate = read_series(evals, "effective_rank", "effective rank", 4), read_series(train, "lr", "learning rate", 7)
    charts = [
        draw_chart("Loss", "pale: single readings" + _growth(run), loss, from_start=False),
        draw_chart("Accuracy on the way, %", "", accuracy),
        draw_chart("Effective rank", "near 1 means that the features collapsed", [rank]),
        draw_chart("Learning rate", "", [rate], from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _growth(run: RunFolder) -> str:
    """Where the images changed their size, in a few words; empty where they did not."""
    course = run.config.data.course if run.config else ()
    begun = {record["phase"]: record["samples"] for record in reversed(run.train) if record.get("phase")}
    changes = [f"{course[phase][0]} px from {tick_label(begun[phase])} samples on" for phase in sorted(begun)]
    return "".join(f"; {change}" for change in changes)
