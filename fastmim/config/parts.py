# SPDX-License-Identifier: Apache-2.0
"""What every kind of run is asked: which images, how long and how fast it learns, where and how it runs."""

from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen group of options; unknown names are refused and the sentence below each field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def listed(value: Any) -> Any:
    """``0.5,0.4,0.4``, as a command line gives it, as a list."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]


class ImagesConfig(Section):
    """What is cut from the images, and how they are kept."""

    resolution: int = Field(default=128, ge=8)
    """Side of the square training crop in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    flip: bool = True
    """Mirror half of the crops left to right."""
    channels: int = Field(default=3, ge=1)
    """Channels that the network sees: 3 (grey is repeated), 1 (colour becomes grey), or exactly what the files have."""
    values: Literal["8bit", "raw"] = "8bit"
    """Values that it sees: 0 to 255, or the stored ones (16 bits, floats, Hounsfield units) unchanged."""
    mean: Annotated[Numbers | None, tyro.conf.arg(metavar="N,N,N")] = None
    """What is subtracted from each channel, as 0.5,0.4,0.4 (0 to 1, or stored units); ImageNet's for 8-bit colour."""
    std: Annotated[Numbers | None, tyro.conf.arg(metavar="N,N,N")] = None
    """What each channel is divided by; mean and std of other images are measured when not given."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Keep a small square of each image, so that it is decoded in the first epoch only: in memory, or in the run."""
    cache_size: int | None = Field(default=None, ge=8)
    """Side of the squares in the cache; twice the resolution when not given."""
    crop_on: Literal["cpu", "device"] | None = None
    """Where crops are cut from prepared or cached squares; on the device if it is a GPU, when not given."""
    shuffle_shards: int = Field(default=16, ge=1)
    """Prepared shards in an object store are mixed this many at a time."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be read."""

    @property
    def course(self) -> tuple[tuple[int, float], ...]:
        """(resolution, share of the run) of every phase; one where none are given."""
        return ((self.resolution, 1.0),)

    @property
    def largest(self) -> int:
        """The largest resolution of the run."""
        return max(resolution for resolution, _ in self.course)

    @model_validator(mode="after")
    def _check(self) -> "ImagesConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {low} {high}, but needs 0 < smallest <= largest <= 1")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) != self.channels:
                raise ValueError(f"{name} has {len(numbers)} numbers, but there are {self.channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0 for each channel")
        return self


class OptimConfig(Section):
    """How long and how fast it learns."""

    epochs: float = Field(default=400, gt=0)
    """Passes over the images."""
    global_batch: int | None = Field(default=None, ge=1)
    """Images per weight update, over all devices; from the number of images when not given (64 to 4096)."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images per forward pass and device; found from the free memory when not given."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; 2.4e-3 * sqrt(global_batch / 4096) when not given: the paper's, at its batch of 4096."""
    lr_per_256: float | None = Field(default=None, gt=0)
    """Peak learning rate for a global batch of 256, scaled linearly; the paper's 1.5e-4 suits batches of thousands."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(default=0.025, ge=0, lt=1)
    """Share of the run in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of weights; norms, biases, mask and position tokens have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Clip the gradient's norm to this."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every random number of the run follows from it."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.lr is not None and self.lr_per_256 is not None:
            raise ValueError("lr and lr_per_256 exclude each other; give one")
        return self


class SystemConfig(Section):
    """Where and how it runs; none of this changes what is learnt (beyond rounding)."""

    out: str | None = None
    """The run folder; runs/pretrain/MODEL-DATA-001 and so on when not given."""
    overwrite: bool = False
    """Empty the run folder first, if it holds an earlier run."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    shard_cache: str | None = None
    """Where shards of an object store are kept; below ~/.cache/fastmim when not given."""
    shard_cache_gb: float = Field(default=50.0, gt=0)
    """Disk that they may take; those that were used longest ago are deleted first."""
    precision: Literal["bf16", "fp32"] | None = None
    """Arithmetic of the network; bf16 where the hardware has it, when not given."""
    compile: bool = False
    """Compile the network with torch.compile: slower to start, faster to run."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images; from the cores when not given."""
    checkpoint_every: float = Field(default=10.0, gt=0)
    """Minutes between checkpoints."""
    keep: int = Field(default=2, ge=2)
    """Checkpoints to keep."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two readings of the loss (each one waits for the device)."""
    eval_every: float = Field(default=0.1, gt=0, le=1)
    """Share of the run between two evaluations."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    allow_data_change: bool = False
    """Resume although the images have changed since the run began."""


class RunConfig(Section):
    """What all runs have; each kind of run adds its method."""

    data: ImagesConfig = ImagesConfig()
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()
