# SPDX-License-Identifier: Apache-2.0
"""What a classifier got right and wrong on images that were kept for it, in numbers and as files."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fastmim.data.splits import Splits
from fastmim.data.table import ImageTable
from fastmim.run_folder import Run
from fastmim.significance import wilson
from fastmim.train.checkpoint import write_file

_WORST = 24
_BINS = 15


@dataclass(frozen=True)
class Outcome:
    """The answers to the test images, and what they amount to.

    Attributes:
        facts: ``classes``, ``test`` (images), ``accuracy`` (percent: ``top1`` with its 95 % Wilson interval ``low`` to
            ``high``, ``top5`` where there are more than five classes, ``balanced`` (mean recall), ``macro_f1``,
            ``majority``: what always naming the most frequent class would get), ``nll`` (nats), ``ece`` (percent:
            Naeini et al. 2015, 15 bins), ``per_class``, ``confusion`` (rows: the label, columns: the answer).
        probabilities: of each image, row by row as ``labels``.
        labels: what is right.
        places: of the images in the test part.
    """

    facts: dict[str, Any]
    probabilities: Float[Tensor, "N K"]
    labels: Int64[Tensor, " N"]
    places: Int64[Tensor, " N"]


def measure(
    logits: Float[Tensor, "N K"], labels: Int64[Tensor, " N"], places: Int64[Tensor, " N"], found: Splits
) -> Outcome:
    """Everything that is reported of the answers to the test images."""
    probabilities, classes = logits.float().softmax(1), len(found.classes)
    answers = probabilities.argmax(1)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
    right, total = int(confusion.diagonal().sum()), len(labels)
    low, high = wilson(right, total)
    per_class = _per_class(confusion, found.classes)
    seen = [one for one in per_class if one["images"]]
    accuracy = {
        "top1": 100 * right / total,
        "low": 100 * low,
        "high": 100 * high,
        "balanced": sum(one["recall"] for one in seen) / len(seen),
        "macro_f1": sum(one["f1"] for one in seen) / len(seen),
        "majority": 100 * int(confusion.sum(1).max()) / total,
    }
    if classes > 5:
        accuracy["top5"] = 100 * float((probabilities.topk(5).indices == labels[:, None]).any(1).float().mean())
    facts = {
        "classes": list(found.classes),
        "test": total,
        "accuracy": accuracy,
        "nll": float(F.cross_entropy(logits.float(), labels)),
        "ece": 100 * calibration_error(probabilities, labels),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }
    return Outcome(facts, probabilities, labels, places)


def calibration_error(probabilities: Float[Tensor, "N K"], labels: Int64[Tensor, " N"]) -> float:
    """Expected calibration error: how far confidence is from accuracy, over 15 bins of confidence."""
    confidence, answers = probabilities.max(1)
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gap = torch.zeros(_BINS).index_add_(0, bins, (answers == labels).float() - confidence)
    return float(gap.abs().sum() / len(labels))


def write_outcome(run: Run, outcome: Outcome, facts: dict[str, Any], found: Splits) -> None:
    """finetune.json, predictions.csv and the worst mistakes into the run folder."""
    table = found.test.table
    wrong = _worst(outcome)
    mistakes = [
        {
            "path": table.path(int(outcome.places[row])).encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
            "label": found.classes[int(outcome.labels[row])],
            "predicted": found.classes[int(outcome.probabilities[row].argmax())],
            "p_predicted": float(outcome.probabilities[row].max()),
            "p_label": float(outcome.probabilities[row, outcome.labels[row]]),
            "place": int(outcome.places[row]),
        }
        for row in wrong
    ]
    run.write("finetune.json", {**facts, **outcome.facts, "mistakes": mistakes})
    paths = [table.path(place) for place in outcome.places.tolist()]
    content = predictions_csv(paths, outcome.probabilities, found.classes, outcome.labels.tolist())
    write_file(run.path / "predictions.csv", content)


def worst_table(found: Splits, mistakes: Sequence[dict[str, Any]]) -> ImageTable:
    """The images of the worst mistakes."""
    return found.test.table.take([one["place"] for one in mistakes])


def predictions_csv(
    paths: Sequence[str],
    probabilities: Float[Tensor, "N K"],
    classes: Sequence[str],
    labels: Sequence[int] | None = None,
) -> bytes:
    """Rows of path, (label,) predicted, (p_true,) and the probability ``p:CLASS`` of every class.

    Paths may hold any bytes, which are written as they are.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    known = ["label"] if labels is not None else []
    writer.writerow(["path", *known, "predicted", *(["p_true"] if known else []), *(f"p:{name}" for name in classes)])
    for row, (path, values) in enumerate(zip(paths, probabilities.tolist(), strict=True)):
        cells = [os.fsencode(path).decode("utf-8", "surrogateescape")]
        answer = classes[max(range(len(values)), key=values.__getitem__)]
        if labels is not None:
            cells += [classes[labels[row]], answer, f"{values[labels[row]]:.6g}"]
        else:
            cells.append(answer)
        writer.writerow([*cells, *(f"{value:.6g}" for value in values)])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _per_class(confusion: Int64[Tensor, "K K"], names: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for place, name in enumerate(names):
        right = int(confusion[place, place])
        images, named = int(confusion[place].sum()), int(confusion[:, place].sum())
        recall = 100 * right / images if images else None
        precision = 100 * right / named if named else 0.0
        f1 = 200 * right / (images + named) if images + named else None
        found.append({"class": name, "images": images, "recall": recall, "precision": precision, "f1": f1})
    return found


def _worst(outcome: Outcome) -> list[int]:
    """Rows of the surest wrong answers, surest first."""
    confidence, answers = outcome.probabilities.max(1)
    wrong = (answers != outcome.labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)
    return [int(row) for row in wrong[order][:_WORST]]
