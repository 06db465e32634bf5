# SPDX-License-Identifier: Apache-2.0
"""What a run says: metrics.jsonl (the truth), status.json, TensorBoard events, and a live line for whoever watches."""

import datetime
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastmim.train.checkpoint import write_file

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    TextColumn("{task.percentage:>3.0f} %"),
    TextColumn("{task.fields[say]}"),
    TimeRemainingColumn(),
)


class RunLog:
    """Writes the log files of one run folder; entered, it also shows the progress.

    Args:
        folder: the run folder.
        tensorboard: write events too.
        quiet: show nothing (ranks after the first).
        title: of the progress bar.
    """

    def __init__(
        self, folder: Path, tensorboard: bool = True, quiet: bool = False, title: str = "pre-training"
    ) -> None:
        self.folder, self.quiet, self.title = folder, quiet, title
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet
        self._wants_events = tensorboard
        self._events: Any = None
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._metrics = folder / "metrics.jsonl"

    def __enter__(self) -> "RunLog":
        if self._live:
            self._progress = Progress(*_COLUMNS, console=self.console, transient=True)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self._events.close()

    def begin(self, step: int, steps: int) -> None:
        """Starts, or goes on after ``step`` steps: later lines of an interrupted sitting are cut off."""
        lines = self._metrics.read_bytes().splitlines(keepends=True) if self._metrics.exists() else []
        # At step 0 everything is done again, the first evaluation too.
        kept = [line for line in lines if step and line.endswith(b"\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_file(self._metrics, b"".join(kept))
        if self._wants_events:
            # Takes a second to import, so only where it is wanted.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        if self._progress is not None:
            self._bar = self._progress.add_task(self.title, total=steps, completed=step, say="")

    def metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers as events."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def status(self, state: str, step: int, steps: int, samples: int, message: str = "") -> None:
        """Replaces status.json; its heartbeat tells the living from the dead."""
        record = {
            "state": state,
            "step": step,
            "steps": steps,
            "samples": samples,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "heartbeat": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "message": message,
        }
        write_file(self.folder / "status.json", json.dumps(record, indent=1).encode())

    def advance(self, step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> None:
        """The live line: loss, images/s, share of the time spent waiting for them, time left."""
        say = f"loss {values['loss']:.4f}  {values['images_per_s']:,.0f} images/s"
        if values["data_wait"] >= 0.01:
            say += f" ({values['data_wait']:.0%} waiting for data)"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, say=say)
        else:
            left = datetime.timedelta(seconds=round(seconds_left))
            self.say(f"step {step}/{steps}  {say}  {left} left")

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False)
            sys.stderr.flush()
