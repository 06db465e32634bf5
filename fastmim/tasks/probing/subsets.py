# SPDX-License-Identifier: Apache-2.0
"""Which labels are learnt from: shares or numbers of each class, and what of them is held out to choose by."""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from fastmim.errors import UserError
from fastmim.seeding import derive

_NUMBER = r"(\d+\.?\d*|\.\d+)"


@dataclass(frozen=True)
class Labels:
    """How many labels of each class are learnt from: a ``share`` of them, or ``each`` so many."""

    share: float | None = None
    each: int | None = None

    @property
    def name(self) -> str:
        """As it is written: "10%" or "5/class"."""
        return f"{self.each}/class" if self.each is not None else f"{100 * (self.share or 0):g}%"

    def count(self, members: int) -> int:
        """Of a class with so many ``members``: at least one, and no more than there are."""
        wanted = self.each if self.each is not None else round((self.share or 0) * members)
        return min(members, max(1, wanted))


def read_labels(text: str | float) -> Labels:
    """One setting as a person writes it: ``10%``, ``0.1`` or ``5/class``.

    Raises:
        UserError: it is none of these, or no share between 0 and 1.
    """
    written = str(text).replace(" ", "")
    if number := re.fullmatch(r"(\d+)/class", written):
        if int(number[1]) > 0:
            return Labels(each=int(number[1]))
    elif (number := re.fullmatch(_NUMBER + r"(%?)", written)) and 0 < (
        share := float(number[1]) / (100 if number[2] else 1)
    ) < 1:
        return Labels(share=share)
    raise UserError(
        f"labels = {text!r} is not a share between 0 and 100 % or a number of each class; write 10%, 0.1 or 5/class"
    )


def label_subsets(labels: Int64[Tensor, "N"], setting: Labels, repeats: int, seed: int) -> list[Int64[Tensor, "_"]]:
    """Random parts of the training set, each with so much of every class as the setting says.

    A pure function of its arguments; the indices are ascending. Of one repeat, fewer labels are a part of more.
    """
    chosen = []
    for repeat in range(repeats):
        parts = []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator(seed, "probe-subset", repeat, label))
            parts.append(members[order[: setting.count(len(members))]])
        chosen.append(torch.cat(parts).sort().values)
    return chosen


def inner_split(labels: Int64[Tensor, "N"], seed: int) -> tuple[Int64[Tensor, "_"], Int64[Tensor, "_"]]:
    """What of the training part is learnt from, and the fifth (at least one image) that hyperparameters are chosen by.

    One image of each class is never held out, so that what is learnt can name every class. With one image a class
    nothing is left to choose by: the second part is empty.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "probe-strength"))
    shuffled = labels[order]
    free = torch.ones(len(labels), dtype=torch.bool)
    for label in labels.unique():
        free[(shuffled == label).nonzero()[-1]] = False
    held = free & (free.cumsum(0) <= max(1, len(labels) // 5))
    return order[~held], order[held]


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Random numbers for one purpose at one position."""
    return torch.Generator().manual_seed(derive(seed, purpose, *position))
