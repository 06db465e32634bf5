# SPDX-License-Identifier: Apache-2.0
"""The probe in plain words: how far the trained network is from an untrained one, and what did not improve."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmim.errors import UserError
from fastmim.evidence import Outcome, clear, of_labels
from fastmim.report.curves import is_number
from fastmim.report.folder import Record

METHODS = {
    "knn": "Nearest neighbours (kNN)",
    "linear": "Linear probe",
    "linear-sgd": "Linear probe by SGD",
    "attentive": "Attentive probe",
}
WEIGHTS = {"trained": "Pre-trained", "untrained": "Untrained", "pixels": "Raw pixels"}


@dataclass(frozen=True)
class Row:
    """Accuracy of one kind of weights by one method, in per cent; ``points`` are the subsets."""

    weights: str
    label: str
    mean: float
    spread: float
    points: Sequence[float]

    @property
    def text(self) -> str:
        """Mean and spread as they are printed."""
        return f"{self.mean:.1f} \N{PLUS-MINUS SIGN} {self.spread:.1f} %"


@dataclass(frozen=True)
class Comparison:
    """One method with so many labels: the rows, and the pre-trained weights against the others in points of per cent.

    ``setting`` says in words how many labels, and is empty where the probe has one setting only.
    """

    method: str
    label: str
    setting: str
    labels: int
    rows: list[Row]

    def row(self, weights: str) -> Row | None:
        """The row of one kind of weights."""
        return next((row for row in self.rows if row.weights == weights), None)

    def gain(self, over: str = "untrained") -> float | None:
        """Points that the pre-trained weights are ahead of the others."""
        trained, other = self.row("trained"), self.row(over)
        return trained.mean - other.mean if trained and other else None

    def clear(self, over: str = "untrained") -> bool:
        """Whether the difference is clear, by the rule of the probe's own verdict."""
        return self.outcome(over) != "unclear"

    def outcome(self, over: str = "untrained") -> Outcome:
        """What the pre-trained weights are, against the others."""
        trained, other = self.row("trained"), self.row(over)
        return clear(trained.points, other.points) if trained and other else "unclear"

    @property
    def title(self) -> str:
        """The method, and the labels where there are several settings."""
        return f"{self.label}, {self.setting}" if self.setting else self.label


def comparisons(probe: Record) -> list[Comparison]:
    """The summary of ``probe.json``: method by method, each from few labels to many.

    Raises:
        UserError: an earlier version wrote it.
    """
    if any("labels_setting" not in row for row in probe["rows"]):
        raise UserError("probe.json was written by an earlier version; run fastmim probe again, or remove it")
    counts = {row["labels_setting"]: row["labels"] for row in probe["rows"]}
    several = len(counts) > 1
    methods = dict.fromkeys(method for summary in probe["summary"].values() for method in summary)
    return [
        _comparison(probe, method, setting, of_labels(setting) if several else "")
        for method in methods
        for setting in sorted(counts, key=lambda name: counts[name])
    ]


def _comparison(probe: Record, method: str, setting: str, words: str) -> Comparison:
    rows = [row for row in probe["rows"] if (row["method"], row["labels_setting"]) == (method, setting)]
    found = []
    for weights, (mean, spread) in probe["summary"][setting][method].items():
        points = [row["accuracy"] for row in rows if row["weights"] == weights]
        found.append(Row(weights, WEIGHTS.get(weights, weights), mean, spread if is_number(spread) else 0.0, points))
    labels = next((row["labels"] for row in rows), 0)
    return Comparison(method, METHODS.get(method, method), words, labels, found)


def by_method(found: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The comparisons of each method below its label."""
    labels = dict.fromkeys(one.label for one in found)
    return [(label, [one for one in found if one.label == label]) for label in labels]


def most_labels(found: Sequence[Comparison]) -> list[Comparison]:
    """Of each method the comparison with the most labels."""
    return list({one.method: one for one in sorted(found, key=lambda one: one.labels)}.values())


def shortfalls(found: Sequence[Comparison]) -> list[str]:
    """One plain sentence for each thing that the pre-training did not improve."""
    sentences = []
    for one in found:
        gain, pixels = one.gain(), one.gain("pixels")
        if gain is not None and not one.clear():
            sentences.append(
                f"{one.title}: no clear change ({gain:+.1f} points, no more than the choice of labels makes)."
            )
        elif gain is not None and gain < 0:
            sentences.append(f"{one.title}: worse than the untrained network ({gain:+.1f} points).")
        if pixels is not None and pixels < 0:
            sentences.append(
                f"{one.title}: raw pixels do better ({-pixels:.1f} points ahead of the pre-trained network)."
            )
    return sentences


def setting(probe: Record) -> str:
    """What was probed, in one sentence."""
    labels = sorted({row["labels"] for row in probe["rows"]})
    subsets = len({row["subset"] for row in probe["rows"]})
    drawn = " or ".join(f"{count:,}" for count in labels)
    times = f"{subsets} {'subsets' if subsets != 1 else 'subset'}{' of each size' if len(labels) > 1 else ''}"
    return (
        f"{probe['classes']:,} classes; trained on {drawn} labelled images ({times}), tested on {probe['val']:,} "
        f"others at {probe['resolution']} px. Chance is {100 / probe['classes']:.3g} %."
    )
