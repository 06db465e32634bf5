# SPDX-License-Identifier: Apache-2.0
"""The loop: it knows the ``Task`` protocol and its own parts, and no method, model or data set."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastmim.config import OptimConfig
from fastmim.errors import UserError
from fastmim.seeding import derive
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.distributed import Ranks, any_rank, barrier, mean_of_ranks, parallel
from fastmim.train.log import RunLog
from fastmim.train.optim import adamw, learning_rate
from fastmim.train.signals import StopRequest

Batch = dict[str, Tensor]
WAITING = 0.1  # share of the time spent waiting for images from which on a person should know


@runtime_checkable
class Carry(Protocol):
    """Brings tensors of parameters' old shapes, weights or moments of them, to their new ones by one linear map."""

    def __call__(self, name: str, value: Tensor, *, positive: bool = False) -> Tensor:
        """``value`` as the parameter ``name`` has its shape now; ``positive``: what is not negative stays so."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is trained: an ``nn.Module`` with a loss, groups of parameters, and an evaluation."""

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and further scalars for the log; no host synchronisation."""
        ...

    def param_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Groups for the optimiser; ``lr_scale`` of a group multiplies its learning rate."""
        ...

    def stepped(self) -> None:
        """Called after each weight update."""
        ...

    def enter(self, phase: int) -> Carry:
        """Goes over to another phase, where parameters may have other shapes; called only where there are several."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Numbers that say whether it still learns; changes neither weights nor random state."""
        ...


@runtime_checkable
class Loader(Protocol):
    """Endless micro-batches, as a pure function of the step."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from the first one of ``start_step``."""
        ...


class NotLearningError(UserError):
    """The loss is no longer a finite number."""


