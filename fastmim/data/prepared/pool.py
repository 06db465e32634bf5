# SPDX-License-Identifier: Apache-2.0
"""Processes that each write one shard at a time, and what is shown meanwhile."""

import contextlib
import ctypes
import datetime
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastmim.data.prepared.records import Plan
from fastmim.data.prepared.writer import Done, remove_scratch, write_shard
from fastmim.data.read import is_remote
from fastmim.data.table import ImageTable
from fastmim.data.workers import METHOD, start_worker
from fastmim.errors import UserError

LIMIT = 600.0  # seconds for one image; a slow disk may well need one or two minutes
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
LINE_EVERY = 10.0  # seconds between two lines where nobody watches live


def write_shards(table: ImageTable, numbers: Iterable[int], plan: Plan, folder: Path, workers: int) -> Iterator[Done]:
    """Writes the shards ``numbers``, one after another in this process (0 workers) or ``workers`` at a time.

    When the iterator is closed early, whole shards stay, and those that were begun are removed.

    Raises:
        UserError: the folder cannot be written to, or a worker was killed.
    """
    if workers == 0:
        try:
            for number in numbers:
                yield from write_shard(table, number, plan, folder)
        except OSError as error:
            raise UserError(_cannot_write(folder, error)) from None
        return
    pool = _Pool(table, plan, folder, workers)
    try:
        yield from pool.run(numbers)
    finally:
        pool.stop()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    row: Any
    """Of the image that it is working on; in shared memory, which outlives the process."""
    number: int | None = None
    """Of the shard that it is writing."""
    heard: float = 0.0
    reported: int = 0
    """Images of that shard."""


class _Pool:
    def __init__(self, table: ImageTable, plan: Plan, folder: Path, workers: int) -> None:
        self._args = (table, plan, folder)
        # Clients of object stores run threads, which a forked process does not have.
        remote = any(map(is_remote, table.containers))
        self._context: Any = multiprocessing.get_context("spawn" if remote else METHOD)
        self._deadly: dict[int, str] = {}
        self._workers = [self._start() for _ in range(workers)]

    def run(self, numbers: Iterable[int]) -> Iterator[Done]:
        waiting = deque(numbers)
        while True:
            for worker in self._workers:
                if worker.number is None and waiting:
                    self._give(worker, waiting.popleft())
            busy = [worker for worker in self._workers if worker.number is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                if worker.pipe in ready:
                    yield from self._hear(worker)
                elif time.monotonic() - worker.heard > LIMIT:
                    yield self._replace(worker, "takes too long")

    def stop(self) -> None:
        """Ends the processes, whatever they do, and removes what they began."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            self._clear(worker)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        row = self._context.RawValue(ctypes.c_int64, -1)
        with warnings.catch_warnings():
            # As in fastmim.data.workers: workers take no lock that another thread may hold.
            warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
            process = self._context.Process(target=_work, args=(theirs, row, *self._args), daemon=True)
            process.start()
        theirs.close()
        return _Worker(process, ours, row)

    def _give(self, worker: _Worker, number: int) -> None:
        worker.number, worker.heard, worker.reported = number, time.monotonic(), 0
        with contextlib.suppress(OSError):  # a worker that has died is found out by the reading
            worker.pipe.send((number, self._deadly))

    def _hear(self, worker: _Worker) -> Iterator[Done]:
        worker.heard = time.monotonic()
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            if code is not None and -code in CRASHES and worker.row.value >= 0:
                yield self._replace(worker, "crashes its decoder")
                return
            raise UserError(
                f"a worker ended by itself (exit code {code}; -9 often means that memory ran out);"
                " finished shards are kept: run the same command again, perhaps with fewer --workers"
            ) from None
        if kind == "report":
            worker.reported += content[0]
            yield Done(*content)
        elif kind == "whole":
            worker.number = None
        elif kind == "mistake":
            raise UserError(content)
        else:
            raise RuntimeError(f"a worker failed:\n{content}")

    def _replace(self, worker: _Worker, reason: str) -> Done:
        """Another process begins the shard again, and leaves out the image over which the first one failed.

        What was reported of it is taken back.
        """
        self._deadly[worker.row.value] = reason
        worker.process.kill()
        number = worker.number
        assert number is not None
        self._clear(worker)
        self._workers.remove(worker)
        self._workers.append(self._start())
        self._give(self._workers[-1], number)
        return Done(-worker.reported, ())

    def _clear(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        if worker.number is not None:
            with contextlib.suppress(OSError):
                remove_scratch(self._args[2], worker.number)


def _work(connection: Connection, row: Any, table: ImageTable, plan: Plan, folder: Path) -> None:
    """A worker: shard numbers in, reports out, until the main process ends it."""
    start_worker()

    def begin(number: int) -> None:
        row.value = number

    try:
        while True:
            number, deadly = connection.recv()
            for report in write_shard(table, number, plan, folder, begin, deadly):
                connection.send(("report", tuple(report)))
            connection.send(("whole", None))
    except (EOFError, ConnectionError):
        return  # the main process has gone
    except UserError as error:
        connection.send(("mistake", str(error)))
    except OSError as error:
        connection.send(("mistake", _cannot_write(folder, error)))
    except Exception:
        connection.send(("failure", traceback.format_exc()))


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"{str(folder)!r} cannot be written to: {error.strerror or error}; finished shards are kept:"
        " mend that and run the same command again"
    )


class Watch:
    """Shows how far it is: a live line on a terminal, a plain line now and then elsewhere.

    Args:
        total: images to go through.
        before: how many of them were done in earlier sittings.
        quiet: show nothing.
    """

    def __init__(self, total: int, before: int, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._total, self._before, self._done = total, before, before
        self._started = self._said = time.monotonic()
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = ("{task.description}", "{task.percentage:>3.0f} %", "{task.fields[say]}")
            first, *rest = map(TextColumn, columns)
            self._live = Progress(
                first, BarColumn(24), *rest, TimeRemainingColumn(), console=self._console, transient=True
            )
            self._task = self._live.add_task("preparing", total=total, completed=before, say="")
            self._live.start()

    def add(self, images: int) -> None:
        """So many images more are done."""
        self._done += images
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        say = f"{self._done:,} of {self._total:,} images  {rate:,.0f} images/s"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, say=say)
        elif now - self._said > LINE_EVERY and rate:
            self._said = now
            left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
            self._console.print(f"{say}  {left} left", markup=False, highlight=False)
            sys.stderr.flush()

    def close(self) -> None:
        """Takes the live line away."""
        if self._live is not None:
            self._live.stop()
