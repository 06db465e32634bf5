# SPDX-License-Identifier: Apache-2.0
"""From the predictions of all runs to accuracies, differences, and what may be said of them."""

import csv
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool

from fastmim.comparing.plan import Cell, Plan
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.significance import Outcome, compare_pair, detectable, holm, outcome, wilson
from fastmim.starts import SCRATCH

Correct = Bool[np.ndarray, "seeds images"]
MAY_DIFFER = {"start", "out", "model", "model_args", "overwrite"}
"""Options of fine-tuning that say what the start is, or where it goes."""


@dataclass(frozen=True)
class Measured:
    """What all runs answered on the same test images.

    Attributes:
        paths: of the test images.
        truth: their labels.
        classes: names of all classes.
        correct: by label setting and name of the start.
        results: finetune.json of each run.
    """

    paths: tuple[str, ...]
    truth: tuple[str, ...]
    classes: tuple[str, ...]
    correct: dict[tuple[str, str], Correct]
    results: dict[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Score:
    """Accuracies of one start with one label setting, in per cent.

    Attributes:
        labels: the setting.
        start: name of the start.
        train: labelled images that it was trained on.
        accuracies: of each seed.
        mean: of them.
        spread: their standard deviation; None with one seed.
        low: lower end of the 95 % interval (Wilson) of the mean for other test images, with these very networks.
        high: its upper end.
        beats_chance: whether it is better than always naming the most frequent class of the test images.
    """

    labels: str
    start: str
    train: int
    accuracies: tuple[float, ...]
    mean: float
    spread: float | None
    low: float
    high: float
    beats_chance: bool


@dataclass(frozen=True)
class Difference:
    """One start against another, in points of per cent; positive when ``a`` is better.

    Attributes:
        labels: the setting.
        a: name of a start.
        b: name of another.
        points: difference of the means.
        per_seed: of each seed.
        spread: larger standard deviation of both over seeds; None with one seed.
        low: lower end of the 95 % interval, for other seeds and images.
        high: its upper end.
        p: of other seeds and images, before correction.
        corrected: after Holm's correction over all differences from untrained weights, or over all others.
        outcome: helped, hurt or unclear, for ``a``.
        detectable: the difference that would have been shown four times out of five.
    """

    labels: str
    a: str
    b: str
    points: float
    per_seed: tuple[float, ...]
    spread: float | None
    low: float
    high: float
    p: float
    corrected: float
    outcome: Outcome
    detectable: float


@dataclass(frozen=True)
class Judged:
    """Scores and differences on some of the test images.

    Attributes:
        images: how many test images.
        seeds: how many seeds.
        chance: accuracy in per cent of always naming the most frequent class of these images.
        scores: label setting by label setting, starts in their order.
        differences: of all pairs, every start against those before it, so that untrained weights are always ``b``.
    """

    images: int
    seeds: int
    chance: float
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]

    def score(self, labels: str, start: str) -> Score:
        """Of a start with a label setting."""
        return next(one for one in self.scores if (one.labels, one.start) == (labels, start))

    def difference(self, labels: str, a: str, b: str) -> Difference:
        """Of a later start ``a`` against an earlier one."""
        return next(one for one in self.differences if (one.labels, one.a, one.b) == (labels, a, b))


def read_all(plan: Plan, seeds: Sequence[int]) -> Measured:
    """The answers of all runs under ``seeds``.

    Raises:
        UserError: two runs were tested on different images, or with different labels.
    """
    paths: tuple[str, ...] = ()
    truth: tuple[str, ...] = ()
    correct: dict[tuple[str, str], list[list[bool]]] = {}
    results: dict[Cell, dict[str, Any]] = {}
    for cell in plan.cells:
        if cell.seed not in seeds:
            continue
        folder = plan.folder(cell)
        rows = read_predictions(folder / "predictions.csv")
        here, labels = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
        if not paths:
            paths, truth = here, labels
        if (here, labels) != (paths, truth):
            raise UserError(f"{folder} was tested on other images than the runs before it, so they cannot be compared")
        correct.setdefault((cell.labels, cell.start.name), []).append([row[1] == row[2] for row in rows])
        results[cell] = Run(folder).read("finetune.json") or {}
    classes = tuple(str(name) for name in next(iter(results.values()))["classes"])
    return Measured(paths, truth, classes, {key: np.array(rows) for key, rows in correct.items()}, results)


