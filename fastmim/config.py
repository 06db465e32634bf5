# SPDX-License-Identifier: Apache-2.0
"""The schema of a run, in four sections: what can change the result (data, method, optim), and what cannot (system).

Every leaf name is unique, so the same words work flat on the command line (``--mask-ratio 0.6``), flat in Python
(``mask_ratio=0.6``) and nested or flat in YAML. ``None`` always means "chosen from the network, the data and the
machine"; the value that was chosen is what the run folder's ``config.yaml`` holds.

This module imports neither torch nor timm: ``--help`` must answer at once.
"""

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastmim.errors import UserError


class Section(BaseModel):
    """A frozen group of options; unknown names are refused and the sentence below each field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def listed(value: Any) -> Any:
    """``0.5,0.4,0.4``, as a command line gives it, as a list."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


def _phases(value: Any) -> Any:
    """``128:0.6,160:0.4``, as a command line gives it, as pairs."""
    if value is None:
        return None
    pairs = [pair.split(":") for pair in value.strip().split(",")] if isinstance(value, str) else value
    try:
        found = [(int(resolution), float(share)) for resolution, share in pairs]
        if not found:
            raise ValueError("none")
        return found
    except (TypeError, ValueError):
        raise ValueError("phases are pairs of a size in px and a share of the run, as 128:0.6,160:0.4") from None


def _scales(value: Any) -> Any:
    """``1,3,-1`` as a list; words as they are."""
    if not isinstance(value, str) or value in ("stages", "localmim"):
        return value
    try:
        return [int(number) for number in listed(value)]
    except ValueError:
        raise ValueError("scales are stages, localmim, or numbers of maps as 1,3,-3,-1") from None


Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]
Phases = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_phases)]
Scales = Annotated[Literal["stages", "localmim"] | tuple[int, ...], BeforeValidator(_scales)]


class DataConfig(Section):
    """Which images, and what is cut from them."""

    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")]] = ()
    """Folders (searched to any depth), files, .txt or .csv lists, .tar files, what prepare wrote, or URLs (s3://)."""
    resolution: int = Field(default=128, ge=8)
    """Side of the square training crop in pixels; low is what makes it fast. With phases, the last one's."""
    phases: Annotated[Phases | None, tyro.conf.arg(metavar="PX:SHARE,...")] = None
    """Sizes in turn, each for a share of the run, as 128:0.6,160:0.3,192:0.1 (FastMIM-P); one size when not given."""
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
    holdout: float = Field(default=0.02, ge=0, lt=0.5)
    """Share of the images that is never trained on (at most 512), for the reconstruction loss on unseen images."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be read."""

    @property
    def course(self) -> tuple[tuple[int, float], ...]:
        """(resolution, share of the run) of every phase; one where none are given."""
        return self.phases or ((self.resolution, 1.0),)

    @property
    def largest(self) -> int:
        """The largest resolution of the run."""
        return max(resolution for resolution, _ in self.course)

    @model_validator(mode="before")
    @classmethod
    def _end_with_the_last_phase(cls, values: Any) -> Any:
        phases = _phases(values.get("phases")) if isinstance(values, Mapping) else None
        return {**values, "phases": phases, "resolution": phases[-1][0]} if phases else values

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.phases is not None:
            total = sum(share for _, share in self.phases)
            if min(share for _, share in self.phases) <= 0 or abs(total - 1) > 1e-6:
                raise ValueError(f"the shares of phases add up to {total:g}; all must be above 0, and 1 together")
            if min(resolution for resolution, _ in self.phases) < 8:
                raise ValueError("phases: a resolution is at least 8 px")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {low} {high}, but needs 0 < smallest <= largest <= 1")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) != self.channels:
                raise ValueError(f"{name} has {len(numbers)} numbers, but there are {self.channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0 for each channel")
        return self


