# SPDX-License-Identifier: Apache-2.0
"""The grid of runs, starts by label settings by seeds, and how it is run so that it can be stopped at any time."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmim.comparing.starts import Start
from fastmim.errors import UserError
from fastmim.evidence import of_labels
from fastmim.report.facts import duration
from fastmim.run_folder import Run
from fastmim.train.checkpoint import write_file

ALL = "100%"
Trainer = Callable[..., Run]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One run: a start, with a label setting, under a seed."""

    start: Start
    labels: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(_word(part) for part in (self.start.name, self.labels, str(self.seed)))


@dataclass(frozen=True)
class Plan:
    """Everything that is run.

    Attributes:
        data: the labelled images.
        state: what tells these images from others in the same place.
        starts: untrained first.
        labels: settings, as 10% or 5/class.
        seeds: 0, 1, ...: of the weights, the order of the images and the choice of labels.
        words: what all runs share, as fine-tuning is given it.
        models: what fine-tuning is told of the network, by the name of a start.
        out: the folder.
    """

    data: str
    state: str
    starts: tuple[Start, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    words: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    out: Path

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that an interrupted comparison has whole rounds."""
        return [Cell(start, labels, seed) for seed in self.seeds for labels in self.labels for start in self.starts]

    def folder(self, cell: Cell) -> Path:
        """Where a run lies."""
        return self.out / "runs" / cell.name

    def call(self, cell: Cell) -> dict[str, Any]:
        """The words of a run's fine-tuning."""
        subset = None if cell.labels == ALL else cell.labels
        return {
            **self.words,
            **self.models[cell.start.name],
            "labels": subset,
            "label_seed": cell.seed,
            "seed": cell.seed,
        }

    def finished(self, cell: Cell) -> bool:
        """Whether this very run has been made.

        Raises:
            UserError: it was made with other options, images or weights.
        """
        path = self._mark(cell)
        if not path.is_file():
            return False
        before, now = json.loads(path.read_text(encoding="utf-8")), self._identity(cell)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise UserError(
                f"{self.out} holds runs with other {', '.join(changed)}; repeat its own command, or give another --out"
            )
        return True

    def mark(self, cell: Cell) -> None:
        """Remembers that a run has been made."""
        write_file(self._mark(cell), json.dumps(self._identity(cell), indent=1).encode())

    def _mark(self, cell: Cell) -> Path:
        return self.out / "runs" / f"{cell.name}.json"

    def _identity(self, cell: Cell) -> dict[str, Any]:
        facts = {**self.call(cell), "start": cell.start.start, "weights": cell.start.weights, "images": self.state}
        return json.loads(json.dumps(facts, default=str))


def run_all(plan: Plan, trainer: Trainer, say: Say, after_first: Callable[[], None]) -> bool:
    """Makes every run that is not there yet; whether all are there now.

    Args:
        plan: the grid.
        trainer: ``fastmim.finetune``, or what has its words.
        say: takes a line for each run.
        after_first: called once, when one run is there.
    """
    cells = plan.cells
    waiting = [cell for cell in cells if not plan.finished(cell)]
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} runs are there already")
        after_first()
    spent: list[float] = []
    for cell in waiting:
        began = time.monotonic()
        folder = plan.folder(cell)
        if folder.exists():  # of a run that was stopped; the folder is this comparison's own
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            run = trainer(plan.data, cell.start.start, out=str(folder), **plan.call(cell))
        except KeyboardInterrupt:
            return False
        result = run.read("finetune.json")
        if result is None or not (run.path / "predictions.csv").is_file():
            return False  # it was stopped, and has said so itself
        plan.mark(cell)
        spent.append(time.monotonic() - began)
        left = (len(waiting) - len(spent)) * sum(spent) / len(spent)
        done = len(cells) - len(waiting) + len(spent)
        rest = f", {duration(left)} left" if left else ""
        top1 = result["accuracy"]["top1"]
        say(f"[{done}/{len(cells)}] seed {cell.seed}, {said(cell.labels)}, {cell.start.name}: {top1:.1f} %{rest}")
        if len(spent) == 1 and len(waiting) == len(cells):
            after_first()
    return True


def whole_rounds(plan: Plan) -> tuple[int, ...]:
    """Seeds under which every run is there."""
    missing = {cell.seed for cell in plan.cells if not plan.finished(cell)}
    return tuple(seed for seed in plan.seeds if seed not in missing)


def label_settings(labels: Sequence[str]) -> tuple[str, ...]:
    """``labels`` in one spelling: 10%, 5/class, or 100% for all.

    Raises:
        UserError: one that is neither, or that stands twice.
    """
    found = [_setting(text) for text in labels]
    if not found:
        raise UserError("--labels is empty; give shares or counts, as 1%,10%,100% or 5/class")
    double = next((text for text in found if found.count(text) > 1), None)
    if double:
        raise UserError(f"--labels has {double!r} twice")
    return tuple(found)


def _setting(text: str) -> str:
    word = str(text).strip().replace(" ", "")
    if word == "all":
        return ALL
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", word)
    if share and 0 < float(share[1]) <= 100:
        return f"{float(share[1]):g}%"
    count = re.fullmatch(r"(\d+)/class", word)
    if count and int(count[1]):
        return f"{int(count[1])}/class"
    raise UserError(f"--labels: {text!r} is no share and no count of labels; try 10% (of all), 5/class or all")


def said(labels: str) -> str:
    """A label setting in words."""
    return "all labels" if labels == ALL else of_labels(labels)


def chosen(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that were given."""
    return ((name, value) for name, value in mapping.items() if value is not None)


def _word(text: str) -> str:
    """Something that can be part of a folder's name, and of no other text's."""
    text = text.replace("%", "pct").replace("/class", "-a-class")
    kept = [letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in text]
    # Ends of paths, which have slashes, are told apart already.
    lost = any(new != old != "/" for new, old in zip(kept, text, strict=True))
    mark = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "".join(kept) + (f"-{mark}" if lost else "")
