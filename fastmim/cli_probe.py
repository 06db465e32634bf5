# SPDX-License-Identifier: Apache-2.0
"""``fastmim probe``: what was learnt, measured on labelled images."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build
from fastmim.cli_output import OK, print_styled
from fastmim.config import Section


def _words(value: Any) -> Any:
    """``knn,linear``, as a command line gives it, perhaps several times, as a list."""
    texts = [value] if isinstance(value, str) else value
    return [word.strip() for text in texts for word in str(text).split(",")]


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Probe(Section):
    """Measure what was learnt, on labelled images.

    kNN, linear and attentive classifiers on the frozen features, beside the same network untrained.
    """

    target: Positional[Annotated[str, arg(metavar="RUN|MODEL")]]
    """A run folder, or the name of a timm model."""
    data: Positional[str]
    """A folder of class folders, or of train/ and val/ with class folders."""
    methods: Annotated[Words, arg(metavar="METHOD,...")] = ("knn", "linear")
    """Of knn, linear (its exact optimum), linear-sgd (as papers train it) and attentive (on the last map, slower)."""
    labels: Annotated[Words, arg(metavar="LABELS,...")] = ("50%",)
    """How many labels to learn from: a share as 1%,10% (at least one a class), or so many of each class as 5/class."""
    repeats: int = Field(default=3, ge=2)
    """Repetitions with other labelled images."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote in kNN."""
    resolution: int | None = Field(default=None, ge=8)
    """Side of the square image in pixels; that of the pre-training when not given."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Chooses the labelled images."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images; from the cores when not given."""


def probe(words: dict[str, Any]) -> int:
    """Prints accuracies (mean and standard deviation) and the verdict."""
    options = build(Probe, words, "probe")
    from fastmim import runs
    from fastmim.evidence import of_labels

    result = runs.probe(**options.model_dump())
    width = max(len(method) for methods in result["summary"].values() for method in methods)
    for setting, methods in result["summary"].items():
        if len(result["summary"]) > 1:
            print_styled("dim", of_labels(setting), "")
        for method, accuracies in methods.items():
            cells = (f"{weights} {mean:.1f} +- {std:.1f} %" for weights, (mean, std) in accuracies.items())
            print_styled("bold", f"{method:{width}}", "  " + "   ".join(cells))
    print(result["verdict"])
    return OK