class MethodConfig(Section):
    """What is hidden, what is predicted, and by what."""

    recipe: str = "fastmim"
    """The method whose settings are the starting point (a file of fastmim/recipes)."""
    model: str = "vit_small_patch16_224"
    """Any timm model, or local-dir:FOLDER (an exported run or a timm hub folder) to start from its weights."""
    pretrained: bool = False
    """Start from timm's released weights (needs the network) instead of from scratch."""
    model_args: dict[str, Any] = {}
    """Further arguments for timm's create_model, as JSON or YAML: {"drop_path_rate": 0.1}."""
    discard: int = Field(default=0, ge=0)
    """Last blocks of the network that take no part in pre-training; fine-tuning starts with fresh ones."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the blocks that is hidden in every image."""
    masking: Literal["random", "blockwise", "grid", "selective"] = "random"
    """Which blocks: any, whole rectangles, all but one of each 2 x 2, or by the energy of their gradients."""
    masks: int = Field(default=1, ge=1, le=16)
    """Masks of each decoded image and step, which hide different parts of it."""
    predict_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the blocks that is predicted, at most mask_ratio; all hidden ones when not given."""
    block: int | None = Field(default=None, ge=1)
    """Side of a hidden block in pixels; about an eighth of the crop, but not below the stride, when not given."""
    hide: Literal["pixels", "tokens", "drop", "compact"] = "pixels"
    """How: a learnt colour (any network), a learnt token, not encoded (fastest), or visible blocks moved together."""
    target: Literal["hog", "hog_colour", "pixels", "pixels_norm"] = "hog"
    """What is predicted: histograms of gradients (and mean colours), pixels, or pixels normalised per patch."""
    cell: int | None = Field(default=None, ge=1)
    """Side of a target's cell in pixels; HOG: 8, or the largest divisor of the block below; pixels: the stride."""
    scales: Annotated[Scales | None, tyro.conf.arg(metavar="MAPS")] = None
    """Predict from several maps, finer cells from earlier ones: stages, localmim, or numbers such as 1,3,-3,-1."""
    loss: Literal["l1", "l2"] = "l2"
    """Absolute or squared error, averaged over predicted cells and channels."""
    decoder: Literal["linear", "transformer", "cross"] = "transformer"
    """What turns features into the prediction: a layer, or blocks of attention; thrown away after pre-training."""
    decoder_dim: int | None = Field(default=None, ge=8)
    """Width of the decoder's blocks; from the network's width when not given."""
    decoder_depth: int | None = Field(default=None, ge=1)
    """Blocks of the decoder; 1 for a plain network, 4 for a hierarchical one when not given."""

    @model_validator(mode="after")
    def _check(self) -> "MethodConfig":
        if self.predict_ratio is not None and self.predict_ratio > self.mask_ratio:
            raise ValueError(f"predict_ratio {self.predict_ratio} is above mask_ratio {self.mask_ratio}")
        if self.hide == "compact" and self.masking != "grid":
            raise ValueError(
                "hide=compact needs masking=grid, which leaves one block of each 2 x 2 to be moved together"
            )
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
    eval_data: str | None = None
    """A folder of class folders (or of train/ and val/ with class folders) for kNN and linear accuracy on the way."""
    eval_every: float = Field(default=0.1, gt=0, le=1)
    """Share of the run between two evaluations."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    allow_data_change: bool = False
    """Resume although the images have changed since the run began."""


class Config(Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "method": MethodConfig,
    "optim": OptimConfig,
    "system": SystemConfig,
}
# The word that users type where it is not the field's name: `data=` means `data.paths=`.
WORDS = {"data": "paths"}


def locate(word: str, where: str = "") -> tuple[str, str]:
    """The (section, field) that a user's word means; ``-`` and ``_`` are the same.

    Raises:
        UserError: no such option; the nearest names are given.
    """
    name = word.replace("-", "_")
    name = WORDS.get(name, name)
    for section, schema in SECTIONS.items():
        if name in schema.model_fields:
            return section, name
    raise UserError(f"{where}{': ' if where else ''}unknown option '{word}'{nearest(word, option_words())}")


def option_words() -> list[str]:
    """Every word that a run takes, in the schema's order."""
    back = {field: word for word, field in WORDS.items()}
    return [back.get(field, field) for schema in SECTIONS.values() for field in schema.model_fields]


def nearest(word: str, names: list[str]) -> str:
    """An ending for an error line: ``; nearest: a, b``, or nothing when no name is near."""
    found = difflib.get_close_matches(word.replace("-", "_"), names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else ""


def update(config: Config, words: Mapping[str, Any], where: str = "options") -> Config:
    """``config`` with values set by flat words (``epochs``) or by whole sections (``optim: {epochs: ...}``).

    Raises:
        UserError: an unknown word, or a value that does not fit; ``where`` names the place in the message.
    """
    tree = config.model_dump()
    given: set[str] = set()
    for word, value in words.items():
        if word in SECTIONS and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                section, field = locate(str(inner), where)
                if section != word:
                    raise UserError(f"{where}: '{inner}' stands under '{word}', but belongs under '{section}'")
                tree[section][field] = inner_value
                given.add(field)
        else:
            section, field = locate(word, where)
            plain = _plain(value)
            tree[section][field] = (plain,) if field == "paths" and isinstance(plain, str) else plain
            given.add(field)
    _let_the_last_word_win(tree, given)
    return validate(tree, where)


def _let_the_last_word_win(tree: dict[str, dict[str, Any]], given: set[str]) -> None:
    """Two words for one thing: what is given now replaces the other, which a recipe or a file may have set."""
    for section, word, other in (
        ("optim", "lr", "lr_per_256"),
        ("optim", "lr_per_256", "lr"),
        ("data", "resolution", "phases"),
    ):
        if word in given and tree[section][word] is not None and other not in given:
            tree[section][other] = None


def _plain(value: Any) -> Any:
    """Paths as text, as YAML and the command line give them."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def validate(tree: Mapping[str, Any], where: str = "options") -> Config:
    """A ``Config`` from nested plain values.

    Raises:
        UserError: the first value that does not fit, in one line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "value"
        message = first["msg"].removeprefix("Value error, ")
        # A section's own check speaks of its fields by name; what was given there is the whole section.
        given = "" if isinstance(first["input"], Mapping) else f"{name} = {first['input']!r}: "
        raise UserError(f"{where}: {given}{message}") from None