@runtime_checkable
class Phase(Protocol):
    """A part of the run: from step ``begin`` on, ``micro_batch`` images at a time."""

    @property
    def begin(self) -> int: ...

    @property
    def micro_batch(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """How long, in which portions, and how often to look up."""

    optim: OptimConfig  # resolved: global_batch and lr are numbers
    steps: int
    phases: Sequence[Phase]  # in order of their beginnings, the first from step 0 on
    images: int
    log_every: int = 20
    eval_steps: int = 0  # 0: never
    checkpoint_seconds: float = 600.0
    autocast: torch.dtype | None = None
    remedy: Callable[[float], str] | None = None  # what would make images come faster, given images a second

    @property
    def global_batch(self) -> int:
        """Images per weight update over all ranks."""
        assert self.optim.global_batch is not None
        return self.optim.global_batch

    def phase(self, step: int) -> int:
        """Number of the phase to which a step belongs."""
        return max(number for number, phase in enumerate(self.phases) if phase.begin <= step)


@dataclass
class Clock:
    """Where the time went: over all sittings, and since the last reading of the loss.

    Evaluations and checkpoints count in the time of the run, but not in images per second.
    """

    total: float = 0.0
    training: float = 0.0
    waiting: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, training: bool = True) -> None:
        """Books the time since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.total += seconds
        self.training += seconds if training else 0.0

    def reading(self) -> tuple[float, float]:
        """Seconds of training, and of waiting for images, since the last reading."""
        self.lap()
        spent = (self.training, self.waiting)
        self.training = self.waiting = 0.0
        return spent


class Fit:
    """Trains from the newest whole checkpoint, or from the start, to the last step or to a signal.

    The same steps are made whatever interrupts them: data, masks and dropout are functions of the step, and the
    checkpoint holds weights, the optimiser's moments and the step.
    """

    def __init__(
        self,
        task: nn.Module,
        loader: Loader,
        plan: Plan,
        checkpoints: Checkpoints,
        log: RunLog,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.task, self.loader, self.plan, self.device, self.ranks = task, loader, plan, device, ranks
        self.checkpoints, self.log = checkpoints, log
        assert plan.optim.lr is not None
        self.peak = plan.optim.lr
        self.clock = Clock()
        # The sum of the losses since the last reading stays on the device: reading it would wait for the device.
        self.loss_sum = torch.zeros((), device=device)
        self.loss_steps = 0
        self.phase = 0
        self.rate = 0.0  # of the last update
        self.optimizer = self._optimizer()
        self.start = self._restore()
        self.told = False

    def run(self) -> str:
        """Makes the steps that are left.

        Returns:
            "finished" or "interrupted"; in both cases the last step is in a checkpoint.

        Raises:
            NotLearningError: the loss is NaN or infinite.
        """
        plan, log = self.plan, self.log
        if self.ranks.first:
            log.begin(self.start, plan.steps)
            log.status("running", self.start, plan.steps, self.start * plan.global_batch)
        model = parallel(self.task, self.device)
        saved, step, due = self.start, self.start, time.perf_counter() + plan.checkpoint_seconds
        if self.start == 0:
            self._evaluate(0)
        with StopRequest() as stop:
            batches = self.loader.batches(self.start)
            while step < plan.steps:
                if plan.phase(step) != self.phase:
                    self._enter(plan.phase(step))
                    model = parallel(self.task, self.device)
                    if self.ranks.first:
                        log.say(f"phase {self.phase + 1} of {len(plan.phases)} begins")
                self._step(model, batches, step)
                step += 1
                reading = step % plan.log_every == 0 or step == plan.steps
                if reading:
                    self._read(step)
                if plan.eval_steps and (step % plan.eval_steps == 0 or step == plan.steps):
                    self._evaluate(step)
                # One rank may stop at once; several agree where they wait for each other anyway.
                if (self.ranks.world == 1 or reading) and any_rank(bool(stop), self.device):
                    break
                if reading and any_rank(time.perf_counter() > due, self.device):
                    self._save(step)
                    saved, due = step, time.perf_counter() + plan.checkpoint_seconds
            if saved < step:
                self._save(step)
        state = "finished" if step == plan.steps else "interrupted"
        if self.ranks.first:
            message = f"stopped by {stop.signal.name}" if stop.signal else ""
            log.status(state, step, plan.steps, step * plan.global_batch, message)
        return state

    def _step(self, model: nn.Module, batches: Iterator[Batch], step: int) -> None:
        """One weight update."""
        optim = self.plan.optim
        total = self.plan.steps * self.plan.global_batch
        rate = learning_rate(step * self.plan.global_batch, total, self.peak, optim.warmup, optim.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        torch.manual_seed(derive(optim.seed, "step", step, self.ranks.rank))  # dropout, drop path
        progress = torch.full((), step / self.plan.steps, device=self.device)
        accumulate = self.plan.global_batch // (self.plan.phases[self.phase].micro_batch * self.ranks.world)
        for _ in range(accumulate):
            batch = {**self._next(batches), "progress": progress}
            with torch.autocast(self.device.type, dtype=self.plan.autocast, enabled=self.plan.autocast is not None):
                loss, _logs = model(batch)
            (loss / accumulate).backward()
            self.loss_sum += loss.detach() / accumulate
        if optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.task.parameters(), optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.stepped()  # type: ignore[operator]
        self.loss_steps += 1
        self.rate = rate

    def _enter(self, phase: int) -> None:
        """Goes over to another phase; the optimiser's moments change their shapes with the parameters."""
        moments = self._moments()
        carry = self.task.enter(phase)  # type: ignore[operator]
        self.phase, self.optimizer = phase, self._optimizer()
        self._set_moments(
            {
                name: {
                    # Adam counts its steps in a number; a mean of squares must stay one.
                    kind: value if kind == "step" else carry(name, value, positive=kind == "exp_avg_sq")
                    for kind, value in kinds.items()
                }
                for name, kinds in moments.items()
            }
        )

    def _optimizer(self) -> torch.optim.AdamW:
        optim = self.plan.optim
        return adamw(self.task.param_groups(optim.weight_decay), self.peak, optim.betas)  # type: ignore[operator]

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """What the optimiser remembers, by the parameters' names."""
        named = self.task.named_parameters()
        return {name: dict(self.optimizer.state[value]) for name, value in named if value in self.optimizer.state}

    def _set_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter in self.task.named_parameters():
            if name in moments:
                kinds = {kind: value.to(parameter.device) for kind, value in moments[name].items()}
                self.optimizer.state[parameter] = kinds

    def _next(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.clock.waiting += time.perf_counter() - began
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _read(self, step: int) -> None:
        """Waits for the device, reads the mean loss since the last reading, and tells it."""
        plan = self.plan
        loss = mean_of_ranks(self.loss_sum).item() / self.loss_steps
        seconds, waiting = self.clock.reading()
        done, self.loss_steps = self.loss_steps, 0
        self.loss_sum.zero_()
        if not math.isfinite(loss):
            if self.ranks.first:
                self.log.status("failed", step, plan.steps, step * plan.global_batch, "the loss is not finite")
            raise NotLearningError(f"the loss is not finite at step {step}; a lower --lr or --clip-grad 1 may help")
        if not self.ranks.first:
            return
        speed = done * plan.global_batch / seconds
        values = {
            "samples": step * plan.global_batch,
            "epoch": step * plan.global_batch / plan.images,
            "loss": loss,
            "lr": self.rate,
            "images_per_s": speed,
            "data_wait": waiting / seconds,
            "seconds": self.clock.total,
        }
        if len(plan.phases) > 1:
            values["phase"] = self.phase
        self.log.metrics("train", step, values)
        self.log.status("running", step, plan.steps, step * plan.global_batch)
        self.log.advance(step, plan.steps, values, (plan.steps - step) * plan.global_batch / speed)
        self._watch(step, values)

    def _watch(self, step: int, values: dict[str, float]) -> None:
        """Says once what to do when the device waits for images."""
        first = step <= self.start + self.plan.log_every  # holds the start of the workers
        if first or self.told or self.plan.remedy is None or values["data_wait"] <= WAITING:
            return
        self.told = True
        remedy = self.plan.remedy(values["images_per_s"])
        self.log.say(f"{values['data_wait']:.0%} of the time is spent waiting for images; faster with {remedy}")

    def _evaluate(self, step: int) -> None:
        plan = self.plan
        self.clock.lap()
        if plan.eval_steps and self.ranks.first:
            values = self.task.evaluate()  # type: ignore[operator]
            place = {"samples": step * plan.global_batch, "epoch": step * plan.global_batch / plan.images}
            self.log.metrics("eval", step, {**place, **values, "seconds": self.clock.total})
        barrier()
        self.clock.lap(training=False)

    def _save(self, step: int) -> None:
        self.clock.lap()
        if self.ranks.first:
            moments = {
                f"{kind}.{name}": value for name, kinds in self._moments().items() for kind, value in kinds.items()
            }
            state: dict[str, Any] = {
                "samples": step * self.plan.global_batch,
                "seconds": self.clock.total,
                "loss_sum": self.loss_sum.item(),
                "loss_steps": self.loss_steps,
                "phase": self.phase,
            }
            self.checkpoints.save(step, {"model": self.task.state_dict(), "optimizer": moments}, state)
        barrier()
        self.clock.lap(training=False)

    def _restore(self) -> int:
        """Takes everything from the newest whole checkpoint; returns the steps that it had made."""
        found, damage = self.checkpoints.latest()
        for line in damage:
            self.log.say(f"left out a damaged checkpoint: {line}")
        if found is None:
            return 0
        if found.state.get("phase", 0) != self.phase:
            self._enter(found.state["phase"])
        self.task.load_state_dict(found.tensors["model"])
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in found.tensors["optimizer"].items():
            kind, _, name = key.partition(".")
            moments.setdefault(name, {})[kind] = value
        self._set_moments(moments)
        self.loss_sum += found.state["loss_sum"]
        self.loss_steps = found.state["loss_steps"]
        self.clock.total = found.state["seconds"]
        return found.step
