# SPDX-License-Identifier: Apache-2.0
"""``fastmim.compare``: every start fine-tuned on the same labels with the same budget, and what that shows."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.comparing import page
from fastmim.comparing.leakage import Leak, check, left_out
from fastmim.comparing.measure import Judged, Measured, budgets, judge, options_apart, read_all, read_predictions
from fastmim.comparing.plan import Plan, Say, Trainer, chosen, label_settings, run_all, whole_rounds
from fastmim.comparing.starts import Starts, find_starts
from fastmim.comparing.verdict import sentence
from fastmim.config import DataConfig
from fastmim.data.splits import splits
from fastmim.errors import UserError
from fastmim.report.facts import shell_word
from fastmim.run_folder import free_folder, locked
from fastmim.starts import SCRATCH

ON_COMMAND_LINE = ("steps", "epochs", "global_batch", "resolution", "device")
FEW = 30
"""Test images that must be left without the leaked ones; with fewer, all are judged."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison leaves behind.

    Attributes:
        folder: with comparison.json, comparison.csv, comparison.html and runs/.
        verdict: one plain sentence.
        facts: comparison.json.
        interrupted: whether runs are missing; the same call goes on.
    """

    folder: Path
    verdict: str
    facts: dict[str, Any]
    interrupted: bool

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.folder / "comparison.html"


def compare(
    data: str,
    inits: Sequence[str],
    *,
    model: str | None = None,
    labels: Sequence[str] = ("10%",),
    seeds: int = 3,
    steps: int | None = None,
    epochs: float | None = None,
    global_batch: int | None = None,
    resolution: int | None = None,
    device: str | None = None,
    shuffle_labels: bool = False,
    leakage: bool = True,
    out: str | None = None,
    trainer: Trainer | None = None,
    say: Say = print,
    **words: Any,
) -> Comparison:
    """Fine-tune from every start with the same images, labels, budget and seeds, and say which one helped.

    Runs that are in ``out`` already are not made again, so an interrupted comparison goes on, and seeds, labels or
    starts can be added.

    Args:
        data: labelled images, as for ``fastmim.finetune``: class folders, train/ and val/ with them, or a .csv.
        inits: scratch (added where it is missing), imagenet, run folders, timm names, local-dir:FOLDER, or files.
        model: the network; that of the first run when None.
        labels: settings: 10% of the labels, 5/class, or all.
        seeds: how many; each draws initial weights, the order of images and the labels, the same for every start.
        steps: of every fine-tuning; fine-tuning's own choice when None.
        epochs: instead of steps.
        global_batch: images of a step.
        resolution: side of the images in pixels; that of the first run when None, else the network's own.
        device: cuda, mps or cpu.
        shuffle_labels: the control: labels of the training images are permuted, so that nothing may help.
        leakage: look for test images among what was trained on.
        out: the folder; the next free runs/compare/NAME-001 when None.
        trainer: ``fastmim.finetune`` when None, or what takes its words and leaves what it leaves.
        say: takes a line of progress for each run.
        words: further options of fine-tuning, for all runs.

    Raises:
        UserError: a start, a setting or a folder that does not fit.
    """
    starts, settings = find_starts(inits, model), label_settings(labels)
    shared: dict[str, Any] = {"steps": steps, "epochs": epochs, "global_batch": global_batch, "device": device}
    shared |= {"shuffle_labels": shuffle_labels or None, "resolution": resolution or _resolution(starts)}
    # What is measured on the way would be the test images, if there are no others, and take time.
    shared |= {**_as_pretrained(starts), "eval_every": 1.0, **words}
    folder = Path(out) if out else free_folder(Path("runs/compare"), _name(data))
    plan = _plan(str(data), starts, settings, seeds, dict(chosen(shared)), folder)
    _announce(starts, inits, say)
    leaks: list[Leak] = []
    with locked(folder):
        complete = run_all(plan, trainer or _finetune(), say, lambda: leaks.extend(_leaks(plan, leakage, say)))
        rounds = whole_rounds(plan)
        if not rounds:
            return Comparison(folder, "Interrupted before one round was complete.", {}, True)
        return _conclude(plan, starts, rounds, leaks, shuffle_labels, not complete)


def _announce(starts: Starts, inits: Sequence[str], say: Say) -> None:
    """Says what was not asked for, and what is not the same for all."""
    if SCRATCH not in [str(text).strip() for text in inits]:
        say("scratch is added: without untrained weights nothing can be said to help")
    for start in starts.others:
        say(f"{start.name} is another network ({start.network}, not {starts.network}): that differs too")


def _plan(
    data: str, starts: Starts, settings: tuple[str, ...], seeds: int, words: dict[str, Any], folder: Path
) -> Plan:
    """The grid, and its folder; a mistake in the images is told here, before hours are spent."""
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, but at least one is needed, and three to show anything")
    state = splits(data).fingerprint
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to: {error.strerror}") from None
    return Plan(data, state, starts.all, settings, tuple(range(seeds)), words, _models(starts), folder)


def _conclude(
    plan: Plan, starts: Starts, rounds: tuple[int, ...], leaks: list[Leak], shuffled: bool, interrupted: bool
) -> Comparison:
    measured = read_all(plan, rounds)
    images = len(measured.paths)
    lost = left_out(leaks, images)
    every = judge(measured, plan, np.ones(images, bool))
    clean = judge(measured, plan, ~lost) if lost.any() and (~lost).sum() >= FEW else None
    counted = clean or every
    verdict = sentence(counted, plan, shuffled, int(lost.sum()) if clean else 0)
    notes = _notes(plan, starts, rounds, measured, leaks, clean is None)
    facts = {
        "verdict": verdict,
        "data": plan.data,
        "network": starts.network,
        "shuffled": shuffled,
        "interrupted": interrupted,
        "classes": list(measured.classes),
        "test": images,
        "left_out": int(lost.sum()) if clean else 0,
        "labels": list(plan.labels),
        "seeds": list(rounds),
        "starts": [dataclasses.asdict(start) for start in plan.starts],
        "words": dict(plan.words),
        **_judged("", counted),
        **_judged("with_leaked_", every if clean else None),
        "cost": _cost(plan, measured),
        "leakage": [{**dataclasses.asdict(leak), "leaked": len(leak.leaked)} for leak in leaks],
        "notes": notes,
        "command": _command(plan, shuffled),
    }
    page.write_all(plan.out, facts, measured)
    return Comparison(plan.out, verdict, facts, interrupted)


def _judged(prefix: str, judged: Judged | None) -> dict[str, Any]:
    if judged is None:
        return {}
    return {f"{prefix}{name}": value for name, value in dataclasses.asdict(judged).items() if name != "seeds"}


def _leaks(plan: Plan, wanted: bool, say: Say) -> list[Leak]:
    if not wanted:
        return []
    first = next(cell for cell in plan.cells if plan.finished(cell))
    test = [row[0] for row in read_predictions(plan.folder(first) / "predictions.csv")]
    found = check(plan.data, test, plan.starts)
    for leak in found:
        if leak.leaked:
            share = len(leak.leaked) / len(test)
            say(f"leak: {len(leak.leaked):,} of {len(test):,} test images ({share:.1%}) are among: {leak.of}")
    return found


def _notes(
    plan: Plan, starts: Starts, rounds: tuple[int, ...], measured: Measured, leaks: list[Leak], whole: bool
) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [*budgets(measured), *options_apart(plan, rounds[0])]
    if len(rounds) < len(plan.seeds):
        notes.append(f"Interrupted: {len(rounds)} of {len(plan.seeds)} seeds are complete, and only these count.")
    if len(rounds) == 1:
        notes.append("There is one seed: how much is luck cannot be told.")
    notes += [
        f"{start.name} is another network ({start.network}, not {starts.network}), so more than its weights differ."
        for start in starts.others
    ]
    lost = left_out(leaks, len(measured.paths))
    if lost.any() and whole:
        notes.append(
            f"{int(lost.sum()):,} of {len(lost):,} test images were seen before, and too few are left without them: "
            "all are counted, which flatters who saw them."
        )
    if not leaks:
        notes.append("Whether test images were seen in training was not checked.")
    return notes


def _cost(plan: Plan, measured: Measured) -> list[dict[str, Any]]:
    """Seconds and steps of each start: one fine-tuning with the largest label setting, and pre-training."""
    rows = []
    for start in plan.starts:
        results = [result for cell, result in measured.results.items() if cell.start == start]
        per_run = float(np.mean([result["seconds"] for result in results]))
        before = 0.0 if start.kind == "scratch" else start.seconds
        row = {"start": start.name, "steps": int(np.mean([result["steps"] for result in results]))}
        row |= {"finetune_seconds": per_run, "pretrain_seconds": before}
        rows.append({**row, "total_seconds": None if before is None else before + per_run})
    return rows


def _models(starts: Starts) -> dict[str, dict[str, Any]]:
    """What fine-tuning must be told of the network: nothing where the weights bring it."""
    shared: dict[str, Any] = {"model": starts.model}
    if starts.model_args:
        shared["model_args"] = starts.model_args
    return {start.name: shared if start.kind in ("scratch", "file") else {} for start in starts.all}


def _as_pretrained(starts: Starts) -> dict[str, Any]:
    """What the first run saw, where it is not colour pictures of 8 bits: all must see the same."""
    if starts.run is None:
        return {}
    data, usual = starts.run.config.data, DataConfig()
    if (data.channels, data.values) == (usual.channels, usual.values):
        return {}
    return {name: getattr(data, name) for name in ("channels", "values", "mean", "std")}


def _resolution(starts: Starts) -> int | None:
    if starts.run is not None:
        return starts.run.config.data.resolution
    if starts.model.startswith(("local-dir:", "hf-hub:", "hf_hub:")):
        return None
    from timm.models import get_pretrained_cfg

    settings = get_pretrained_cfg(starts.model)
    return int(settings.input_size[-1]) if settings else None


def _finetune() -> Trainer:
    import fastmim

    return fastmim.finetune


def _name(data: str) -> str:
    name = Path(data).resolve().name
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in name)


def _command(plan: Plan, shuffled: bool) -> str:
    """The command that repeats the comparison."""
    words = ["fastmim", "compare", plan.data, "--inits", ",".join(start.start for start in plan.starts)]
    shared = next((model["model"] for model in plan.models.values() if model), None)
    options = {"model": shared, "labels": ",".join(plan.labels), "seeds": len(plan.seeds)}
    options |= {name: plan.words.get(name) for name in ON_COMMAND_LINE}
    for name, value in chosen(options):
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--shuffle-labels"] if shuffled else []
    further = {name: value for name, value in plan.words.items() if name not in (*ON_COMMAND_LINE, "shuffle_labels")}
    note = f"  # from Python, with {further}" if further else ""
    return " ".join(shell_word(word) for word in [*words, "--out", str(plan.out)]) + note
