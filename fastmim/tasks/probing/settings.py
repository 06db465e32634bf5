# SPDX-License-Identifier: Apache-2.0
"""What a probe measures: which methods, on how many labels, how often."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmim.config import listed, nearest
from fastmim.errors import UserError
from fastmim.tasks.probing.methods import METHODS
from fastmim.tasks.probing.subsets import Labels, read_labels


@dataclass(frozen=True)
class Settings:
    """What a probe measures; see `read_settings`."""

    methods: tuple[str, ...] = ("linear", "knn")
    labels: tuple[Labels, ...] = (Labels(share=0.5),)
    repeats: int = 3
    k: int = 20
    seed: int = 0


def read_settings(
    methods: str | Sequence[str] = "knn,linear",
    labels: str | float | Sequence[str | float] = "50%",
    repeats: int = 3,
    k: int = 20,
    seed: int = 0,
) -> Settings:
    """The settings as a person writes them, in one order whatever was written.

    Args:
        methods: names of ``METHODS``, as ``knn,linear`` or one by one.
        labels: of which share, or of how many of each class, to learn: ``1%,10%,5/class``, 0.1, or one by one.
        repeats: other labels so often, at least twice: one alone shows no spread.
        k: neighbours that vote.
        seed: chooses the labels.

    Raises:
        UserError: one of them does not fit.
    """
    names = [name.strip() for name in listed(methods)]
    unknown = next((name for name in names if name not in METHODS), None)
    if unknown is not None or not names:
        hint = nearest(unknown or "", list(METHODS)) or f"; there are {', '.join(METHODS)}"
        raise UserError(f"unknown method '{unknown or ''}'{hint}")
    if repeats < 2:
        raise UserError(f"repeats is {repeats}, but at least 2 are needed to show a spread")
    if k < 1:
        raise UserError(f"k is {k}, but must be at least 1")
    written = [labels] if isinstance(labels, int | float) else listed(labels)
    found = {setting.name: setting for setting in map(read_labels, written)}
    if not found:
        raise UserError("no labels are given to learn from; write 10%, 0.1 or 5/class")
    return Settings(tuple(name for name in METHODS if name in names), tuple(found.values()), repeats, k, seed)
