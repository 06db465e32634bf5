# SPDX-License-Identifier: Apache-2.0
"""Rows of results/*.csv: every number with the commit, the command, the machine and the versions that made it."""

import csv
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from fastmim import __version__
from fastmim.machine import processor

RESULTS = Path(__file__).resolve().parents[1] / "results"


def origin() -> dict[str, Any]:
    """Where a number comes from."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["python", *(_short(word) for word in sys.argv)]),
        "machine": f"{processor()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "fastmim": __version__,
    }


def append(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Adds rows to results/NAME.csv; the columns are those of the first row ever written."""
    path = RESULTS / f"{name}.csv"
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        columns = list(rows[0]) if fresh else next(csv.reader(path.open(encoding="utf-8")))
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path


def read(name: str) -> list[dict[str, str]]:
    """The rows of results/NAME.csv."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _commit() -> str:
    call = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def _short(word: str) -> str:
    """A path without the folders of this machine."""
    return Path(word).name if Path(word).is_absolute() else word
