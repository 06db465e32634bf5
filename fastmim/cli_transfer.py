# SPDX-License-Identifier: Apache-2.0
"""``fastmim finetune``, ``distill`` and ``predict``: from labelled images to a classifier, and what it says."""

from typing import Annotated, Any

from pydantic import Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build, dump_yaml, own_words, resolved
from fastmim.cli_output import OK, finished, print_fields
from fastmim.config import DistillConfig, FinetuneConfig, Section, TransferConfig
from fastmim.errors import UserError
from fastmim.recipes import finetune as recipes


class Finetune(FinetuneConfig):
    """Train a classifier on your labels, from a run or any weights.

    Measured on images that were kept apart, with intervals, a confusion matrix and the worst mistakes in the report.
    Every option can also be written as epochs=10, or stand in a YAML file.
    """

    config: str | None = None
    """A YAML file of options, nested or flat, such as the config.yaml of an earlier run."""
    print_config: bool = False
    """Print the options that would be used, as YAML for --config, and stop."""
    dry_run: bool = False
    """Look at the images and the weights, print what would happen, and stop."""


class Distill(DistillConfig):
    """Teach a small network what a fine-tuned run knows.

    Plain distillation of logits with strong augmentation and a long schedule (VanillaKD); name the student by --model.
    """

    config: str | None = None
    """A YAML file of options, nested or flat, such as the config.yaml of an earlier run."""
    print_config: bool = False
    """Print the options that would be used, as YAML for --config, and stop."""
    dry_run: bool = False
    """Look at the images and the networks, print what would happen, and stop."""


class Predict(Section):
    """Classify images with a fine-tuned run, into a CSV with probabilities."""

    run: Positional[str]
    """The folder of the fine-tuned run."""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGES..."), Field(min_length=1)]]
    """Folders, files, lists, archives or URLs."""
    out: str = "predictions.csv"
    """The table to write."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images; from the cores when not given."""


def finetune(words: dict[str, Any]) -> int:
    """Prints the accuracy and where the report is."""
    options = build(Finetune, own_words(words, Finetune), "finetune")
    config = resolved(words, options.config, recipes.load, FinetuneConfig)
    if options.print_config:
        print(dump_yaml(config), end="")
        return 0
    if config.data.folds is not None and config.data.fold is None and not options.dry_run:
        return _folds(config)
    return _run(config, options.dry_run)


def distill(words: dict[str, Any]) -> int:
    """Prints the accuracy and where the report is."""
    options = build(Distill, own_words(words, Distill), "distill")
    config = resolved(words, options.config, recipes.load_distill, DistillConfig)
    if options.print_config:
        print(dump_yaml(config), end="")
        return 0
    if not config.method.teacher:
        raise UserError("distill needs RUN, the fine-tuned run that teaches; see: fastmim distill --help")
    if config.method.start == "scratch" and config.method.model is None:
        raise UserError("distill needs --model, the student: a timm name, such as mobilenetv3_small_100")
    return _run(config, options.dry_run)


def predict(words: dict[str, Any]) -> int:
    """Prints where the table is, and how often each class was named."""
    options = build(Predict, words, "predict")
    from fastmim.predicting import predict as classify

    found = classify(**options.model_dump())
    for name, count in sorted(found.counts.items(), key=lambda pair: -pair[1])[:20]:
        print(f"{count:8}  {name if name.isprintable() else repr(name)}")
    print(f"{found.path}: {found.images} images" + (f", {len(found.bad)} cannot be read" if found.bad else ""))
    return 0


def _run(config: TransferConfig, dry_run: bool) -> int:
    from fastmim import transfer

    if dry_run:
        print_fields(transfer.plan_transfer(config))
        return OK
    return finished(transfer.begin_run(config).path)


def _folds(config: FinetuneConfig) -> int:
    from fastmim import transfer

    folder, summary = transfer.cross_validate(config=config)
    if not summary:
        raise KeyboardInterrupt
    folds, pooled = f"{summary['mean']:.1f} +- {summary['spread']:.1f} %", f"{summary['pooled']:.1f} %"
    print(f"{len(summary['folds'])} folds: {folds}; all images together {pooled}")
    print(folder / "folds.json")
    return OK
