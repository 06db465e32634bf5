# SPDX-License-Identifier: Apache-2.0
"""The probe in plain words: how far the trained network is from an untrained one, and what did not improve."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmim.report.curves import is_number
from fastmim.report.folder import Record

METHODS = {"knn": "Nearest neighbours (kNN)", "linear": "Linear probe"}
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
    """One method: the rows, and the pre-trained weights against each of the others in points of per cent."""

    method: str
    label: str
    rows: list[Row]

    def row(self, weights: str) -> Row | None:
        """The row of one kind of weights."""
        return next((row for row in self.rows if row.weights == weights), None)

    def gain(self, over: str = "untrained") -> float | None:
        """Points that the pre-trained weights are ahead of the others."""
        trained, other = self.row("trained"), self.row(over)
        return trained.mean - other.mean if trained and other else None

    def clear(self, over: str = "untrained") -> bool:
        """The rule of the probe's own verdict: a difference above both spreads, of the same sign on every subset."""
        trained, other = self.row("trained"), self.row(over)
        if not trained or not other:
            return False
        differences = [after - before for after, before in zip(trained.points, other.points, strict=True)]
        one_sided = min(differences) > 0 or max(differences) < 0
        return one_sided and abs(trained.mean - other.mean) > max(trained.spread, other.spread)


def comparisons(probe: Record) -> list[Comparison]:
    """The summary of ``probe.json``, method by method."""
    found = []
    for method, summary in probe["summary"].items():
        rows = []
        for weights, (mean, spread) in summary.items():
            points = [row["accuracy"] for row in probe["rows"] if (row["method"], row["weights"]) == (method, weights)]
            rows.append(Row(weights, WEIGHTS.get(weights, weights), mean, spread if is_number(spread) else 0.0, points))
        found.append(Comparison(method, METHODS.get(method, method), rows))
    return found


def shortfalls(found: Sequence[Comparison]) -> list[str]:
    """One plain sentence for each thing that the pre-training did not improve."""
    sentences = []
    for one in found:
        gain, pixels = one.gain(), one.gain("pixels")
        if gain is not None and not one.clear():
            sentences.append(
                f"{one.label}: no clear change ({gain:+.1f} points, no more than the choice of labels makes)."
            )
        elif gain is not None and gain < 0:
            sentences.append(f"{one.label}: worse than the untrained network ({gain:+.1f} points).")
        if pixels is not None and pixels < 0:
            sentences.append(
                f"{one.label}: raw pixels do better ({-pixels:.1f} points ahead of the pre-trained network)."
            )
    return sentences


def setting(probe: Record) -> str:
    """What was probed, in one sentence."""
    labels = sorted({row["labels"] for row in probe["rows"]})
    subsets = len({row["subset"] for row in probe["rows"]})
    drawn = " or ".join(f"{count:,}" for count in labels)
    return (
        f"{probe['classes']:,} classes; trained on {drawn} labelled images ({subsets} "
        f"{'subsets' if subsets != 1 else 'subset'}), tested on {probe['val']:,} others at {probe['resolution']} px. "
        f"Chance is {100 / probe['classes']:.3g} %."
    )
