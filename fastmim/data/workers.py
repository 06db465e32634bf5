# SPDX-License-Identifier: Apache-2.0
"""Processes that read images, and the memory through which they hand them over."""

import atexit
import contextlib
import ctypes
import functools
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmim.errors import UserError

TIMEOUT = 600  # seconds without an answer; a slow disk with large pictures may well need one or two minutes
AHEAD = 2  # pieces of work that each worker has been given and has not handed over
PR_SET_PDEATHSIG = 1
# fork starts at once and shares the table of images; forkserver (the default of Python 3.14) would import torch anew in
# each worker. Elsewhere than on Linux fork is missing or breaks the system's own libraries.
METHOD = "fork" if sys.platform == "linux" else "spawn"


class Ring:
    """Memory for ``slots`` batches that workers fill and the main process reads, again and again.

    A batch that is handed over in memory of its own costs as much as decoding a small JPEG: the system must find and
    clear new pages for each. The memory is anonymous, not in /dev/shm, of which containers have little; forked workers
    share it.
    """

    def __init__(self, slots: int, size: int) -> None:
        self.slots, self.size = slots, size
        self.memory = torch.frombuffer(mmap.mmap(-1, slots * size), dtype=torch.uint8)

    def view(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory of batch ``number``, which it shares with the batches ``slots`` before and after."""
        start = number % self.slots * self.size
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[start : start + count].view(dtype).view(shape)


Answers = Generator[Any, None, None]


def work(samples: Any, pieces: Iterable[Any], workers: int) -> Answers:
    """``samples.__getitems__`` of each of ``pieces``, in order, by ``workers`` processes (0: in this one).

    Raises:
        UserError: as ``samples`` raise it.
    """
    answers = _work(samples, pieces, workers)
    _begun.add(answers)
    return answers


def _work(samples: Any, pieces: Iterable[Any], workers: int) -> Answers:
    parallel: dict[str, Any] = {}
    over = multiprocessing.get_context(METHOD).RawValue(ctypes.c_bool, False)
    if workers:
        parallel = {
            "multiprocessing_context": METHOD,
            "timeout": TIMEOUT,
            "worker_init_fn": functools.partial(start_worker, over=over),
            "prefetch_factor": AHEAD,
        }
    with warnings.catch_warnings():
        # The number of workers is the user's choice, and changes no result; torch warns if it is above the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        # From 3.12 on, Python warns that a lock which another thread holds stays locked in the forked child. Workers
        # take no such lock: they decode with NumPy and copies of small tensors, on one thread and no device.
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
        loader: DataLoader[Any] = DataLoader(
            _OneLine(samples),
            batch_sampler=pieces,  # type: ignore[arg-type]  # a piece is a list for torch, anything for us
            collate_fn=_as_it_is,
            num_workers=workers,
            # The DataLoader draws a seed for its workers; from the global generator, that would change what follows.
            generator=torch.Generator(),
            **parallel,
        )
        with _signals_wait():
            iterator = iter(loader)
    try:
        for answer in iterator:
            if isinstance(answer, UserError):
                raise answer
            yield answer
    finally:
        over.value = True
        if workers:
            # By name: an exception keeps the iterator alive, until a collection of garbage ends it in whichever thread
            # that runs, such as one that a worker waits for.
            cast(Any, iterator)._shutdown_workers()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds signals back while workers are forked; each lets them through once it has its own handlers.

    Until then torch's would end a worker of which nobody would learn, since it ends as if it had done its work.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signals() -> list[signal.Signals]:
    """Those that a cluster or a person sends to all processes of a run."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextlib.contextmanager
def lost_workers(command: str) -> Iterator[None]:
    """One line where torch has many: it raises wherever the main process is when a worker dies.

    Args:
        command: what goes on with the work.

    Raises:
        UserError: a worker was killed, or gave no answer for too long.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        reason = str(error).splitlines()[0].removeprefix("DataLoader ")
        raise UserError(
            f"a process that reads images was lost ({reason}): out of memory, or a file that takes too long?"
            f" Go on with {command}, perhaps with fewer --workers"
        ) from None


_begun: "weakref.WeakSet[Answers]" = weakref.WeakSet()


@atexit.register
def _close() -> None:
    """Ends workers that nobody has ended; Python would ask them by a signal that they ignore, and wait for ever."""
    for answers in list(_begun):
        with contextlib.suppress(ValueError):  # a generator that is running cannot be closed
            answers.close()


class _OneLine(Dataset[Any]):
    """Hands a UserError over as an answer: raised in a worker, torch would add a traceback to its line."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitems__(self, piece: Any) -> Any:
        try:
            return self.samples.__getitems__(piece)
        except UserError as error:
            return error


def _as_it_is(answer: Any) -> Any:
    return answer


def start_worker(_: int = 0, over: Any = None) -> None:
    """Makes this process a worker, which ends when the main process says so or dies, and not by signals.

    A cluster sends its signals to the whole process group; a worker that died of one would fail the main process in
    the middle of its last checkpoint.

    Args:
        over: shared; once it is true, SIGTERM ends the worker, whatever it waits for.
    """
    torch.set_num_threads(1)
    for number in _signals():
        signal.signal(number, signal.SIG_IGN)
    if over is not None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.value else None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # the parent died before the line above
            os._exit(1)