def read_predictions(path: Path) -> list[tuple[str, str, str]]:
    """(path, label, predicted) of every test image, by path.

    Raises:
        UserError: the file holds no predictions.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [(row["path"], row["label"], row["predicted"]) for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{path} holds no predictions")
    return sorted(rows)


def judge(measured: Measured, plan: Plan, kept: Bool[np.ndarray, " images"]) -> Judged:
    """Scores, and all differences with their outcomes, on the test images that are ``kept`` (at least one)."""
    truth = np.array(measured.truth, dtype=object)[kept]
    most, count = Counter(truth.tolist()).most_common(1)[0]
    constant = truth == most
    shown = {key: rows[:, kept] for key, rows in measured.correct.items()}
    train = {(cell.labels, cell.start.name): int(result["train"]) for cell, result in measured.results.items()}
    scores = []
    for labels, start in itertools.product(plan.labels, plan.starts):
        key = (labels, start.name)
        scores.append(_score(key, shown[key], train[key], constant))
    keys = [(labels, b.name, a.name) for labels in plan.labels for a, b in itertools.combinations(plan.starts, 2)]
    pairs = [compare_pair(shown[labels, a], shown[labels, b]) for labels, a, b in keys]
    # Two questions, each corrected for itself: does a start help, and which is the best of those that do?
    families = [[place for place, key in enumerate(keys) if (key[2] == SCRATCH) is first] for first in (True, False)]
    corrections: dict[int, tuple[float, int]] = {}
    for family in families:
        for place, corrected in zip(family, holm([pairs[place].p for place in family]), strict=True):
            corrections[place] = (corrected, len(family))
    differences = []
    for place, ((labels, a, b), pair) in enumerate(zip(keys, pairs, strict=True)):
        corrected, comparisons = corrections[place]
        differences.append(
            Difference(
                labels=labels,
                a=a,
                b=b,
                points=100 * pair.difference,
                per_seed=tuple(100 * one for one in pair.per_seed),
                spread=None if np.isnan(pair.spread) else 100 * pair.spread,
                low=100 * pair.low,
                high=100 * pair.high,
                p=pair.p,
                corrected=corrected,
                outcome=outcome(pair, corrected),
                detectable=100 * detectable(pair, comparisons),
            )
        )
    seeds = len(next(iter(shown.values())))
    return Judged(len(truth), seeds, 100 * count / len(truth), tuple(scores), tuple(differences))


def _score(key: tuple[str, str], correct: Correct, train: int, constant: Bool[np.ndarray, " images"]) -> Score:
    accuracies = 100 * correct.mean(1)
    mean = float(accuracies.mean())
    # The networks answer the same images, so their mean is known no better than that of one of them.
    low, high = wilson(round(correct.mean() * correct.shape[1]), correct.shape[1])
    against = compare_pair(correct, np.broadcast_to(constant, correct.shape))
    return Score(
        labels=key[0],
        start=key[1],
        train=train,
        accuracies=tuple(accuracies.tolist()),
        mean=mean,
        spread=float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None,
        low=100 * low,
        high=100 * high,
        beats_chance=against.low > 0,
    )


def budgets(measured: Measured) -> list[str]:
    """What was not the same for all starts with the same labels, in plain sentences; none when all was fair."""
    found = []
    for name, what in (("steps", "steps"), ("train", "training images"), ("test", "test images")):
        groups: dict[tuple[str, int], dict[int, str]] = {}
        for cell, result in measured.results.items():
            groups.setdefault((cell.labels, cell.seed), {}).setdefault(int(result[name]), cell.start.name)
        for values in groups.values():
            if len(values) > 1:
                counts = " and ".join(f"{count:,} ({start})" for count, start in values.items())
                found.append(f"Not the same for all: {what}, {counts}.")
                break
    return found


def options_apart(plan: Plan, seed: int) -> list[str]:
    """Options that fine-tuning resolved differently for the starts, in plain sentences: it may know what suits one."""
    options = {start.name: _options(plan.folder(Cell(start, plan.labels[0], seed))) for start in plan.starts}
    names = sorted({name for one in options.values() for name in one} - MAY_DIFFER)
    found = []
    for name in names:
        values = {start: one.get(name) for start, one in options.items()}
        if len({repr(value) for value in values.values()}) > 1:
            shown = ", ".join(f"{value} ({start})" for start, value in values.items())
            found.append(f"Not the same for all: {name.replace('_', ' ')}, {shown}.")
    return found


def _options(folder: Path) -> dict[str, Any]:
    """The options of a run by name, out of their sections."""
    sections = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    return {
        name: value for section in sections.values() if isinstance(section, dict) for name, value in section.items()
    }
