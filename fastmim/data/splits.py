# SPDX-License-Identifier: Apache-2.0
"""Labelled images to learn from: a training part, a part to look at on the way, and a part for the result.

The result is measured on images that neither training nor any choice has seen. Where DATA brings a test/ part, val/ is
what is looked at on the way; where it brings one of the two, that one is the result; where it brings none, a share of
each class is held out, or one fold after another.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastmim.data.read import BadImage, read_file
from fastmim.data.sources.lists import COLUMNS, read_csv
from fastmim.data.sources.scan import place_of, scan
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.seeding import derive

Classes = Mapping[str, list[int]]
"""Class -> rows of the table."""
WANTED = "wanted class folders with images, train/ and val/ or test/ with class folders, or a .csv with path and label"
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Part:
    """Some images, and the place of the class of each in the sorted names of all classes."""

    table: ImageTable
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Labelled images, cut into parts that share no file."""

    classes: tuple[str, ...]
    train: Part
    shown: Part
    """What is looked at on the way; the test part, where there is no other."""
    test: Part
    how: str
    """How the parts came about, in words."""

    @property
    def fingerprint(self) -> str:
        """Of the images and labels of all parts."""
        parts = [f"{part.table.fingerprint} {part.labels}" for part in (self.train, self.shown, self.test)]
        return hashlib.sha256(repr((self.classes, parts)).encode("utf-8", "surrogateescape")).hexdigest()


def splits(
    path: str,
    *,
    seed: int = 0,
    test_share: float = 0.2,
    folds: int | None = None,
    fold: int | None = None,
    labels: str | None = None,
    label_seed: int = 0,
    shuffle: bool = False,
) -> Splits:
    """Labelled images of class folders, of train/, val/ and test/ with class folders, or of a list with labels.

    Args:
        path: a folder, or a .csv file with the columns ``path``, ``label`` and perhaps ``split`` (train, val or test).
        seed: chooses what is held out.
        test_share: share of each class that is held out where ``path`` has neither a val nor a test part.
        folds: cut each class into so many instead.
        fold: and hold this one out.
        labels: learn from some labels only, see `some_labels`.
        label_seed: chooses which, and how they are shuffled.
        shuffle: give the training images each other's labels (a control).

    Raises:
        UserError: fewer than two classes, a class without images in some part, a class that training does not know, an
            image with two labels, or a list that names what is not there.
    """
    table, parts = _parts(path)
    found: list[Classes] = [dict(sorted(parts.get(name, {}).items())) for name in ("train", "val", "test")]
    train, val, test = found
    if len(train) < 2:
        only = f"only {next(iter(train))!r}" if train else "none"
        raise UserError(f"{path!r} needs at least two classes to learn from, but has {only}; {WANTED}")
    _check_same_classes(path, train, {"val": val, "test": test})
    if folds is not None or not (val or test):
        if val or test:
            raise UserError(f"{path!r} has a {'test' if test else 'val'} part of its own; leave --folds out")
        train, test, how = _held_out(path, train, seed, test_share, folds, fold)
    else:
        how = "train/, val/ and test/" if val and test else f"train/ and {'val' if val else 'test'}/"
        test = test or val
    shown = val or test
    if labels is not None:
        train = some_labels(train, labels, label_seed)
        how += f"; learnt from {labels} of the labels"
    names = tuple(train)
    learnt = _part(table, names, train)
    if shuffle:
        order = sorted(range(len(learnt)), key=lambda place: derive(label_seed, "shuffle labels", place))
        learnt = Part(learnt.table, tuple(learnt.labels[place] for place in order))
        how += "; training labels shuffled"
    measured = _part(table, names, test)
    return Splits(names, learnt, measured if shown is test else _part(table, names, shown), measured, how)


def some_labels(train: Classes, words: str, seed: int) -> Classes:
    """A part of each class: ``10%`` of its images, but at least one, or ``5/class``; a pure function of ``seed``.

    The images of a smaller part are among those of a larger one.

    Raises:
        UserError: the words mean something else, or a class has fewer images.
    """
    count = _counter(words)
    chosen: dict[str, list[int]] = {}
    for label, (name, rows) in enumerate(train.items()):
        wanted = count(len(rows))
        if wanted > len(rows):
            raise UserError(f"labels {words}: class {name!r} has only {len(rows)} training images")
        order = sorted(range(len(rows)), key=lambda place: derive(seed, "labels", label, place))
        chosen[name] = [rows[place] for place in sorted(order[:wanted])]
    return chosen


def _counter(words: str) -> Callable[[int], int]:
    """How many of so many."""
    share, each = re.fullmatch(r"([0-9.]+)\s*%", words), re.fullmatch(r"([0-9]+)\s*/\s*class", words)
    if each and int(each[1]) > 0:
        return lambda count: int(each[1])
    try:
        if share and 0 < float(share[1]) <= 100:
            return lambda count: max(1, round(float(share[1]) / 100 * count))
    except ValueError:
        pass
    raise UserError(f"labels = {words!r}, but it should be a share as 10%, or a number as 5/class")


