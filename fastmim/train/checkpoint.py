# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: safetensors and JSON, with a list of their SHA-256 sums.

A checkpoint becomes visible by one rename, after its files and their folder have reached the disk. No format of tensors
notices a flipped bit, so the sums are checked at every load and a damaged checkpoint gives way to the one before.
``sha256sum -c SHA256SUMS`` checks them by hand.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastmim.errors import UserError

FORMAT = 1
_SUMS = "SHA256SUMS"


class NotFiniteError(UserError):
    """The weights hold NaN or infinity; such a checkpoint is never written."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint in memory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where the ``step-N`` folders are.
        keep: how many to keep; never fewer than one that has been verified.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Writes ``step-N`` with one safetensors file per group of tensors and ``state.json``.

        Raises:
            NotFiniteError: a tensor is not finite; nothing is written.
            OSError: the disk is full or not writable; nothing is visible and earlier checkpoints are as they were.
        """
        for group, content in tensors.items():
            for name, tensor in content.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise NotFiniteError(f"{group}: {name} is not finite at step {step}")
        final = self.folder / f"step-{step:08d}"
        scratch = self.folder / f".{final.name}.{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        try:
            scratch.mkdir()
            files = {"state.json": json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode()}
            for group, content in tensors.items():
                ready = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
                files[f"{group}.safetensors"] = safetensors.torch.save(ready)
            files[_SUMS] = "".join(f"{_sum(data)}  {name}\n" for name, data in sorted(files.items())).encode()
            for name, data in files.items():
                _write(scratch / name, data)
            sync_folder(scratch)
            if final.exists():  # a damaged one, or the same step once more
                shutil.rmtree(final)
            scratch.rename(final)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first, verified or not."""
        return sorted(int(entry.name.removeprefix("step-")) for entry in self.folder.glob("step-*"))

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written, and one line for each newer one that is not.

        Raises:
            UserError: there are checkpoints, but none is whole, or the newest is of a later format.
        """
        damage: list[str] = []
        for step in reversed(self.steps()):
            folder = self.folder / f"step-{step:08d}"
            try:
                return _read(folder), damage
            except (OSError, ValueError) as error:
                damage.append(f"{folder}: {error}")
        if damage:
            raise UserError(f"no checkpoint is whole; the newest: {damage[0]}")
        return None, damage

    def _sweep(self) -> None:
        """Removes what a killed process left half written."""
        for scratch in self.folder.glob(".step-*"):
            shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new, never a part."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file to, which then takes the place of ``path`` as a whole, once it has reached the disk."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Brings a folder's names to the disk: without it a rename may be undone by a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint:
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    sums = content.pop(_SUMS, b"").decode()
    there = "".join(f"{_sum(data)}  {name}\n" for name, data in sorted(content.items()))
    if not sums:
        raise ValueError(f"has no {_SUMS}")
    if sums != there:
        wrong = sorted({line[66:] for line in set(sums.splitlines()) ^ set(there.splitlines())})
        raise ValueError(f"not as it was written (SHA-256 differs): {', '.join(wrong)}")
    state = json.loads(content.pop("state.json"))
    if state["format"] > FORMAT:
        raise UserError(f"{folder} was written by a newer fastmim (format {state['format']}, known: {FORMAT})")
    if f"step-{state['step']:08d}" != folder.name:
        raise ValueError(f"holds step {state['step']}")
    tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in content.items()}
    return Checkpoint(state["step"], tensors, state)


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
