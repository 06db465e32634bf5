# SPDX-License-Identifier: Apache-2.0
"""One method at one size, ready to make training steps: their time, their memory and their arithmetic."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim.config import Config, update
from fastmim.run_network import build_network
from fastmim.seeding import derive
from fastmim.tasks.pretrain import Pretrain, build_mim
from fastmim.tasks.resolve import resolve
from fastmim.train.batch import find_micro_batch, free_memory
from fastmim.train.optim import adamw

MOST = 256  # images of a batch that is looked for
_FEW = 2  # images for counting; one is too few for batch norm


class Trial:
    """A network, its optimiser and a batch; on the device only while it is its turn.

    Args:
        config: of one size, not resolved.
        device: where it is measured.
        autocast: arithmetic of the network; float32 when None.
        compile: compile the network.

    Attributes:
        macs: multiply-accumulates per image of forward and backward pass; of matrix products and convolutions.
        memory: bytes of a step, see `count_memory`.
        seconds: of a step, in each round.
        peaks: floating-point operations per second of a matrix product, just before each of these.

    Raises:
        UserError: the network does not fit the options.
    """

    def __init__(self, config: Config, device: torch.device, autocast: torch.dtype | None, compile: bool) -> None:
        channels = config.data.channels
        # What images look like changes no time.
        config = update(config, {"mean": (0.5,) * channels, "std": (0.25,) * channels})
        torch.manual_seed(derive(0, "init"))
        backbone = build_network(config, None)
        self.config = resolve(config, backbone, MOST)
        self.task = Pretrain(build_mim(self.config, backbone), self.config).train()
        optim = self.config.optim
        # A rate so low that weights stay as they are: they are to stay finite on images that mean nothing.
        self.optimizer = adamw(self.task.param_groups(optim.weight_decay), 1e-9, optim.betas)
        self.device, self.autocast, self.compile = device, autocast, compile
        self.batch = 0
        self.macs, self.memory, self.seconds, self.peaks = 0.0, 0, list[float](), list[float]()
        self._pace: float | None = None

    def find_batch(self) -> int:
        """The largest power of two, up to 256 images, that fits the device."""
        try:
            self.task.to(self.device)
            return find_micro_batch(self.task, self._example, MOST, self.device, free_memory(self.device))
        finally:
            self.task.to("cpu")

    def turn(self, seconds: float) -> None:
        """Makes steps for about ``seconds``, but at least one, and notes what they took; the first turn counts too."""
        peak = matrix_speed(self.device, self.autocast)
        with self._awake():
            if self._pace is None:
                self.macs = count_macs(self.task, self._example(_FEW))
                if self.device.type != "cuda":
                    self.memory = count_kept(self.task, self._example(self.batch), self.autocast)
                if self.compile:
                    self.task.compile()
                self._steps(1)  # compiles, chooses algorithms, makes room
                self._pace = self._steps(1)
            elif self._pace < seconds / 4:  # else what a step warms is little beside what it costs
                self._steps(1)
            if self._pace < seconds or self.seconds:
                self._pace = self._steps(max(1, int(seconds / self._pace)))
            if self.device.type == "cuda":
                self.memory = max(self.memory, torch.cuda.max_memory_allocated(self.device))
        self.seconds.append(self._pace)
        self.peaks.append(peak)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One weight update, as `fastmim.train.engine.Fit` makes it."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss, _ = self.task(batch)
        loss.backward()
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _steps(self, count: int) -> float:
        """Seconds per step."""
        batch = self._example(self.batch)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.step(batch)
        synchronize(self.device)
        return (time.perf_counter() - start) / count

    def _example(self, count: int) -> dict[str, Tensor]:
        data = self.config.data
        shape = (count, data.channels, data.resolution, data.resolution)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return {
            "images": images.float() if data.values == "raw" else images,
            "keys": torch.arange(count, device=self.device),
            "progress": torch.full((), 0.5, device=self.device),
        }

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """On the device with all that training keeps there; afterwards it leaves nothing to the others."""
        try:
            self.task.to(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            for parameter in self.task.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            self.optimizer.step()  # makes the moments, which is no part of a usual step
            self.optimizer.zero_grad(set_to_none=True)
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.state.clear()
            self.task.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def count_macs(task: nn.Module, batch: dict[str, Tensor]) -> float:
    """Multiply-accumulates per image of a forward and backward pass, in matrix products and convolutions.

    Attention is counted as plain products: kernels that compute parts of it twice to save memory count as little.

    Args:
        task: gives (loss, logs) for a batch.
        batch: with ``images``.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = task(batch)
        loss.backward()
    task.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2 / len(batch["images"])


def count_kept(task: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of a batch, each storage once and weights not at all.

    Args:
        task: gives (loss, logs) for a batch.
        batch: with ``images``.
        autocast: arithmetic of the network; float32 when None.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    kept: dict[int, int] = {}

    # The storages themselves, so that none is freed and its place taken by another while they are counted; not the
    # tensors, of whose graph a part would then keep itself for ever.
    alive: list[torch.UntypedStorage] = []

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)

    kind = batch["images"].device.type
    with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            loss, _ = task(batch)
        del loss
    return sum(kept.values())


def matrix_speed(device: torch.device, dtype: torch.dtype | None, side: int | None = None) -> float:
    """Floating-point operations per second of a large matrix product.

    Args:
        device: where.
        dtype: of the matrices; float32 when None.
        side: of the square matrices; large enough for the device when None.
    """
    side = side or (8192 if device.type == "cuda" else 1536)
    one, other = torch.randn(2, side, side, device=device, dtype=dtype or torch.float32)
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(one, other)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times[1:])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
