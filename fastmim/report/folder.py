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

from fastmim.config import Config, validate
from fastmim.errors import UserError

Record = dict[str, Any]

# What a reader of the report loses when the file is not there.
USES = {
    "config.yaml": "the options, and the command to run it again",
    "environment.json": "versions and the device",
    "data.json": "how many images there were",
    "status.json": "whether the run ended by itself",
    "metrics.jsonl": "the curves and the speed",
    "images/reconstruction.safetensors": "pictures of what was hidden and predicted",
    "images/neighbours.safetensors": "nearest neighbours",
    "probe.json": "whether it helped",
    "export/timm/model.safetensors": "the weights to hand over",
}


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
class RunFolder:
    """All that the report knows of a run; what was absent is None or empty, and named in ``missing``."""

    path: Path
    config: Config | None
    environment: Record
    data: Record
    status: Record
    train: list[Record]
    evals: list[Record]
    bad: list[tuple[str, str]]
    probe: Record | None
    reconstruction: Reconstruction | None
    neighbours: Neighbours | None
    parameters: int | None
    missing: tuple[str, ...]


def read_run(path: Path) -> RunFolder:
    """Everything that is in a run folder.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    if not (path / "config.yaml").exists() and not (path / "metrics.jsonl").exists():
        raise UserError(f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    records = _metrics(path / "metrics.jsonl")
    return RunFolder(
        path=path,
        config=_config(path / "config.yaml"),
        environment=_json(path / "environment.json") or {},
        data=_json(path / "data.json") or {},
        status=_json(path / "status.json") or {},
        train=[record for record in records if record["kind"] == "train"],
        evals=[record for record in records if record["kind"] == "eval"],
        bad=_bad_images(path / "bad_images.csv"),
        probe=_json(path / "probe.json"),
        reconstruction=_reconstruction(path / "images" / "reconstruction.safetensors"),
        neighbours=_neighbours(path / "images" / "neighbours.safetensors"),
        parameters=_parameters(path / "export" / "timm" / "model.safetensors"),
        missing=tuple(name for name in USES if not (path / name).exists()),
    )


def _config(path: Path) -> Config | None:
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; restore it or remove it") from None
    return validate(tree or {}, str(path))


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


def _reconstruction(path: Path) -> Reconstruction | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("images", "mask", "target", "prediction")}
        return Reconstruction(**arrays, kind=file.metadata()["target"])


def _neighbours(path: Path) -> Neighbours | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        return Neighbours(file.get_tensor("thumbs"), file.get_tensor("similarity"))


def _parameters(path: Path) -> int | None:
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
