# SPDX-License-Identifier: Apache-2.0
"""Images with labels, for measuring only: class folders, as ImageFolder and timm read them, of any source."""

from dataclasses import dataclass

from fastmim.data.splits import splits
from fastmim.data.table import ImageTable


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
    """Read ``path`` as `fastmim.data.splits.splits` does; of a val and a test part, the val part.

    Without either, ``val_share`` of each class (at least one image) is held out, as a pure function of ``seed``.

    Raises:
        UserError: as there.
    """
    found = splits(path, seed=seed, test_share=val_share)
    return Labelled(
        found.classes, found.train.table, found.train.labels, found.shown.table, found.shown.labels, found.how
    )
