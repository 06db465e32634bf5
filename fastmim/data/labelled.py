# SPDX-License-Identifier: Apache-2.0
"""Images with labels, for measuring only: class folders, as ImageFolder and timm read them, of any source."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastmim.data.sources.scan import scan
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.seeding import derive

VAL_NAMES = ("val", "valid", "test")
WANTED = "wanted class folders with images, or train/ and val/ with class folders"

Classes = Mapping[str, list[int]]
"""Class -> rows of the table."""


@dataclass(frozen=True)
class Labelled:
    """Two labelled sets. A label is the place of the class in ``classes``, which are sorted by name."""

    classes: tuple[str, ...]
    train: ImageTable
    train_labels: tuple[int, ...]
    val: ImageTable
    val_labels: tuple[int, ...]
    split: str
    """How the two sets came about, in words."""


def labelled(path: str, seed: int = 0, val_share: float = 0.2) -> Labelled:
    """Read ``path``: train/ and val/ (or valid/, test/) with class folders, or class folders directly.

    Without a val folder, ``val_share`` of each class (at least one image) is held out, as a pure function of ``seed``.

    Raises:
        UserError: fewer than two classes, a class with fewer than two images, or a class of val that train does not
            have.
    """
    table = scan([path])
    split_folders, val_name, train, val = _classes(table)
    where = f"{path!r}" if not split_folders else f"{f'{path}/train'!r}"
    if len(train) < 2:
        found = f"only {next(iter(train))!r}" if train else "none"
        raise UserError(f"{where} needs at least two class folders, but has {found}; {WANTED}")
    for name, rows in train.items():
        if len(rows) < 2:
            raise UserError(f"class {name!r} of {where} has one image, but needs at least two")
    if not val_name:
        return _pack(table, *_split(train, seed, val_share), f"{val_share:.0%} of each class held out, seed {seed}")
    unknown = [name for name in val if name not in train]
    if unknown or not val:
        reason = f"class {unknown[0]!r} is not in {where}" if unknown else "no class folders"
        raise UserError(f"{f'{path}/{val_name}'!r}: {reason}; {WANTED}")
    return _pack(table, train, val, f"train/ and {val_name}/")


def _classes(table: ImageTable) -> tuple[bool, str, Classes, Classes]:
    """Whether there is a train folder, the name of the val folder or "", and the rows of the classes of both."""
    every = [table.name(row).split("/") for row in range(len(table))]
    tops = {parts[0] for parts in every if len(parts) > 1}
    split_folders = any(parts[0] == "train" and len(parts) > 2 for parts in every)
    val_name = next((name for name in VAL_NAMES if name in tops), "") if split_folders else ""
    train: dict[str, list[int]] = {}
    val: dict[str, list[int]] = {}
    for row, parts in enumerate(every):
        if not split_folders and len(parts) > 1:
            train.setdefault(parts[0], []).append(row)
        elif split_folders and len(parts) > 2 and parts[0] in ("train", val_name):
            (train if parts[0] == "train" else val).setdefault(parts[1], []).append(row)
    return split_folders, val_name, dict(sorted(train.items())), dict(sorted(val.items()))


def _split(classes: Classes, seed: int, val_share: float) -> tuple[Classes, Classes]:
    train: dict[str, list[int]] = {}
    val: dict[str, list[int]] = {}
    for label, (name, rows) in enumerate(classes.items()):
        count = min(max(1, round(val_share * len(rows))), len(rows) - 1)
        held_out = set(sorted(range(len(rows)), key=lambda place: derive(seed, "split", label, place))[:count])
        train[name] = [row for place, row in enumerate(rows) if place not in held_out]
        val[name] = [row for place, row in enumerate(rows) if place in held_out]
    return train, val


def _pack(table: ImageTable, train: Classes, val: Classes, split: str) -> Labelled:
    def flat(rows: Classes) -> tuple[ImageTable, tuple[int, ...]]:
        pairs = [(row, label) for label, name in enumerate(train) for row in rows.get(name, ())]
        return table.take([row for row, _ in pairs]), tuple(label for _, label in pairs)

    return Labelled(tuple(train), *flat(train), *flat(val), split)
