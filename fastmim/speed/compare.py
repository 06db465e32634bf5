# SPDX-License-Identifier: Apache-2.0
"""``fastmim.bench``: methods take turns on one machine, and each gets a row of numbers."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastmim import __version__
from fastmim.config import Config, MethodConfig
from fastmim.errors import UserError
from fastmim.machine import processor
from fastmim.run_folder import free_folder, prepare_folder
from fastmim.speed.feed import Feed
from fastmim.speed.methods import Method, choose
from fastmim.speed.page import write_csv, write_picture
from fastmim.speed.rows import KEPT, PEAK, Bench, make_rows
from fastmim.speed.trial import MOST, Trial
from fastmim.train.device import pick_device, pick_precision

IMAGENET = 1_281_167  # images of ImageNet-1k
CPU_BATCH = 32
ROUNDS = 5  # odd, so that a median is a number that was measured

Trials = dict[str, Trial]


def bench(
    data: str | None = None,
    *,
    model: str = MethodConfig().model,
    methods: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    batch: int | None = None,
    seconds: float = 10.0,
    threads: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    epochs: float | None = None,
    images: int | None = None,
    out: str | Path | None = None,
) -> Bench:
    """Measures whole training steps of each method at equal batch, on synthetic images, and estimates a run's time.

    Methods take turns in rounds, so that whatever else the machine does meets all of them; what counts is the median.
    SimMIM at 224 px is always among them, as the baseline. Ctrl-C ends it with what is measured so far.

    Args:
        data: images whose loading is measured too, and for which the time is estimated; what ``pretrain`` takes.
        model: a timm network.
        methods: recipes with words, as ``fastmim+hide=drop+discard=4``; all that fit the network when None.
        sizes: sides of the images in pixels; each method's own when None.
        batch: images of a step; 32 on a CPU and what fits every method on a GPU when None.
        seconds: of measuring for each method and size.
        threads: of torch, on a CPU.
        device: where to compute; the fastest there is.
        precision: "bf16" or "fp32"; bf16 where the hardware has it.
        compile: compile the networks.
        epochs: to estimate a run of, beside the recipes' own.
        images: to estimate a run of; those of ``data``, or ImageNet-1k's 1,281,167.
        out: folder of bench.csv and bench.png; the next free runs/bench-001 when None.

    Raises:
        UserError: an option does not fit, the images cannot be read, or no method fits the network.
    """
    at = pick_device(device)
    with _threads(threads):
        feed = Feed(data, at) if data is not None else None
        chosen, baseline = choose(methods, sizes, model, feed.words if feed else {})
        comparison = Comparison(chosen, at, pick_precision(precision, at), compile)
        folder = Path(out) if out is not None else free_folder(Path("runs"), "bench")
        prepare_folder(folder, overwrite=False)
        comparison.measure(batch, seconds, feed)
        count = images or (feed.images if feed else IMAGENET)
        result = comparison.result(baseline, count, epochs, feed, folder)
    write_csv(result)
    write_picture(result)
    return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch, for a while; as many as before when None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Comparison:
    """Methods on one device, measured in turn; trials that two methods have in common are made once.

    Attributes:
        methods: by label, those that the network can do.
        measured: their trials, and the share of a run that each stands for.
        left_out: the others, and why.
        batch: images of a step.
        interrupted: whether somebody stopped it.

    Raises:
        UserError: no method fits the network.
    """

    def __init__(
        self, methods: Sequence[Method], device: torch.device, autocast: torch.dtype | None, compile: bool
    ) -> None:
        self.device, self.autocast, self.compile = device, autocast, compile
        self.console = Console(stderr=True, soft_wrap=True)
        self.methods: dict[str, Method] = {}
        self.measured: dict[str, list[tuple[Trial, float]]] = {}
        self.left_out: dict[str, str] = {}
        self.batch, self.interrupted = 0, False
        trials: Trials = {}
        for method in methods:
            try:
                parts = [(self._trial(config, trials), share) for config, share in method.parts]
            except UserError as error:
                self.leave_out(method.label, str(error))
                continue
            self.methods[method.label], self.measured[method.label] = method, parts
        if not self.methods:
            raise UserError(f"no method fits this network; {next(iter(self.left_out.values()))}")

    def measure(self, batch: int | None, seconds: float, feed: Feed | None) -> None:
        """Finds the batch, reads images if there are some, and lets all trials take their turns.

        Raises:
            UserError: too many images cannot be read, or the device has too little memory for any method.
        """
        self.batch = batch or (self._find_batch() if self.device.type == "cuda" else CPU_BATCH)
        if feed is not None:
            sides = sorted({side for method in self.methods.values() for side, _ in method.config.data.course})
            for side in sides:
                feed.measure([side], self.batch, seconds / ROUNDS)
                if side in feed.speed:
                    self.say(f"the loader reads {feed.speed[side]:,.0f} images/s at {side} px")
        try:
            with self._progress() as advance:
                for number in range(ROUNDS):
                    for trial, members in self._turns():
                        labels = [label for label in members if label in self.measured]
                        if not labels:  # it belonged to methods that were left out a moment ago
                            continue
                        name = f"{self.methods[labels[0]].name} at {trial.config.data.resolution} px"
                        advance(f"round {number + 1} of {ROUNDS}: {name}")
                        self._turn(trial, labels, seconds / ROUNDS)
                        if number == 0 and trial.seconds:
                            self.say(f"{name}: {self.batch / trial.seconds[0]:,.1f} images/s")
        except KeyboardInterrupt:
            if not any(trial.seconds for trial, _ in self._turns()):
                raise
            self.interrupted = True
        if not self.methods:
            raise UserError(f"no method can be measured; {next(iter(self.left_out.values()))}")

    def result(self, baseline: Method, images: int, epochs: float | None, feed: Feed | None, folder: Path) -> Bench:
        """The rows of what was measured, and the time of a run over ``images``."""
        rows, compared = make_rows(
            self.measured,
            self.methods,
            baseline.label,
            batch=self.batch,
            images=images,
            epochs=epochs,
            feed=feed.speed if feed else {},
        )
        waiting = next((row for row in rows if row.waits), None)
        return Bench(
            rows=tuple(rows),
            left_out=self.left_out,
            baseline=compared,
            facts=self._facts(baseline.config.method.model),
            images=images,
            epochs=epochs,
            remedy=feed.remedy(int(waiting.px.partition("-")[0])) if feed and waiting else "",
            interrupted=self.interrupted,
            folder=folder,
        )

    def _facts(self, model: str) -> dict[str, str | int]:
        """What all rows have in common."""
        cuda = self.device.type == "cuda"
        peaks = [peak for trial, _ in self._turns() for peak in trial.peaks]
        return {
            "model": model,
            "batch": self.batch,
            "device": torch.cuda.get_device_name(self.device) if cuda else processor(),
            "precision": "bf16" if self.autocast is not None else "fp32",
            "compile": str(self.compile).lower(),
            "threads": torch.get_num_threads(),
            "memory": PEAK if cuda else KEPT,
            "matrix_tflops": f"{median(peaks) / 1e12:.3g}",
            "torch": torch.__version__,
            "fastmim": __version__,
        }

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        self.console.print(line, markup=False, highlight=False)

    def leave_out(self, label: str, reason: str) -> None:
        """Notes that a method is not measured."""
        self.left_out[label] = reason
        self.methods.pop(label, None)
        self.measured.pop(label, None)
        self.say(f"left out: {label}: {reason}")

    def _trial(self, config: Config, trials: Trials) -> Trial:
        # How long a run is and what it is called changes no step.
        method = config.method.model_dump(mode="json", exclude={"recipe"})
        key = json.dumps([config.data.resolution, method, config.optim.clip_grad])
        if key not in trials:
            trials[key] = Trial(config, self.device, self.autocast, self.compile)
        return trials[key]

    def _turns(self) -> list[tuple[Trial, list[str]]]:
        """Each trial once, and the methods that it belongs to."""
        found: dict[int, tuple[Trial, list[str]]] = {}
        for label, parts in self.measured.items():
            for trial, _ in parts:
                found.setdefault(id(trial), (trial, []))[1].append(label)
        return list(found.values())

    def _turn(self, trial: Trial, labels: list[str], seconds: float) -> None:
        trial.batch = self.batch
        try:
            trial.turn(seconds)
        except torch.OutOfMemoryError:
            for label in labels:
                self.leave_out(label, f"a batch of {self.batch} does not fit into the memory; try a smaller --batch")

    def _find_batch(self) -> int:
        """The largest batch that all methods can have."""
        found = MOST
        for trial, labels in self._turns():
            try:
                found = min(found, trial.find_batch())
            except torch.OutOfMemoryError:
                for label in labels:
                    self.leave_out(label, "not even two images fit into the memory")
        return found

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        """A bar for whoever watches a terminal; the function moves it on by a turn."""
        columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %  {task.description}"))
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=ROUNDS * len(self._turns()), completed=-1)
            yield lambda text: bar.update(task, description=text, advance=1)
