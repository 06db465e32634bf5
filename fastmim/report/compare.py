# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: the options that differ, the results, and the curves on top of each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmim.config import RunConfig, Section
from fastmim.errors import UserError
from fastmim.report import facts, verdict
from fastmim.report.curves import Chart, Series, draw_chart, is_number, read_series
from fastmim.report.folder import Folder, RunFolder, TransferFolder

COLOURS = 8
# Losses of runs that differ in one of these measure different things.
SCALE_OF_LOSS = {
    *("target", "cell", "scales", "loss", "mask_ratio", "masking", "predict_ratio", "block", "resolution", "phases"),
    *("crop_scale", "mean", "std", "paths"),
}
# Accuracies of runs that differ in one of these are of different images.
TEST_IMAGES = {"path", "label_seed", "test_share", "folds", "fold"}


def comparison(runs: Sequence[RunFolder | TransferFolder]) -> dict[str, Any]:
    """What compare.html.j2 shows of several runs of one kind; a fine-tuned and a distilled run are of one.

    Raises:
        UserError: some runs are of pre-training and some learnt from labels.
    """
    if len({isinstance(run, TransferFolder) for run in runs}) > 1:
        labelled = next(run.path for run in runs if isinstance(run, TransferFolder))
        other = next(run.path for run in runs if not isinstance(run, TransferFolder))
        raise UserError(f"{other} is a pre-training run, but {labelled} learnt from labels; compare runs of one kind")
    names = _names([run.path for run in runs])
    colours = [index % COLOURS for index in range(len(runs))]
    options = _differences([run.config for run in runs])
    rows = [_results(run) for run in runs]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return {
        "title": " and ".join(names) if len(runs) == 2 else f"{len(runs)} runs compared",
        "lead": f"{len(runs)} runs, which differ in {len(options)} option{'s' if len(options) != 1 else ''}.",
        "caution": _caution(runs, {name for name, _ in options}),
        "columns": columns,
        "runs": [
            {"name": name, "colour": colour, "results": [row[column] or "-" for column in columns]}
            for name, colour, row in zip(names, colours, rows, strict=True)
        ],
        "how": _how(runs),
        "options": options,
        "charts": _charts(runs, names, colours),
        "missing": [(name, ", ".join(run.missing)) for name, run in zip(names, runs, strict=True) if run.missing],
    }


def _caution(runs: Sequence[Folder], differing: set[str]) -> str:
    """What cannot be compared; empty where all can."""
    if isinstance(runs[0], TransferFolder):
        what, reasons = "accuracies", differing & TEST_IMAGES
    else:
        what, reasons = "losses", differing & SCALE_OF_LOSS
    if not reasons:
        return ""
    why = ", ".join(sorted(reasons))
    return f"The {what} of these runs cannot be compared with each other, because they differ in {why}."


def _how(runs: Sequence[Folder]) -> str:
    """How to read the accuracies."""
    if any(isinstance(run, TransferFolder) and run.outcome for run in runs):
        return (
            "In brackets the 95 % interval of the accuracy, which comes from the number of test images alone: another "
            "seed would change it too. Two runs on the same test images can differ clearly although their intervals "
            "overlap."
        )
    if any(isinstance(run, RunFolder) and run.probe for run in runs):
        return (
            "Accuracies are mean and standard deviation over subsets of labels, where there are several shares of the "
            "labels with the largest; in brackets the gain over the untrained network in points of per cent."
        )
    return ""


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    return facts.shortest_ends([path.resolve().parts for path in paths]) or [str(path) for path in paths]


def _differences(configs: Sequence[RunConfig | None]) -> list[tuple[str, list[str]]]:
    """Name and values of each option that is not the same in all configs that are known."""
    known = [config for config in configs if config]
    places = {
        (section, name): None
        for config in known
        for section, group in config
        if isinstance(group, Section)
        for name in type(group).model_fields
    }
    rows = []
    for section, name in places:
        chosen = [getattr(getattr(config, section), name, None) if config else None for config in configs]
        values = [value for value, config in zip(chosen, configs, strict=True) if config]
        if name not in facts.PLACE and any(value != values[0] for value in values):
            rows.append((name, [_option(value) for value in chosen]))
    return rows


def _option(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _results(run: RunFolder | TransferFolder) -> dict[str, str]:
    """Column and cell; what is not known is empty."""
    seen, speed, seconds = facts.samples_seen(run), facts.speed(run), facts.seconds_spent(run)
    measured = _labelled_results(run) if isinstance(run, TransferFolder) else _pretraining_results(run)
    return {
        "State": str(run.status.get("state", "")),
        "Samples seen": f"{seen:,.0f}" if seen else "",
        **measured,
        "Images/s": f"{speed[0]:,.0f}" if speed else "",
        "Time": facts.duration(seconds) if seconds else "",
    }


def _pretraining_results(run: RunFolder) -> dict[str, str]:
    most = verdict.most_labels(verdict.comparisons(run.probe)) if run.probe else []
    found = {one.method: one for one in most}
    loss, held_out = facts.last(run.train, "loss"), facts.last(run.evals, "val_loss")
    return {
        "Loss": f"{loss:.4g}" if loss is not None else "",
        "Held-out loss": f"{held_out:.4g}" if held_out is not None else "",
        "kNN, %": _accuracy(found.get("knn"), run, "knn"),
        "Linear, %": _accuracy(found.get("linear"), run, "linear"),
    }


def _labelled_results(run: TransferFolder) -> dict[str, str]:
    found = run.outcome
    if not found:
        return dict.fromkeys(("Accuracy, %", "Balanced, %", "Macro F1, %", "Log loss", "Calibration error, %"), "")
    rates = found["accuracy"]
    return {
        "Accuracy, %": f"{rates['top1']:.1f} ({rates['low']:.1f} to {rates['high']:.1f})",
        "Balanced, %": f"{rates['balanced']:.1f}",
        "Macro F1, %": f"{rates['macro_f1']:.1f}",
        "Log loss": f"{found['nll']:.3g}",
        "Calibration error, %": f"{found['ece']:.1f}",
    }


def _accuracy(found: verdict.Comparison | None, run: RunFolder, method: str) -> str:
    trained = found.row("trained") if found else None
    if found and trained:
        gain = found.gain()
        return trained.text.removesuffix(" %") + (f" ({gain:+.1f})" if gain is not None else "")
    on_the_way = facts.last(run.evals, method)
    return f"{on_the_way:.1f}" if is_number(on_the_way) else ""


def _charts(runs: Sequence[Folder], names: Sequence[str], colours: Sequence[int]) -> list[Chart]:
    def all_runs(kind: str, key: str, smooth: bool = False) -> list[Series]:
        return [
            read_series(getattr(run, kind), key, name, colour, smooth)
            for run, name, colour in zip(runs, names, colours, strict=True)
        ]

    held_out = "unseen images" if isinstance(runs[0], TransferFolder) else "held-out images"
    charts = [
        draw_chart("Training loss", "pale: single readings", all_runs("train", "loss", smooth=True), from_start=False),
        draw_chart(f"Loss on {held_out}", "", all_runs("evals", "val_loss"), from_start=False),
        draw_chart("Accuracy on the way, %", "", all_runs("evals", "accuracy")),
        draw_chart("kNN accuracy, %", "", all_runs("evals", "knn")),
        draw_chart("Linear accuracy, %", "", all_runs("evals", "linear")),
        draw_chart("Effective rank", "", all_runs("evals", "effective_rank")),
    ]
    return [chart for chart in charts if chart]
