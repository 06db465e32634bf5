# SPDX-License-Identifier: Apache-2.0
"""The schema of runs that learn from labels: fine-tuning, and distillation into a smaller network."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from tyro.conf import Positional, Suppress, arg

from fastmim.config.parts import ImagesConfig, OptimConfig, RunConfig, Section


class LabelledDataConfig(ImagesConfig):
    """Which labelled images, how they are split, and what is cut from them."""

    path: Positional[Annotated[str, arg(metavar="DATA")]] = ""
    """Class folders, or train/, val/ and test/ with class folders, or a .csv with columns path, label and split."""
    resolution: int = Field(default=224, ge=8)
    """Side of the square image in pixels; positions and windows follow it."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area that a crop covers."""
    labels: str | None = None
    """Learn from some labels only: 10%, or 5/class; all when not given."""
    label_seed: int = Field(default=0, ge=0, lt=2**31)
    """Chooses those labels."""
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    """Chooses the images that are held out, where DATA has no val or test part of its own."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of each class that is held out for the result, where DATA has no val or test part of its own."""
    folds: int | None = Field(default=None, ge=2)
    """Instead, train so many times, each time with another part held out, so that every image is tested once."""
    fold: int | None = Field(default=None, ge=0)
    """Only this one of the folds, from 0."""
    shuffle_labels: bool = False
    """A control: give the training images each other's labels, so that nothing can be learnt."""

    @model_validator(mode="after")
    def _check_folds(self) -> "LabelledDataConfig":
        if self.fold is not None and (self.folds is None or self.fold >= self.folds):
            raise ValueError(f"fold {self.fold} is not one of folds: {self.folds}, counted from 0")
        return self


class ClassifyConfig(Section):
    """Which network, from which weights, and how images and labels are varied."""

    recipe: str = "default"
    """The settings to begin with (a function of fastmim/recipes/finetune.py)."""
    start: Positional[Annotated[str, arg(metavar="RUN|MODEL")]] = ""
    """A run folder, a timm name (its released weights), local-dir:FOLDER, a checkpoint FILE, or scratch."""
    model: str | None = None
    """The network, a timm name, where the start does not tell it: from scratch, or from some files."""
    model_args: dict[str, Any] = Field(default={})
    """Further arguments for timm's create_model, as JSON or YAML."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads of a plain ViT, where a checkpoint file leaves them open (the original FastMIM: 6 or 12)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth: the rate in the last block, growing linearly from 0 in the first."""
    pool: Literal["avg", "token"] | None = None
    """How a plain ViT's tokens become one vector: their mean, or the class token; the mean when not given."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's words; none switches it off (it is off for images other than 8-bit colour)."""
    erase: float = Field(default=0.25, ge=0, le=1)
    """Share of the images of which a random rectangle becomes noise."""
    mixup: float = Field(default=0.8, ge=0)
    """Mixup's alpha; 0 switches it off."""
    cutmix: float = Field(default=1.0, ge=0)
    """CutMix's alpha; 0 switches it off. With both, each batch is mixed in one of the two ways."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing."""
    balance: Literal["none", "loss", "sampler"] = "none"
    """Against unequal classes: weigh the loss, or draw all classes equally often."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights with this decay, and measure and hand over that."""


class TransferOptimConfig(OptimConfig):
    """How long and how fast it learns."""

    epochs: float = Field(default=100, gt=0)
    """Passes over the training images."""
    steps: int | None = Field(default=None, ge=1)
    """Weight updates instead of epochs."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the head; 2.4e-3 * sqrt(global_batch / 1024) when not given: the paper's at 1024."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each block learns slower than the next by this factor; 0.75, but 1 from scratch, when not given."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run in which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""


class FinetuneConfig(RunConfig):
    """A whole fine-tuning run."""

    task: Suppress[Literal["finetune"]] = "finetune"
    """What kind of run this is."""
    data: LabelledDataConfig = LabelledDataConfig()
    method: ClassifyConfig = ClassifyConfig()
    optim: TransferOptimConfig = TransferOptimConfig()


class DistillMethodConfig(ClassifyConfig):
    """Which teacher and which student, and how images and labels are varied."""

    recipe: str = "distill"
    """The settings to begin with (a function of fastmim/recipes/finetune.py)."""
    teacher: Positional[Annotated[str, arg(metavar="RUN")]] = ""
    """The fine-tuned run that teaches."""
    start: str = "scratch"
    """The student's weights: scratch, a timm name (its released weights), a run, local-dir:FOLDER or a FILE."""
    alpha: float = Field(default=1.0, gt=0, le=1)
    """Share of the teacher's answer in the loss; the rest is the label's."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both answers: logits are divided by it."""


class DistillConfig(RunConfig):
    """A whole distillation run."""

    task: Suppress[Literal["distill"]] = "distill"
    """What kind of run this is."""
    data: LabelledDataConfig = LabelledDataConfig()
    method: DistillMethodConfig = DistillMethodConfig()
    optim: TransferOptimConfig = TransferOptimConfig()


TransferConfig = FinetuneConfig | DistillConfig