def _held_out(
    path: str, every: Classes, seed: int, share: float, folds: int | None, fold: int | None
) -> tuple[Classes, Classes, str]:
    fewest = folds or 2
    for name, rows in every.items():
        if len(rows) < fewest:
            raise UserError(f"class {name!r} of {path!r} has {len(rows)} images, but needs at least {fewest}")
    if folds is None:
        how = f"{share:.0%} of each class held out, seed {seed}"
    else:
        how = f"fold {fold} of {folds} held out, seed {seed}"
    train: dict[str, list[int]] = {}
    test: dict[str, list[int]] = {}
    for label, (name, rows) in enumerate(every.items()):
        order = sorted(range(len(rows)), key=lambda place: derive(seed, "split", label, place))
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        out = set(order[:count] if folds is None else order[fold::folds])
        train[name] = [row for place, row in enumerate(rows) if place not in out]
        test[name] = [row for place, row in enumerate(rows) if place in out]
    return train, test, how


def _check_same_classes(path: str, train: Classes, others: dict[str, Classes]) -> None:
    for part, classes in others.items():
        unknown = [name for name in classes if name not in train]
        if unknown:
            raise UserError(
                f"{path!r}: class {unknown[0]!r} of {part} is not in train; training knows"
                f" {', '.join(map(repr, list(train)[:5]))}{' ...' if len(train) > 5 else ''}"
            )
        missing = [name for name in train if classes and name not in classes]
        if missing:
            raise UserError(
                f"{path!r}: class {missing[0]!r} has no image in {part}, so it could not be measured; move some there,"
                " or the class out of train"
            )


def class_rows(table: ImageTable) -> dict[str, dict[str, list[int]]]:
    """The rows of each class of each part, by the folders' names: PART/CLASS/..., or CLASS/... (all to learn from)."""
    every = [table.name(row).split("/") for row in range(len(table))]
    split = any(parts[0] == "train" and len(parts) > 2 for parts in every)
    found: dict[str, dict[str, list[int]]] = {}
    for row, parts in enumerate(every):
        if not split and len(parts) > 1:
            found.setdefault("train", {}).setdefault(parts[0], []).append(row)
        elif split and len(parts) > 2 and parts[0] in PARTS:
            found.setdefault(PARTS[parts[0]], {}).setdefault(parts[1], []).append(row)
    return found


def _parts(path: str) -> tuple[ImageTable, dict[str, dict[str, list[int]]]]:
    """The table, and the rows of each class of each part."""
    table = scan([path])
    if path.lower().endswith(".csv"):
        return table, _listed(path, table)
    return table, class_rows(table)


def _listed(path: str, table: ImageTable) -> dict[str, dict[str, list[int]]]:
    """The parts of a list with labels; without a column ``split`` all is training."""
    try:
        content = read_file(place_of(path))
    except BadImage as bad:
        raise UserError(f"{path!r} cannot be read: {bad.reason}") from None
    rows = read_csv(path, content)
    header = [cell.lower() for cell in next(rows)[1]]
    columns = [next((header.index(name) for name in names if name in header), -1) for names in _COLUMNS]
    if columns[1] < 0:
        raise UserError(f"{path!r} has no column of labels: found {', '.join(map(repr, header))}; wanted label")
    places = {table.name(row): row for row in range(len(table))}
    found: dict[str, dict[str, list[int]]] = {}
    seen: dict[str, tuple[str, str]] = {}
    for number, cells in rows:
        name, label, split = (cells[column] if 0 <= column < len(cells) else "" for column in columns)
        part = PARTS.get(split.strip().lower() or "train")
        if part is None or not label.strip():
            wrong = f"split {split!r}" if part is None else "no label"
            raise UserError(f"{path!r}, line {number}: {wrong}; wanted a label, and train, val or test as split")
        if seen.setdefault(name, (label.strip(), part)) != (label.strip(), part):
            raise UserError(f"{path!r}, line {number}: {name!r} has two labels or splits, {seen[name][0]!r} before")
        found.setdefault(part, {}).setdefault(label.strip(), []).append(places[name])
    return {part: {label: sorted(set(rows)) for label, rows in classes.items()} for part, classes in found.items()}


_COLUMNS: Sequence[Sequence[str]] = (
    COLUMNS,
    ("label", "class", "target", "category"),
    ("split", "part", "set"),
)


def _part(table: ImageTable, names: tuple[str, ...], rows: Classes) -> Part:
    pairs = [(row, label) for label, name in enumerate(names) for row in rows.get(name, ())]
    return Part(table.take([row for row, _ in pairs]), tuple(label for _, label in pairs))
