# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: made, locked, read. What lies where stands in docs/design.md."""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastmim.config import Config, DistillConfig, FinetuneConfig, RunConfig, TransferConfig, validate
from fastmim.errors import UserError
from fastmim.train.checkpoint import write_file

if TYPE_CHECKING:
    from torch import nn


class Run:
    """A run folder, whether the run has finished or not.

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not holds_run(self.path):
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def task(self) -> str:
        """What kind of run it is: "pretrain", "finetune" or "distill"."""
        return str(self._options.get("task", "pretrain"))

    @property
    def config(self) -> Config:
        """Every option of a pre-training run as it was resolved.

        Raises:
            UserError: it is a run of another kind.
        """
        if self.task != "pretrain":
            raise UserError(f"{self.path} is a run of 'fastmim {self.task}'; a pre-training run is needed here")
        return validate(self._options, str(self.path))

    @property
    def transfer(self) -> TransferConfig:
        """Every option of a run that learnt from labels, as it was resolved.

        Raises:
            UserError: it is a pre-training run.
        """
        if self.task == "pretrain":
            raise UserError(f"{self.path} is a pre-training run; fine-tune it first: fastmim finetune DATA {self.path}")
        if self.task == "distill":
            return validate(self._options, str(self.path), DistillConfig)
        return validate(self._options, str(self.path), FinetuneConfig)

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return options

    @property
    def status(self) -> dict[str, Any]:
        """State ("new" before the first step), step, steps, samples, message."""
        return self.read("status.json") or {"state": "new", "step": 0, "steps": 0, "samples": 0, "message": ""}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @property
    def exported(self) -> Path:
        """The folder of the exported weights."""
        return self.path / "export" / "timm"

    def load(self, num_classes: int = 0, **arguments: Any) -> "nn.Module":
        """The pre-trained network as a plain timm model; the arguments are those of ``timm.create_model``.

        Raises:
            UserError: nothing is exported yet, or the network is not one of timm's.
        """
        import timm

        import fastmim.backbones.cmt  # noqa: F401, timm does not know it otherwise

        if not (self.exported / "config.json").is_file():
            raise UserError(f"{self.path} has no export that timm can load; 'fastmim export {self.path}' writes one")
        arguments = {"num_classes": num_classes, **arguments}
        return timm.create_model(f"local-dir:{self.exported.resolve()}", pretrained=True, **arguments)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, name: str, value: object) -> None:
        """Replaces a JSON file of the folder."""
        write_file(self.path / name, json.dumps(value, indent=1).encode())


def as_run(word: str | os.PathLike[str] | Run) -> Run | None:
    """The run that a word means: one that is given as such, or by its folder; None where it means something else."""
    if isinstance(word, Run):
        return word
    return Run(word) if holds_run(word) else None


def holds_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a run began there, of any kind and in any state."""
    return (Path(folder) / "config.yaml").is_file()


def default_folder(config: Config) -> Path:
    """``runs/pretrain/MODEL-DATA-001``, or the next free number."""
    return named_folder("pretrain", config.method.model.removeprefix("local-dir:"), config.data.paths[0])


def named_folder(kind: str, model: str, data: str) -> Path:
    """``runs/KIND/MODEL-DATA-001``, or the next free number."""
    name = f"{Path(model).name}-{Path(data).resolve().name}"
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return free_folder(Path("runs") / kind, plain)


def free_folder(parent: Path, name: str) -> Path:
    """The first of ``NAME-001``, ``NAME-002`` ... that is not there yet."""
    return next(path for n in itertools.count(1) if not (path := parent / f"{name}-{n:03d}").exists())


def prepare_folder(folder: Path, overwrite: bool, *needed: str | None) -> None:
    """Makes an empty run folder that can be written to, before anything costly begins.

    Args:
        folder: of the run.
        overwrite: empty it, if it holds an earlier run.
        needed: words for weights that the run begins with, which may be folders.

    Raises:
        UserError: it is not empty, not a folder, not writable, or its weights are needed.
    """
    inside = folder.resolve()
    for word in needed:
        if overwrite and word and inside in (place := Path(word.removeprefix("local-dir:")).resolve(), *place.parents):
            raise UserError(f"--overwrite would delete {word}, which this run begins with; give another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the run folder {folder} is a file; give another --out")
    entries = [entry for entry in folder.iterdir() if entry.name != ".lock"] if folder.is_dir() else []
    if entries:
        is_run = holds_run(folder)
        if not overwrite:
            mend = (
                f"'fastmim resume {folder}' goes on with it, --overwrite empties it" if is_run else "give another --out"
            )
            raise UserError(f"the run folder {folder} is not empty; {mend}")
        if not is_run:
            raise UserError(f"the run folder {folder} holds no run, so --overwrite leaves it alone; give another --out")
        with locked(folder):
            for entry in entries:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written to: {error.strerror}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the run; the system lets go of the lock when this one dies.

    Raises:
        UserError: the run is being worked on.
    """
    with (folder / ".lock").open("a") as file:
        try:
            # lockf, not flock: forked loader workers would share the latter, and outlive a killed process by a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another process; wait for it or stop it") from None
        yield


def write_config(folder: Path, config: RunConfig) -> None:
    """config.yaml: what the run was given, with every open choice that matters resolved."""
    write_file(folder / "config.yaml", dump(config).encode())


def dump(config: RunConfig) -> str:
    """The options as YAML that ``--config`` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
