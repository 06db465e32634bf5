# SPDX-License-Identifier: Apache-2.0
"""What weights are compared: untrained ones, released ones, files, runs; and the one network that they share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmim.config import nearest
from fastmim.errors import UserError
from fastmim.report.facts import shortest_ends
from fastmim.run_folder import Run, holds_run
from fastmim.starts import SCRATCH

IMAGENET = "imagenet"
FILES = (".pth", ".pt", ".safetensors", ".bin")
HUBS = ("local-dir:", "hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class Start:
    """One set of initial weights.

    Attributes:
        name: short, and no other start has it.
        start: what fine-tuning is given.
        kind: what it is.
        network: timm's name of the network, without the tag of the weights.
        weights: what tells these weights from others of the same name (a checksum); empty where there is no file.
        data: what a run was pre-trained on.
        seconds: that its pre-training took; None where that is not known.
    """

    name: str
    start: str
    kind: Literal["scratch", "run", "released", "file"]
    network: str
    weights: str = ""
    data: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Starts:
    """All starts, untrained first, and the network of those that bring none of their own."""

    all: tuple[Start, ...]
    model: str
    model_args: dict[str, Any]
    run: Run | None
    """The first run, whose options the comparison follows."""

    @property
    def network(self) -> str:
        """Name of the shared network."""
        return plain(self.model)

    @property
    def others(self) -> tuple[Start, ...]:
        """Starts with another network."""
        return tuple(one for one in self.all if one.network != self.network)


def find_starts(inits: Sequence[str], model: str | None) -> Starts:
    """Untrained weights first (added where they are not asked for), then the others as given.

    Args:
        inits: scratch, imagenet (released weights of the shared network), run folders, timm names, local-dir:FOLDER,
            or files of weights.
        model: the network of those starts that bring none; that of the first run when None, else of the first start.

    Raises:
        UserError: a start that is none of these or stands twice, no start but scratch, or no network for scratch.
    """
    texts = [str(text).strip() for text in inits if str(text).strip()]
    texts = [SCRATCH, *(text for text in texts if text != SCRATCH)]
    if len(texts) < 2:
        raise UserError("compare needs weights beside scratch: a run folder, imagenet, a timm name or a file")
    double = next((text for text in texts if texts.count(text) > 1), None)
    if double:
        raise UserError(f"--inits names {double!r} twice; every start is compared once")
    for text in texts:
        _check(text)
    runs = [Run(text) for text in texts if holds_run(text)]
    config = runs[0].config.method if runs else None
    named = next((text for text in texts if _is_model(text)), None)
    chosen = model or (config.model if config else named)
    if chosen is None:
        raise UserError("compare needs --model, the network that the weights are for: no start says it")
    # Arguments of the run belong to its network, not to another one.
    arguments = dict(config.model_args) if config and model in (None, config.model) else {}
    names = _names(texts)
    found = [_start(text, name, chosen) for text, name in zip(texts, names, strict=True)]
    return Starts(tuple(found), chosen, arguments, runs[0] if runs else None)


def plain(model: str) -> str:
    """The name of a network without the tag of its weights; the folder's name of local-dir: ones."""
    if model.startswith(HUBS):
        return Path(model.partition(":")[2]).name
    return model.partition(".")[0]


def _start(text: str, name: str, model: str) -> Start:
    if text == SCRATCH:
        return Start(name, SCRATCH, "scratch", plain(model))
    if text == IMAGENET:
        if model.startswith(HUBS):
            raise UserError(f"imagenet: {model} has no released weights that are known; name a timm model instead")
        return Start(name, model, "released", plain(model))
    if holds_run(text):
        return _of_run(text, name)
    if text.startswith("local-dir:"):
        weights = Path(text.partition(":")[2]) / "model.safetensors"
        return Start(name, text, "released", plain(text), checksum(weights) if weights.is_file() else "")
    if text.startswith(HUBS) or _is_model(text):
        return Start(name, text, "released", plain(text))
    return Start(name, text, "file", plain(model), checksum(Path(text)))


def _check(text: str) -> None:
    """Raises a UserError for what is no start."""
    if text in (SCRATCH, IMAGENET) or text.startswith(HUBS) or holds_run(text) or _is_model(text):
        return
    path = Path(text)
    if path.is_file():
        if path.suffix not in FILES:
            raise UserError(f"{text} holds no weights that are known; a file of weights ends in {', '.join(FILES)}")
        return
    if path.is_dir():
        raise UserError(f"{text} is not a run folder: it has no config.yaml; for exported weights: local-dir:{text}")
    import timm

    hint = nearest(text, timm.list_models()) if "/" not in text else ""
    raise UserError(f"{text!r} is no run folder, no file and no model of timm{hint}; --inits scratch,imagenet,RUN")


def _of_run(text: str, name: str) -> Start:
    run = Run(text)
    weights = run.exported / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{text} has no exported weights; 'fastmim export {text}' writes them")
    times = [line["seconds"] for line in run.metrics if isinstance(line.get("seconds"), int | float)]
    config = run.config
    seconds = max(times) if times else None
    return Start(name, text, "run", plain(config.method.model), checksum(weights), config.data.paths, seconds)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_model(text: str) -> bool:
    if text in (SCRATCH, IMAGENET) or "/" in text or Path(text).exists():
        return False
    import timm

    return timm.is_model(text.partition(".")[0])


def _names(texts: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart; timm's names and words as they are."""
    parts = [
        Path(text.removeprefix("local-dir:")).parts if text not in (SCRATCH, IMAGENET) else (text,) for text in texts
    ]
    ends = shortest_ends(parts)
    return list(texts) if ends is None else [end.strip("/") for end in ends]
