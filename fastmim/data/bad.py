# SPDX-License-Identifier: Apache-2.0
"""Which images could not be read, and when they are too many."""

import csv
import itertools
from pathlib import Path
from typing import Any

from fastmim.errors import UserError

MEND = "mend or remove them"


class BadImages:
    """Keeps the reason for every unreadable image, lists each once in a CSV file, and stops when they are too many.

    Args:
        total: images of the run.
        max_share: share of them that may be unreadable.
        log: the CSV file (path, reason), which lists those of earlier sittings too.
        mend: what a person can do.
    """

    def __init__(self, total: int, max_share: float, log: Path | None, mend: str = MEND) -> None:
        self.total, self.max_share, self.log, self.mend = total, max_share, log, mend
        self.reasons: dict[str, str] = {}
        if log is not None and log.exists():
            with _open_csv(log, "r") as file:
                self.reasons = dict(row for row in itertools.islice(csv.reader(file), 1, None) if len(row) == 2)

    def add(self, found: list[tuple[str, str]], complete: bool) -> None:
        """Take note of the (path, reason) pairs of one batch, which is ``complete`` if every bad one could be replaced.

        Raises:
            UserError: too many images cannot be read.
        """
        if not found:
            return
        new = {path: reason for path, reason in found if path not in self.reasons}
        self.reasons.update(new)
        if self.log is not None and new:
            self._append(self.log, new)
        if not complete or len(self.reasons) > self.max_share * self.total:
            path, reason = next(iter(self.reasons.items()))
            where = f", all in {str(self.log)!r}" if self.log is not None else ""
            raise UserError(
                f"{len(self.reasons)} of {self.total} images ({len(self.reasons) / self.total:.1%}) cannot be read; "
                f"first {path!r}: {reason}{where}; {self.mend}, or allow more with --max-bad"
            )

    @staticmethod
    def _append(log: Path, rows: dict[str, str]) -> None:
        begun = log.exists()
        with _open_csv(log, "a") as file:
            csv.writer(file).writerows(([] if begun else [("path", "reason")]) + list(rows.items()))


def _open_csv(path: Path, mode: str) -> Any:
    """Names may be any bytes: surrogateescape and newline="" bring them back unchanged."""
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
