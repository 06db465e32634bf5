# SPDX-License-Identifier: Apache-2.0
"""The schema of a pre-training run: what is hidden, what is predicted, and all that every run has."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro
from pydantic import BeforeValidator, Field, model_validator

from fastmim.config.parts import ImagesConfig, RunConfig, Section, SystemConfig, listed


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


Phases = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_phases)]
Scales = Annotated[Literal["stages", "localmim"] | tuple[int, ...], BeforeValidator(_scales)]


class DataConfig(ImagesConfig):
    """Which images, and what is cut from them."""

    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")]] = ()
    """Folders (searched to any depth), files, .txt or .csv lists, .tar files, what prepare wrote, or URLs (s3://)."""
    resolution: int = Field(default=128, ge=8)
    """Side of the square training crop in pixels; low is what makes it fast. With phases, the last one's."""
    phases: Annotated[Phases | None, tyro.conf.arg(metavar="PX:SHARE,...")] = None
    """Sizes in turn, each for a share of the run, as 128:0.6,160:0.3,192:0.1 (FastMIM-P); one size when not given."""
    holdout: float = Field(default=0.02, ge=0, lt=0.5)
    """Share of the images that is never trained on (at most 512), for the reconstruction loss on unseen images."""

    @property
    def course(self) -> tuple[tuple[int, float], ...]:
        """(resolution, share of the run) of every phase; one where none are given."""
        return self.phases or super().course

    @model_validator(mode="before")
    @classmethod
    def _end_with_the_last_phase(cls, values: Any) -> Any:
        phases = _phases(values.get("phases")) if isinstance(values, Mapping) else None
        return {**values, "phases": phases, "resolution": phases[-1][0]} if phases else values

    @model_validator(mode="after")
    def _check_phases(self) -> "DataConfig":
        if self.phases is not None:
            total = sum(share for _, share in self.phases)
            if min(share for _, share in self.phases) <= 0 or abs(total - 1) > 1e-6:
                raise ValueError(f"the shares of phases add up to {total:g}; all must be above 0, and 1 together")
            if min(resolution for resolution, _ in self.phases) < 8:
                raise ValueError("phases: a resolution is at least 8 px")
        return self


class MethodConfig(Section):
    """What is hidden, what is predicted, and by what."""

    recipe: str = "fastmim"
    """The method whose settings are the starting point (a file of fastmim/recipes)."""
    model: str = "vit_small_patch16_224"
    """Any timm model, or local-dir:FOLDER (an exported run or a timm hub folder) to start from its weights."""
    pretrained: bool = False
    """Start from timm's released weights (needs the network) instead of from scratch."""
    init: str | None = None
    """Start from these weights: a run, local-dir:FOLDER, or a checkpoint FILE of many layouts; tells the model too."""
    model_args: dict[str, Any] = Field(default={})
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


class PretrainSystemConfig(SystemConfig):
    """Where and how it runs, and what is measured on the way."""

    eval_data: str | None = None
    """A folder of class folders (or of train/ and val/ with class folders) for kNN and linear accuracy on the way."""


class Config(RunConfig):
    """A whole pre-training run."""

    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    system: PretrainSystemConfig = PretrainSystemConfig()
