# SPDX-License-Identifier: Apache-2.0
"""Work spread over processes, of which some may die: a library may crash on, or never return from, a damaged file."""

import contextlib
import multiprocessing
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from fastmim.data.workers import METHOD, start_worker
from fastmim.errors import UserError

ItemT = TypeVar("ItemT")
LIMIT = 120.0  # seconds that a piece may take


@dataclass
class _Worker(Generic[ItemT]):
    process: Any
    pipe: Connection
    piece: Sequence[ItemT] = ()
    begun: float = 0.0


def over_processes(
    function: Callable[[Sequence[ItemT]], Any], pieces: Sequence[Sequence[ItemT]], workers: int, limit: float = LIMIT
) -> Iterator[tuple[Sequence[ItemT], Any]]:
    """Every piece with ``function(piece)``, in the order in which they are done.

    A piece at which the process dies, or which takes more than ``limit`` seconds, is tried again item by item; an item
    for which it happens again comes with None. With 0 workers all is done in this process, without that safety.

    Raises:
        UserError: ``function`` raised it.
        RuntimeError: ``function`` raised something else; the text is the worker's traceback.
    """
    if not workers:
        for piece in pieces:
            yield piece, function(piece)
        return
    waiting = deque(pieces)
    crew = [_start(function) for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or any(worker.piece for worker in crew):
            for worker in crew:
                if not worker.piece and waiting:
                    _give(worker, waiting.popleft())
            for worker, answer in _settled(crew, limit):
                piece, worker.piece = worker.piece, ()
                if answer is not None:
                    yield piece, answer[0]
                    continue
                _end(worker)
                crew[crew.index(worker)] = _start(function)
                if len(piece) > 1:
                    waiting.extendleft([item] for item in reversed(piece))
                else:
                    yield piece, None
    finally:
        for worker in crew:
            _end(worker)


def _start(function: Callable[[Sequence[ItemT]], Any]) -> _Worker[ItemT]:
    context: Any = multiprocessing.get_context(METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    with warnings.catch_warnings():
        # As in workers.work: nothing that a worker runs takes a lock that another thread of the parent may hold.
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker[ItemT], piece: Sequence[ItemT]) -> None:
    worker.piece, worker.begun = piece, time.monotonic()
    with contextlib.suppress(OSError):  # it has died while idle: that is seen when its answer is waited for
        worker.pipe.send(piece)


def _settled(crew: Sequence[_Worker[ItemT]], limit: float) -> list[tuple[_Worker[ItemT], tuple[Any] | None]]:
    """Workers that have answered, with the answer, and those that have died or take too long, with None."""
    busy = [worker for worker in crew if worker.piece]
    ready = wait([worker.pipe for worker in busy], timeout=1.0)
    late = time.monotonic() - limit
    answered = [(worker, _answer(worker)) for worker in busy if worker.pipe in ready]
    return answered + [(worker, None) for worker in busy if worker.pipe not in ready and worker.begun < late]


def _answer(worker: _Worker[Any]) -> tuple[Any] | None:
    """What the worker says, in a tuple; None if it has died."""
    try:
        kind, answer = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    if kind == "user":
        raise UserError(answer)
    if kind == "fault":
        raise RuntimeError(f"a worker failed:\n{answer}")
    return (answer,)


def _end(worker: _Worker[Any]) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(function: Callable[[Sequence[Any]], Any], pipe: Connection) -> None:
    start_worker()
    while True:
        try:
            piece = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", function(piece))
        except UserError as error:
            answer = ("user", str(error))
        except Exception:
            answer = ("fault", traceback.format_exc())
        pipe.send(answer)
