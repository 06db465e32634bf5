# SPDX-License-Identifier: Apache-2.0
"""Reads a run folder for the report; every file of it may be absent, because a run can be killed at any time."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Float, UInt8
from safetensors import safe_open

from fastmim.config import Config, DistillConfig, FinetuneConfig, RunConfig, TransferConfig, validate
from fastmim.errors import UserError

Record = dict[str, Any]

# What a reader of the report loses when the file is not there.
_ALWAYS = {
    "config.yaml": "the options, and the command to run it again",
    "environment.json": "versions and the device",
    "data.json": "how many images there were",
    "status.json": "whether the run ended by itself",
    "metrics.jsonl": "the curves and the speed",
}
USES = {
    **_ALWAYS,
    "images/reconstruction.safetensors": "pictures of what was hidden and predicted",
    "images/neighbours.safetensors": "nearest neighbours",
    "probe.json": "whether it helped",
    "export/timm/model.safetensors": "the weights to hand over",
}
TRANSFER_USES = {
    **_ALWAYS,
    "finetune.json": "how good it is",
    "predictions.csv": "how often it is right when it is sure",
    "images/mistakes.safetensors": "pictures of the worst mistakes",
    "export/timm/model.safetensors": "the weights to hand over",
}
_SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": Config, "finetune": FinetuneConfig, "distill": DistillConfig}
# Reading a table of thousands of classes would take minutes, for one small part of the page.
_LARGEST_TABLE = 64_000_000


@dataclass(frozen=True)
class Reconstruction:
    """Some held-out images, what was hidden of them, and what was predicted."""

    images: UInt8[np.ndarray, "N 3 S S"]
    mask: Bool[np.ndarray, "N g g"]
    target: Float[np.ndarray, "N C h w"]
    prediction: Float[np.ndarray, "N C h w"]
    kind: str


@dataclass(frozen=True)
class Neighbours:
    """Query images, each followed by its nearest images, and their cosine similarities."""

    thumbs: UInt8[np.ndarray, "Q K_plus_1 3 s s"]
    similarity: Float[np.ndarray, "Q K"]


@dataclass(frozen=True)
class Answers:
    """How sure a classifier was of each test image, and whether it was right."""

    confidence: Float[np.ndarray, " N"]
    right: Bool[np.ndarray, " N"]


@dataclass(frozen=True)
class Folder:
    """What the report knows of a run of any kind; what was absent is None or empty, and named in ``missing``."""

    path: Path
    config: RunConfig | None
    environment: Record
    data: Record
    status: Record
    train: list[Record]
    evals: list[Record]
    bad: list[tuple[str, str]]
    parameters: int | None
    missing: dict[str, str]
    """Name of the file, and what a reader loses by that."""


@dataclass(frozen=True)
class RunFolder(Folder):
    """A pre-training run."""

    config: Config | None
    probe: Record | None
    reconstruction: Reconstruction | None
    neighbours: Neighbours | None


@dataclass(frozen=True)
class TransferFolder(Folder):
    """A run that learnt from labels."""

    config: TransferConfig | None
    outcome: Record | None
    """The content of finetune.json."""
    answers: Answers | None
    thumbs: UInt8[np.ndarray, "N 3 s s"] | None
    """Of the mistakes that finetune.json names, in their order."""


def read_run(path: Path) -> RunFolder | TransferFolder:
    """Everything that is in a run folder.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    if not (path / "config.yaml").exists() and not (path / "metrics.jsonl").exists():
        raise UserError(f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    records, config, data = _metrics(path / "metrics.jsonl"), _config(path / "config.yaml"), _json(path / "data.json")
    outcome = _json(path / "finetune.json")
    # Without its options, a run that learnt from labels is known by what it leaves behind.
    labelled = not isinstance(config, Config) if config else outcome is not None or "classes" in (data or {})
    uses = TRANSFER_USES if labelled else USES
    common: dict[str, Any] = {
        "path": path,
        "config": config,
        "environment": _json(path / "environment.json") or {},
        "data": data or {},
        "status": _json(path / "status.json") or {},
        "train": [record for record in records if record["kind"] == "train"],
        "evals": [record for record in records if record["kind"] == "eval"],
        "bad": _bad_images(path / "bad_images.csv"),
        "parameters": _parameters(path / "export" / "timm" / "model.safetensors"),
        "missing": {name: use for name, use in uses.items() if not (path / name).exists()},
    }
    if labelled:
        if outcome and not outcome["mistakes"]:
            common["missing"].pop("images/mistakes.safetensors", None)
        thumbs = _arrays(path / "images" / "mistakes.safetensors", "thumbs")
        return TransferFolder(
            **common,
            outcome=outcome,
            answers=_answers(path / "predictions.csv"),
            thumbs=thumbs["thumbs"] if thumbs else None,
        )
    return RunFolder(
        **common,
        probe=_json(path / "probe.json"),
        reconstruction=_reconstruction(path / "images" / "reconstruction.safetensors"),
        neighbours=_neighbours(path / "images" / "neighbours.safetensors"),
    )


def _config(path: Path) -> RunConfig | None:
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; restore it or remove it") from None
    kind = tree.get("task", "pretrain") if isinstance(tree, dict) else "pretrain"
    if kind not in _SCHEMAS:
        raise UserError(f"{path}: unknown task '{kind}'; a report knows {', '.join(_SCHEMAS)}")
    return validate(tree or {}, str(path), _SCHEMAS[kind])


def _json(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        content: Record = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; restore it or remove it") from None
    return content


def _metrics(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # Only what follows the last newline can be half a record: the run was killed while it wrote.
    try:
        return [json.loads(line) for line in lines[:-1] if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove the damaged lines") from None


def _bad_images(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    # Paths are bytes on Linux, so a name in this file need not be UTF-8.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [(row["path"], row["reason"]) for row in csv.DictReader(file)]


def _answers(path: Path) -> Answers | None:
    """Of predictions.csv: path, label, predicted, p_true, and a probability of every class."""
    if not path.exists() or path.stat().st_size > _LARGEST_TABLE:
        return None
    confidence, right = [], []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        try:
            for _, label, predicted, _, *probabilities in rows:
                confidence.append(max(map(float, probabilities)))
                right.append(label == predicted)
        except (ValueError, csv.Error):
            raise UserError(f"{path} is damaged in line {rows.line_num}; restore it or remove it") from None
    return Answers(np.array(confidence), np.array(right, dtype=bool))


def _reconstruction(path: Path) -> Reconstruction | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        kind = file.metadata()["target"]
    arrays = _arrays(path, "images", "mask", "target", "prediction")
    return Reconstruction(**arrays, kind=kind) if arrays else None


def _neighbours(path: Path) -> Neighbours | None:
    arrays = _arrays(path, "thumbs", "similarity")
    return Neighbours(**arrays) if arrays else None


def _arrays(path: Path, *names: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names}


def _parameters(path: Path) -> int | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
