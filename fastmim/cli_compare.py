# SPDX-License-Identifier: Apache-2.0
"""``fastmim compare``: which start is best, with the same labels, budget and seeds for all."""

import sys
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build
from fastmim.cli_output import INTERRUPTED, OK, print_styled
from fastmim.config import Section


def _words(value: Any) -> Any:
    """``a,b`` and the option given twice, as one list."""
    texts = [value] if isinstance(value, str) else value
    return tuple(word.strip() for text in texts for word in str(text).split(","))


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Compare(Section):
    """See whether your pre-training helped, on labelled images.

    Fine-tunes from every start with the same labels, steps and seeds, looks for leaks, and says so plainly when nothing
    helped. The same command goes on after an interruption.
    """

    data: Positional[str]
    """Folder of labelled images: class folders, or train/ and val/ with class folders."""
    inits: Annotated[Words, arg(metavar="START,...")]
    """Run folders, imagenet, timm names, local-dir:FOLDER or files of weights; scratch is always compared."""
    labels: Annotated[Words, arg(metavar="LABELS,...")] = ("10%",)
    """How many labels to train on, as 1%,10%,all or 5/class; each setting is compared."""
    seeds: int = Field(default=3, ge=1)
    """Repetitions with other initial weights, order and labels, the same for every start; one shows nothing."""
    model: str | None = None
    """The network of scratch and of files; that of the first run when not given."""
    steps: int | None = Field(default=None, ge=1)
    """Of every fine-tuning."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead of --steps."""
    global_batch: int | None = Field(default=None, ge=1)
    """Images of a step."""
    resolution: int | None = Field(default=None, ge=8)
    """Side of the images in pixels; that of the first run when not given."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    shuffle_labels: bool = False
    """The control: labels of the training images are shuffled, so that nothing may help."""
    leakage: bool = True
    """Look for the test images among those that were trained on; --no-leakage saves the time."""
    out: str | None = None
    """The folder; the next free runs/compare/NAME-001 when not given."""


def compare(words: dict[str, Any]) -> int:
    """Prints a line for each run, the verdict, and where the page is."""
    options = build(Compare, words, "compare")
    from fastmim.comparing.compare import compare as run

    result = run(**options.model_dump())
    print_styled("bold", result.verdict, "")
    if result.facts:
        print(f"page:    {result.page}")
    if result.interrupted:
        print(f"fastmim: interrupted; the same command with --out {result.folder} goes on", file=sys.stderr)
    return INTERRUPTED if result.interrupted else OK
