# SPDX-License-Identifier: Apache-2.0
"""The report of a run that learnt from labels: how good it is, where it is wrong, and what that is worth."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from fastmim.config import DistillConfig, FinetuneConfig, TransferConfig
from fastmim.recipes import finetune as recipes
from fastmim.report import caveats, confusion, facts
from fastmim.report.curves import Chart, draw_chart, is_number, read_series
from fastmim.report.figures import Tile, data_uri
from fastmim.report.folder import Answers, Record, TransferFolder
from fastmim.report.parts import common_parts

MOST_ROWS = 30
"""Classes that are listed at once; the rest can be unfolded."""
MOST_PAIRS = 12
_SURE = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
_SHOWN = {"test": "test images", "val": "validation images"}
_KINDS = {"finetune": ("fine-tuning", "fine-tuned"), "distill": ("distillation", "taught")}


@dataclass(frozen=True)
class Measure:
    """A number with what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class ClassRow:
    """How one class fares; percentages are None where there are no images to tell."""

    name: str
    learnt: int | None
    images: int
    right: int
    recall: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, and how sure it was."""

    tile: Tile | None
    path: str
    place: str
    """The end of the path: folder and file."""
    label: str
    answer: str
    p_answer: float
    p_label: float


def transfer_report(run: TransferFolder) -> dict[str, Any]:
    """What transfer.html.j2 shows."""
    config, outcome = run.config, run.outcome
    name = facts.dataset_name(_paths(run))
    noun, verb = _KINDS[config.task if config else "finetune"]
    verb = "trained" if config and config.task == "finetune" and config.method.start == "scratch" else verb
    rows = class_rows(run) if outcome else []
    return {
        **common_parts(run),
        "kind": noun,
        "title": _model(run) or run.path.resolve().name,
        "subtitle": f"{verb} on {name}" if name else "",
        "verdict": verdict(run),
        "lead": lead(run),
        "caveats": caveats.caveats(run),
        "tiles": _tiles(run),
        "facts": key_facts(run),
        "measures": measures(outcome, run.answers) if outcome else [],
        "sure": sure_rows(run.answers) if run.answers else [],
        "charts": _charts(run),
        **_confusions(outcome),
        "classes": rows,
        "first": MOST_ROWS if len(rows) > MOST_ROWS + 10 else len(rows),
        "mistakes": mistakes(run) if outcome else [],
        "options": _options(config) if config else [],
        "uses": list(_uses(run)),
    }


def verdict(run: TransferFolder) -> str:
    """The result in one plain sentence."""
    if run.outcome:
        rates = run.outcome["accuracy"]
        return (
            f"{rates['top1']:.1f} % of {run.outcome['test']:,} test images are named rightly (95 % interval "
            f"{rates['low']:.1f} to {rates['high']:.1f}); always naming the most frequent class would get "
            f"{rates['majority']:.1f} %."
        )
    so_far = facts.last(run.evals, "accuracy")
    reached = f" On the way, {so_far:.1f} % were named rightly in the last look." if so_far is not None else ""
    return f"How good it is has not been measured: this run folder has no finetune.json.{reached}"


def lead(run: TransferFolder) -> str:
    """One sentence: what was trained on what, for how long."""
    config, seconds, device = run.config, facts.seconds_spent(run), facts.device_name(run)
    name, images, classes = facts.dataset_name(_paths(run)), run.data.get("images"), run.data.get("classes")
    words = [_model(run) or "A network", "was", _begun(config)]
    words.append(f"on {images:,} labelled images" if images else "on labelled images")
    words.append(f"of {len(classes):,} classes" if classes else "")
    words.append(f"from {name}" if name else "")
    words.append(f"at {config.data.resolution} px" if config else "")
    step, epoch = facts.last(run.train, "step"), facts.last(run.train, "epoch")
    if step and epoch:
        words.append(f"for {step:,.0f} steps ({epoch:.3g} epochs)" + ("" if facts.finished(run) else " so far"))
    taken = f", which took {facts.duration(seconds)}" + (f" on {device}" if device else "") if seconds else ""
    return " ".join(word for word in words if word) + taken + "."


def key_facts(run: TransferFolder) -> list[tuple[str, str]]:
    """Name and value of what one asks first."""
    config, outcome, data = run.config, run.outcome or {}, run.data
    split = outcome.get("split") or data.get("split") or ""
    images = [
        f"{data['images']:,} to learn from" if is_number(data.get("images")) else "",
        f"{outcome['test']:,} to test" if outcome else "",
        facts.images_on_disk({**data, "images": None}),
    ]
    rows = [
        ("Network", f"{_model(run)}{facts.parameters(run)}" if _model(run) else ""),
        ("Begun from", str((config.method.start if config else outcome.get("start")) or "")),
        ("Images", ", ".join(part for part in images if part)),
        ("Split", split),
        ("Class sizes", _class_sizes(data)),
    ]
    if config:
        optim, method, side = config.optim, config.method, config.data.resolution
        if isinstance(config, DistillConfig):
            rows.insert(1, ("Teacher", config.method.teacher))
        batch = f"{optim.global_batch:,} images a step" if optim.global_batch else ""
        rate = f"{optim.lr:.3g} at the peak" if optim.lr else ""
        decay = f"{optim.layer_decay:g} from block to block" if optim.layer_decay not in (None, 1.0) else ""
        rows += [
            ("Resolution", f"{side} x {side} px"),
            ("Varied by", _varied(config)),
            ("Class balance", {"loss": "the loss is weighed", "sampler": "classes are drawn equally often"}.get(
                method.balance, "")),
            ("Batch", batch),
            ("Learning rate", ", ".join(part for part in (rate, decay) if part)),
        ]  # fmt: skip
    return [(name, value) for name, value in [*rows, *facts.costs(run)] if value]


def measures(outcome: Record, answers: Answers | None) -> list[Measure]:
    """The numbers of finetune.json with their meaning."""
    rates, classes = outcome["accuracy"], len(outcome["classes"])
    towards = ""
    if answers is not None and len(answers.right):
        gap = 100 * float(answers.confidence.mean() - answers.right.mean())
        towards = f" On the whole it is {'too sure' if gap > 0 else 'less sure than it could be'} ({gap:+.1f} points)."
    found = [
        Measure("Accuracy", f"{rates['top1']:.1f} %", "Share of the test images that are named rightly."),
        Measure(
            "Balanced accuracy", f"{rates['balanced']:.1f} %",
            "Mean of the classes' recalls: every class counts the same, however many images it has.",
        ),
        Measure(
            "Macro F1", f"{rates['macro_f1']:.1f} %",
            "Mean of the classes' F1 scores: low where a class is missed, and where others are taken for it.",
        ),
        Measure(
            "Log loss", f"{outcome['nll']:.3f}",
            f"Mean of -ln of the probability that the right class was given, in nats; {math.log(classes):.3f} for"
            " calling all classes equally likely.",
        ),
        Measure(
            "Calibration error", f"{outcome['ece']:.1f} %",
            "How far the stated probabilities are from how often they are right, over 15 bins; 0 is best." + towards,
        ),
    ]  # fmt: skip
    if "top5" in rates:
        found.insert(
            1, Measure("Top-5 accuracy", f"{rates['top5']:.1f} %", "The right class is among the five likeliest.")
        )
    return found


def sure_rows(answers: Answers) -> list[tuple[str, str, str]]:
    """For several thresholds of the probability: which answers, how many, and how many of them are right."""
    rows = []
    for threshold in _SURE:
        kept = answers.confidence >= threshold
        count = int(kept.sum())
        if count:
            name = f"at least {100 * threshold:.0f} %" if threshold else "any"
            share = f"{count:,} ({100 * count / len(kept):.0f} %)"
            rows.append((name, share, f"{100 * float(answers.right[kept].mean()):.1f} %"))
    return rows


def class_rows(run: TransferFolder) -> list[ClassRow]:
    """Every class, the one with the lowest recall first; those that were not tested last."""
    assert run.outcome is not None
    learnt = (run.data.get("counts") or {}).get("train") or []
    counts = dict(zip(run.data.get("classes") or [], learnt, strict=False))
    rows = [
        ClassRow(
            one["class"], counts.get(one["class"]), one["images"], run.outcome["confusion"][place][place],
            one["recall"], one["precision"], one["f1"],
        )
        for place, one in enumerate(run.outcome["per_class"])
    ]  # fmt: skip
    return sorted(rows, key=lambda row: math.inf if row.recall is None else row.recall)


def mistakes(run: TransferFolder) -> list[Mistake]:
    """The surest wrong answers, surest first, with pictures where there are some."""
    assert run.outcome is not None
    named, thumbs = run.outcome["mistakes"], run.thumbs
    found = []
    for place, one in enumerate(named):
        tile = None
        if thumbs is not None and len(thumbs) == len(named):
            alt = f"labelled {one['label']}, named {one['predicted']}"
            tile = Tile("", alt, data_uri(thumbs[place].transpose(1, 2, 0)))
        path, sure, right = one["path"], 100 * one["p_predicted"], 100 * one["p_label"]
        found.append(
            Mistake(tile, path, "/".join(PurePath(path).parts[-2:]), one["label"], one["predicted"], sure, right)
        )
    return found


def rerun_command(config: TransferConfig) -> str:
    """The shell command that gives the same run again: the recipe, and every option that differs from it."""
    words = [config.task, "--recipe", config.method.recipe]
    second = config.method.teacher if isinstance(config, DistillConfig) else config.method.start
    given = {"path", "teacher" if isinstance(config, DistillConfig) else "start"}
    return facts.shell_command(words, facts.changed(config, _recipe(config), given), [config.data.path, second])


def _recipe(config: TransferConfig) -> TransferConfig:
    name = config.method.recipe
    if isinstance(config, DistillConfig):
        return recipes.load_distill(name) if name == "distill" else DistillConfig()
    return recipes.load(name) if name in recipes.names() else FinetuneConfig()


def _paths(run: TransferFolder) -> list[str]:
    if run.config:
        return [run.config.data.path]
    return list(run.data.get("paths") or [])


def _model(run: TransferFolder) -> str:
    return str((run.config.method.model if run.config else (run.outcome or {}).get("model")) or "")


def _begun(config: TransferConfig | None) -> str:
    if config is None:
        return "trained"
    begun = "" if config.method.start == "scratch" else f" (begun from {config.method.start})"
    if isinstance(config, DistillConfig):
        return f"taught by {config.method.teacher}{begun}"
    return f"fine-tuned from {config.method.start}" if begun else "trained from scratch"


def _class_sizes(data: Record) -> str:
    counts = (data.get("counts") or {}).get("train")
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,} images to learn from each" if low == high else f"{low:,} to {high:,} images to learn from"


def _varied(config: TransferConfig) -> str:
    method, (low, high) = config.method, config.data.crop_scale
    ways = [
        f"crops of {100 * low:g} to {100 * high:g} % of the area",
        "mirroring" if config.data.flip else "",
        f"RandAugment ({method.rand_augment})" if method.rand_augment else "",
        f"erasing in {100 * method.erase:g} %" if method.erase else "",
        f"mixup {method.mixup:g}" if method.mixup else "",
        f"CutMix {method.cutmix:g}" if method.cutmix else "",
        f"label smoothing {method.smoothing:g}" if method.smoothing else "",
    ]
    return ", ".join(way for way in ways if way)


def _tiles(run: TransferFolder) -> list[tuple[str, str]]:
    rows = []
    if run.outcome:
        rates = run.outcome["accuracy"]
        name = f"accuracy on {run.outcome['test']:,} test images, {rates['low']:.1f} to {rates['high']:.1f}"
        rows.append((name, f"{rates['top1']:.1f} %"))
        rows.append(("balanced accuracy, every class counting the same", f"{rates['balanced']:.1f} %"))
        rows.append(("calibration error of the probabilities", f"{run.outcome['ece']:.1f} %"))
    seconds, speed = facts.seconds_spent(run), facts.speed(run)
    if seconds:
        rate = f", at {speed[0]:,.0f} images a second" if speed else ""
        rows.append((f"of training{rate}", facts.duration(seconds)))
    return rows


def _charts(run: TransferFolder) -> list[Chart]:
    shown = {"test": "test images", "val": "validation images"}.get(
        str(run.data.get("shown")), "images not learnt from"
    )
    loss = [
        read_series(run.train, "loss", "training", colour=0, smooth=True),
        read_series(run.evals, "val_loss", shown, colour=1),
    ]
    accuracy = read_series(run.evals, "accuracy", shown, 2)
    charts = [
        draw_chart("Loss", "pale: single readings", loss),
        draw_chart("Accuracy on the way, %", f"on {shown}", [accuracy]),
        draw_chart("Learning rate", "", [read_series(run.train, "lr", "learning rate", 7)], from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _confusions(outcome: Record | None) -> dict[str, Any]:
    """The matrix as a table or as shapes, whichever can be read, and the most frequent mistakes."""
    if outcome is None:
        return {"table": [], "shapes": [], "pairs": [], "names": [], "upright": False, "summary": ""}
    counts, names = np.array(outcome["confusion"], dtype=np.int64), outcome["classes"]
    few = len(names) <= confusion.MOST_NUMBERED
    return {
        "table": confusion.shaded_table(counts, names) if few else [],
        "shapes": confusion.shaded_shapes(counts) if not few and len(names) <= confusion.MOST_DRAWN else [],
        "pairs": confusion.worst_pairs(counts, names, MOST_PAIRS if few else 2 * MOST_PAIRS) if len(names) > 4 else [],
        "names": names,
        "upright": max(map(len, names)) <= 3,
        "summary": confusion.summary(counts),
    }


def _options(config: TransferConfig) -> list[tuple[str, str, str]]:
    """Name, value and the recipe's value of every option that differs from the recipe's."""
    rows = facts.changed(config, _recipe(config), {"path", "teacher", "start"})
    return [(name, _words(value), "left open" if default is None else _words(default)) for name, value, default in rows]


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(_words(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else "none" if value is None else str(value)


def _uses(run: TransferFolder) -> Iterator[tuple[str, str]]:
    """Heading and code."""
    folder = run.path.resolve()
    if (run.path / "checkpoints").is_dir() and run.outcome:
        yield "Classify other images", f"fastmim predict {facts.shell_word(str(folder))} images/ --out predictions.csv"
    if run.parameters:
        data = run.config.data if run.config else None
        yield "Load it with timm", _snippet(str(folder / "export" / "timm"), data is None or data.channels == 3)
    if run.config and not facts.finished(run):
        yield "Go on with this run", f"fastmim resume {facts.shell_word(str(folder))}"
    if run.config:
        yield "Run it again", rerun_command(run.config)


def _snippet(folder: str, colour: bool) -> str:
    """Python that loads the exported classifier; images of other channels need a transform of the user's own."""
    place = json.dumps(f"local-dir:{folder}", ensure_ascii=False)
    imports = ["import timm", "from PIL import Image"] if colour else ["import timm"]
    lines = [*imports, "", f"network = timm.create_model({place}, pretrained=True).eval()"]
    lines.append('names = network.pretrained_cfg["label_names"]')
    if colour:
        lines += [
            "",
            "settings = timm.data.resolve_model_data_config(network)",
            "transform = timm.data.create_transform(**settings)",
            'image = transform(Image.open("image.jpg").convert("RGB"))',
            "probabilities = network(image[None]).softmax(1)[0]",
            "print(names[probabilities.argmax()])",
        ]
    return "\n".join(lines)
