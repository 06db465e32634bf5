# SPDX-License-Identifier: Apache-2.0
"""The same labels for every kind of features, and what the numbers say in a sentence.

The same label subsets are given to the pre-trained network, to the same network before pre-training and to raw pixels,
so that a difference between the rows is the difference of the features. Nothing is ever chosen on the validation part.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fastmim.errors import UserError
from fastmim.evidence import clear, of_labels
from fastmim.seeding import derive
from fastmim.tasks.probing.methods import METHODS, Features, Options
from fastmim.tasks.probing.settings import Settings
from fastmim.tasks.probing.subsets import label_subsets

Row = dict[str, Any]


def compare(
    entries: Iterable[tuple[str, Features, Features]],
    settings: Settings,
    *,
    device: torch.device | None = None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The ``rows`` and the ``summary`` of probe.json: every entry on the same subsets of the labels.

    Args:
        entries: name ("trained", "untrained", "pixels") and features of the training and of the validation images, of
            the same images in each; one after the other, so that the tokens of one only need be in memory. Methods
            that read tokens leave out entries without.
        settings: methods, labels and repeats.
        device: where to train what is trained step by step.
        done: called after each measurement.

    Returns:
        The summary is in percent: the mean over the repeats and the standard deviation (of a sample).

    Raises:
        UserError: a setting takes every label: it could show no spread.
    """
    rows: list[Row] = []
    for name, train, val in entries:
        methods = [
            method for method in settings.methods if train.tokens is not None or not METHODS[method].reads_tokens
        ]
        for setting in settings.labels:
            for number, subset in enumerate(label_subsets(train.labels, setting, settings.repeats, settings.seed)):
                if len(subset) == len(train.labels):
                    raise UserError(
                        f"labels = {setting.name} takes all {len(subset)} images to learn from, and only different "
                        "subsets show a spread; ask for fewer"
                    )
                part = train.take(subset)
                options = Options(derive(settings.seed, "probe", number), settings.k, device)
                for method in methods:
                    row = {"labels_setting": setting.name, "weights": name, "method": method, "subset": number}
                    row |= {"labels": len(subset), "accuracy": METHODS[method].measure(part, val, options)}
                    rows.append(row)
                    done()
        del train, val  # before the next entry is computed
    return {"rows": rows, "summary": _summary(rows, settings)}


def _summary(rows: list[Row], settings: Settings) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for setting in settings.labels:
        for method in settings.methods:
            mine = [row for row in rows if (row["labels_setting"], row["method"]) == (setting.name, method)]
            scores = {name: _scores(mine, name) for name in dict.fromkeys(row["weights"] for row in mine)}
            summary.setdefault(setting.name, {})[method] = {
                name: [statistics.fmean(values), statistics.stdev(values)] for name, values in scores.items()
            }
    return summary


def _scores(rows: Iterable[Row], weights: str) -> list[float]:
    return [row["accuracy"] for row in rows if row["weights"] == weights]


def verdict(comparison: Mapping[str, Any]) -> str:
    """A plain sentence for each setting of the labels, from the rows and the summary of ``compare``.

    A method speaks for pre-training when the pre-trained network is clearly better than the untrained one
    (`fastmim.evidence.clear`), and against it when it is clearly worse.
    """
    summary: Mapping[str, Any] = comparison["summary"]
    if not any("trained" in accuracies for methods in summary.values() for accuracies in methods.values()):
        return "No pre-trained network was given, so there is nothing to say about pre-training."
    rows = comparison["rows"]
    if len(summary) == 1:
        ((setting, methods),) = summary.items()
        return _in_full(_outcomes(rows, methods, setting), methods)
    return " ".join(
        f"With {of_labels(setting)}, {_briefly(_outcomes(rows, methods, setting), methods)}"
        for setting, methods in summary.items()
    )


def _outcomes(rows: Iterable[Row], summary: Mapping[str, Any], setting: str) -> dict[str, list[str]]:
    """The methods by what they say of pre-training in one setting."""
    groups: dict[str, list[str]] = {"better": [], "unclear": [], "worse": []}
    for method in summary:
        mine = [row for row in rows if (row["labels_setting"], row["method"]) == (setting, method)]
        groups[clear(_scores(mine, "trained"), _scores(mine, "untrained"))].append(method)
    return groups


def _briefly(groups: Mapping[str, list[str]], summary: Mapping[str, Any]) -> str:
    """What pre-training did in one of several settings, with figures for what is clear only."""

    def figures(method: str) -> str:
        (trained, _), (untrained, _) = summary[method]["trained"], summary[method]["untrained"]
        return f"{METHODS[method].name} ({trained:.1f} % against {untrained:.1f} %)"

    found = []
    for outcome, verb in (("better", "helped"), ("worse", "hurt")):
        if groups[outcome]:
            found.append(f"{verb} {_listing([figures(method) for method in groups[outcome]])}")
    if groups["unclear"]:
        names = _listing([METHODS[method].name for method in groups["unclear"]])
        found.append(f"made no clear difference to {names}")
    return f"pre-training {_listing(found)}{_pixels(summary)}."


def _in_full(groups: Mapping[str, list[str]], summary: Mapping[str, Any]) -> str:
    """What pre-training did in the only setting, with all figures."""
    better, unclear, worse = groups["better"], groups["unclear"], groups["worse"]

    def figures(methods: list[str]) -> str:
        return _listing([_figures(method, summary[method]) for method in methods])

    def short(method: str, what: str) -> str:
        (trained, _), (untrained, _) = summary[method]["trained"], summary[method]["untrained"]
        return f"; {METHODS[method].name} {what} ({trained:.1f} % against {untrained:.1f} %)"

    undecided = "".join(short(method, "made no clear difference") for method in unclear)
    if better and worse:
        found = f"helped and hurt: better {figures(better)}, but worse {figures(worse)}{undecided}"
    elif better:
        found = f"helped: {figures(better)}" + "".join(short(method, "did not improve") for method in unclear)
    elif worse:
        found = f"hurt: {figures(worse)}{undecided}"
    else:
        found = f"made no clear difference: {figures(unclear)}"
    return f"Pre-training {found}{_pixels(summary)}."


def _pixels(summary: Mapping[str, Any]) -> str:
    """That raw pixels do better than the pre-trained network by its best method, where they do."""
    best = max(accuracies["trained"][0] for accuracies in summary.values())
    pixels = max((accuracies["pixels"][0] for accuracies in summary.values() if "pixels" in accuracies), default=0.0)
    return f"; raw pixels do better still ({pixels:.1f} %)" if pixels > best else ""


def _listing(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _figures(method: str, summary: Mapping[str, list[float]]) -> str:
    (trained, spread), (untrained, other_spread) = summary["trained"], summary["untrained"]
    return (
        f"{METHODS[method].name} {trained:.1f} % against {untrained:.1f} % untrained "
        f"({trained - untrained:+.1f} points, spread {max(spread, other_spread):.1f})"
    )
