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
from fastmim.report.curves import Chart, Series, draw_chart, is_number, read_series, tick_label
from fastmim.report.folder import USES, RunFolder, read_run

SHOWN_BAD = 10
COLOURS = 8
# Losses of runs that differ in one of these measure different things.
SCALE_OF_LOSS = {
    *("target", "cell", "scales", "loss", "mask_ratio", "masking", "predict_ratio", "block", "resolution", "phases"),
    *("crop_scale", "mean", "std", "paths"),
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """One HTML file about a run, from nothing but its folder; what the folder lacks is named in the page.

    Args:
        run: the run folder.
        out: the file to write; ``report.html`` in the run folder when not given.

    Raises:
        UserError: ``run`` is not a run folder, or a file in it is damaged.
    """
    folder = read_run(run)
    return _write("page.html.j2", out or run / "report.html", _report(folder))


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """One HTML file about several runs: the options that differ, the results, and the curves on top of each other.

    Raises:
        UserError: fewer than two runs, or one of them is not a run folder.
    """
    if len(runs) < 2:
        raise UserError(f"a comparison needs two runs or more, but got {len(runs)}")
    return _write("compare.html.j2", out, _comparison([read_run(run) for run in runs]))


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
    shown, chart, speed = run.reconstruction, _speed_charts(run), facts.speed(run)
    data = (config or Config()).data
    command = facts.shell_word(str(run.path.resolve()))
    return {
        "title": run.config.method.model if run.config else run.path.resolve().name,
        "subtitle": f"pre-trained on {facts.dataset_name(run.config)}" if facts.dataset_name(run.config) else "",
        "lead": facts.lead(run),
        "unfinished": facts.unfinished(run),
        "not_finite": facts.not_finite(run),
        "readings": len(run.train),
        "verdict": probe["verdict"] if probe else "",
        "tiles": _tiles(run, found),
        "facts": facts.key_facts(run),
        "charts": _training_charts(run),
        "speed_text": _speed_text(speed) if speed else "",
        "waiting": facts.waiting_hint(speed[1]) if speed else "",
        "speed_charts": chart,
        "kind": shown.kind if shown else "",
        "samples": figures.reconstruction_rows(shown, *_colours(data)) if shown else [],
        "methods": verdict.by_method(found),
        "setting": verdict.setting(probe) if probe else "",
        "chance": 100 / probe["classes"] if probe else 0.0,
        "shortfalls": verdict.shortfalls(found),
        "neighbours": figures.neighbour_rows(run.neighbours) if run.neighbours else [],
        "bad": run.bad,
        "shown_bad": SHOWN_BAD,
        "snippet": facts.load_snippet(run.path) if run.parameters else "",
        "resume": f"fastmim resume {command}" if config and not facts.finished(run) else "",
        "command": facts.rerun_command(config) if config else "",
        "environment": list(facts.flat(run.environment)),
        "missing": [(name, USES[name]) for name in run.missing],
    }


def _colours(data: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the three colours that pictures of pixels are drawn in (tasks/pretrain.py: viewable)."""
    if data.channels == 3 and data.values == "8bit" and data.mean and data.std:
        return data.mean, data.std
    return (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _tiles(run: RunFolder, found: Sequence[verdict.Comparison]) -> list[tuple[str, str]]:
    rows = []
    for one in verdict.most_labels(found):
        trained, untrained = one.row("trained"), one.row("untrained")
        if trained and untrained:
            change = f"{untrained.mean:.1f} \N{RIGHTWARDS ARROW} {trained.mean:.1f} %"
            rows.append((f"{one.title}, untrained to pre-trained", change))
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


def _speed_charts(run: RunFolder) -> list[Chart]:
    rate = read_series(run.train, "images_per_s", "images a second", 4, smooth=True)
    wait = read_series(run.train, "data_wait", "waiting", 1, smooth=True, scale=100)
    charts = [
        draw_chart("Images a second", "", [rate], from_zero=True),
        draw_chart("Time waiting for images, %", "", [wait], from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _speed_text(speed: tuple[float, float]) -> str:
    return (
        f"{speed[0]:,.0f} images a second (median), with {100 * speed[1]:.1f} % of the time spent waiting for images."
    )


def _comparison(runs: list[RunFolder]) -> dict[str, Any]:
    names = _names([run.path for run in runs])
    colours = [index % COLOURS for index in range(len(runs))]
    options = _differences([run.config for run in runs])
    columns = ["State", "Samples seen", "Loss", "Held-out loss", "kNN, %", "Linear, %", "Images/s", "Time"]
    rows = [_results(run) for run in runs]
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    differing = sorted({name for name, _ in options} & SCALE_OF_LOSS)
    caution = (
        f"The losses of these runs cannot be compared with each other, because they differ in {', '.join(differing)}."
    )
    return {
        "title": " and ".join(names) if len(runs) == 2 else f"{len(runs)} runs compared",
        "lead": f"{len(runs)} runs, which differ in {len(options)} option{'s' if len(options) != 1 else ''}.",
        "caution": caution if differing else "",
        "columns": [columns[index] for index in kept],
        "runs": [
            {"name": name, "colour": colour, "results": [row[index] or "-" for index in kept]}
            for name, colour, row in zip(names, colours, rows, strict=True)
        ],
        "probed": any(run.probe for run in runs),
        "options": options,
        "charts": _comparison_charts(runs, names, colours),
        "missing": [(name, ", ".join(run.missing)) for name, run in zip(names, runs, strict=True) if run.missing],
    }


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(len(part) for part in parts) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def _differences(configs: list[Config | None]) -> list[tuple[str, list[str]]]:
    """Name and values of each option that is not the same in all configs that are known."""
    rows = []
    for section, schema in Config.model_fields.items():
        for name in type(schema.default).model_fields:
            chosen = [getattr(getattr(config, section), name) if config else None for config in configs]
            known = [value for value, config in zip(chosen, configs, strict=True) if config]
            if name not in facts.PLACE and any(value != known[0] for value in known):
                rows.append((name, [_option(value) for value in chosen]))
    return rows


def _option(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _results(run: RunFolder) -> list[str]:
    most = verdict.most_labels(verdict.comparisons(run.probe)) if run.probe else []
    found = {one.method: one for one in most}
    seen, loss, held_out = facts.samples_seen(run), facts.last(run.train, "loss"), facts.last(run.evals, "val_loss")
    speed, seconds = facts.speed(run), facts.seconds_spent(run)
    return [
        str(run.status.get("state", "")),
        f"{seen:,.0f}" if seen else "",
        f"{loss:.4g}" if loss is not None else "",
        f"{held_out:.4g}" if held_out is not None else "",
        _accuracy(found.get("knn"), run, "knn"),
        _accuracy(found.get("linear"), run, "linear"),
        f"{speed[0]:,.0f}" if speed else "",
        facts.duration(seconds) if seconds else "",
    ]


def _accuracy(found: verdict.Comparison | None, run: RunFolder, method: str) -> str:
    trained = found.row("trained") if found else None
    if found and trained:
        gain = found.gain()
        return trained.text.removesuffix(" %") + (f" ({gain:+.1f})" if gain is not None else "")
    on_the_way = facts.last(run.evals, method)
    return f"{on_the_way:.1f}" if is_number(on_the_way) else ""


def _comparison_charts(runs: list[RunFolder], names: list[str], colours: list[int]) -> list[Chart]:
    def all_runs(kind: str, key: str, smooth: bool = False) -> list[Series]:
        return [
            read_series(getattr(run, kind), key, name, colour, smooth)
            for run, name, colour in zip(runs, names, colours, strict=True)
        ]

    charts = [
        draw_chart("Training loss", "pale: single readings", all_runs("train", "loss", smooth=True), from_start=False),
        draw_chart("Loss on held-out images", "", all_runs("evals", "val_loss"), from_start=False),
        draw_chart("kNN accuracy, %", "", all_runs("evals", "knn")),
        draw_chart("Linear accuracy, %", "", all_runs("evals", "linear")),
        draw_chart("Effective rank", "", all_runs("evals", "effective_rank")),
    ]
    return [chart for chart in charts if chart]
