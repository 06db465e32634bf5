# SPDX-License-Identifier: Apache-2.0
"""Were the test images seen before? Exact and near duplicates of them among other images.

Images that were pre-trained on without labels flatter a run a little; images that are among the labelled training
images too flatter every start, and much. To pre-train on the training images of the same set is fair: the labels are
what is scarce.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from fastmim.comparing.starts import Start
from fastmim.config import Config
from fastmim.data.inspection import duplicates
from fastmim.data.inspection.look import Look, crashed, row_type
from fastmim.data.inspection.pool import over_processes
from fastmim.data.inspection.statistics import spread
from fastmim.data.read import is_remote
from fastmim.data.sources.scan import scan
from fastmim.data.splits import splits
from fastmim.data.table import ImageTable
from fastmim.errors import UserError
from fastmim.machine import cores
from fastmim.run_folder import Run

MOST = 100_000
"""Images that are opened for near duplicates: some minutes. Exact ones are looked for among all."""
SHOWN = 8
AT_ONCE = 16
FEW = 200  # images that are looked at in this process
TRAIN = "labelled training images"
Rows = Shaped[np.ndarray, " _"]


@dataclass(frozen=True)
class Leak:
    """Test images that are among other images too.

    Attributes:
        of: the other images: name of a run, or ``TRAIN``.
        note: why it was not checked, or what else to know; may be empty.
        checked: whether it was.
        images: how many other images.
        opened: how many of them were opened for near duplicates.
        plain: test images too plain (one colour, dark) to be told apart by near duplicates.
        exact: test images (places in the sorted paths) with the same bytes as another image.
        near: test images that look like one, without those.
        examples: (test image, other image, exact or near).
    """

    of: str
    note: str
    checked: bool
    images: int = 0
    opened: int = 0
    plain: int = 0
    exact: tuple[int, ...] = ()
    near: tuple[int, ...] = ()
    examples: tuple[tuple[str, str, str], ...] = ()

    @property
    def leaked(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted({*self.exact, *self.near}))


def check(data: str, test: Sequence[str], starts: Sequence[Start]) -> list[Leak]:
    """The training images of ``data``, and what every run was pre-trained on, against the test images.

    Args:
        data: the labelled images.
        test: paths of the test images, as predictions.csv has them.
        starts: those that are no runs are not checked.

    Raises:
        UserError: a test image is not among ``data``.
    """
    parts = splits(data)
    every = parts.test.table
    place = {every.path(row): row for row in range(len(every))}
    unknown = next((path for path in test if path not in place), None)
    if unknown is not None:
        raise UserError(f"predictions name {unknown!r}, which is not among the test images of {data}")
    rows = np.array([place[path] for path in test], dtype=np.int64)
    images = every.take(rows)
    training = parts.train.table
    found = [compare_tables(TRAIN, training, images, 3, False)]
    for start in starts:
        if start.kind == "run":
            found.append(_of_run(start, images, training))
        elif start.kind != "scratch":
            found.append(Leak(start.name, "what it was pre-trained on is not known here", False))
    return found


def compare_tables(of: str, others: ImageTable, test: ImageTable, channels: int, raw: bool, most: int = MOST) -> Leak:
    """Which images of ``test`` are among ``others``.

    Args:
        of: what to call the others.
        others: as a table.
        test: as a table; places in the result are its rows.
        channels: that the pictures are seen with.
        raw: whether stored values are seen.
        most: of the others that are opened for near duplicates, evenly spread.
    """
    if any(is_remote(container) for container in (*others.containers, *test.containers)):
        return Leak(of, "the images lie in an object store", False, len(others))
    opened = spread(len(others), most)
    mine = _look(test, np.isin(test.size, others.size), np.ones(len(test), bool), channels, raw)
    theirs = _look(others, np.isin(others.size, test.size), np.isin(np.arange(len(others)), opened), channels, raw)
    examples: dict[int, tuple[str, str, str]] = {}
    exact = _exact(mine, theirs)
    for row, other in exact.items():
        examples[row] = (test.path(row), others.path(other), "exact")
    near = {row: other for row, other in _near(mine, theirs).items() if row not in exact}
    for row, other in near.items():
        examples[row] = (test.path(row), others.path(other), "near")
    plain = int((mine["opened"] & (mine["reason"] == b"") & (mine["detail"] < duplicates.MIN_DETAIL)).sum())
    note = "" if len(opened) == len(others) else f"near duplicates among {len(opened):,} of them, evenly spread"
    shown = [examples[row] for row in (*sorted(exact), *sorted(near))][:SHOWN]
    return Leak(
        of, note, True, len(others), len(opened), plain, tuple(sorted(exact)), tuple(sorted(near)), tuple(shown)
    )


def left_out(leaks: Sequence[Leak], images: int) -> Bool[np.ndarray, " images"]:
    """True for the test images that leaked from anywhere."""
    lost = np.zeros(images, bool)
    for leak in leaks:
        lost[list(leak.leaked)] = True
    return lost


def _of_run(start: Start, test: ImageTable, training: ImageTable) -> Leak:
    config = Run(start.start).config
    try:
        table = _pretraining_images(config)
    except UserError:
        return Leak(start.name, "the images that it was pre-trained on are gone", False)
    leak = compare_tables(start.name, table, test, config.data.channels, config.data.values == "raw")
    own = {training.path(row) for row in range(len(training))}
    shared = sum(table.path(row) in own for row in range(len(table)))
    fair = f"{shared:,} are training images of this set, which is fair: it saw no labels" if shared else ""
    recorded = (Run(start.start).read("data.json") or {}).get("fingerprint")
    moved = "the images have changed since it was pre-trained" if recorded not in (None, table.fingerprint) else ""
    note = "; ".join(part for part in (leak.note, fair, moved) if part)
    return Leak(**{**vars(leak), "note": note})


def _pretraining_images(config: Config) -> ImageTable:
    if not config.data.paths:
        raise UserError("the run names no images")
    return scan(config.data.paths)


def _look(
    table: ImageTable, to_hash: Bool[np.ndarray, " n"], to_open: Bool[np.ndarray, " n"], channels: int, raw: bool
) -> Rows:
    """A row for each image: its checksum and what its pixels look like, where asked for."""
    rows = np.zeros(len(table), row_type(channels))
    places = np.flatnonzero(to_hash | to_open)
    wanted = [(row, bool(to_hash[row]), bool(to_open[row])) for row in places.tolist()]
    pieces = [wanted[start : start + AT_ONCE] for start in range(0, len(wanted), AT_ONCE)]
    look = Look(table, channels, raw)
    for piece, answer in over_processes(look, pieces, cores() if len(wanted) > FEW else 0):
        rows[[row for row, _, _ in piece]] = crashed(piece, channels) if answer is None else answer
    return rows


def _exact(mine: Rows, theirs: Rows) -> dict[int, int]:
    """My row -> one of theirs with the same bytes."""
    known = {row["digest"].tobytes(): place for place, row in reversed(list(enumerate(theirs))) if row["hashed"]}
    found = ((place, known.get(row["digest"].tobytes())) for place, row in enumerate(mine) if row["hashed"])
    return {place: other for place, other in found if other is not None}


def _near(mine: Rows, theirs: Rows) -> dict[int, int]:
    """My row -> one of theirs that looks the same.

    Groups are connected by pairs, of mine alone too, so every one of mine is compared with theirs of its group.
    """
    kept = [np.flatnonzero(_detailed(rows)) for rows in (mine, theirs)]
    rows = np.concatenate([mine[kept[0]], theirs[kept[1]]])
    small = np.maximum(rows["width"], rows["height"]) < duplicates.SMALL_PIXELS
    found: dict[int, int] = {}
    for group in duplicates.near(rows["hash"], rows["thumb"], small):
        members: Int64[np.ndarray, " m"] = np.array(group)
        ours, others = members[members < len(kept[0])], members[members >= len(kept[0])]
        if not len(others):
            continue
        for one in ours.tolist():
            both = small[others] | small[one]
            same = duplicates.alike(np.repeat(rows["thumb"][[one]], len(others), 0), rows["thumb"][others], both)
            if same.any():
                found[int(kept[0][one])] = int(kept[1][others[same.argmax()] - len(kept[0])])
    return found


def _detailed(rows: Rows) -> Any:
    return rows["opened"] & (rows["reason"] == b"") & (rows["detail"] >= duplicates.MIN_DETAIL)
