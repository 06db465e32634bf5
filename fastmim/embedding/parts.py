# SPDX-License-Identifier: Apache-2.0
"""Features while they are computed: a folder of parts, each whole or not there, so that a killed process loses one.

A part holds the images of some successive batches. Its name says which; its metadata hold the SHA-256 of its tensors
and what could not be read. ``options.json`` says what the parts were computed with.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
from jaxtyping import Float32, Int64
from safetensors import SafetensorError
from torch import Tensor

from fastmim.train.checkpoint import write_file

_OPTIONS = "options.json"


class Part(NamedTuple):
    """Of the images from ``first`` to ``last`` - 1, those that can be read."""

    first: int
    last: int
    path: Path
    images: int
    """How many of them can be read."""
    dim: int


class Parts:
    """The parts in a folder.

    Args:
        folder: where they lie; need not be there yet.
        options: all that the features depend on, as plain JSON values.

    Attributes:
        bad: path and reason of each image that cannot be read, in the order of the table.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.bad: dict[str, str] = {}
        self._parts: list[Part] = []

    def different(self) -> list[str] | None:
        """Which options the parts that are there were computed with others of; None where there are no parts."""
        path = self.folder / _OPTIONS
        if not path.is_file():
            return None
        return differing(json.loads(path.read_text(encoding="utf-8")), self.options)

    def clear(self) -> None:
        """Removes what other calls have left."""
        for path in (*self.folder.glob("*.safetensors"), self.folder / _OPTIONS):
            path.unlink(missing_ok=True)

    def begin(self) -> None:
        """Takes the parts that are there and whole, up to the first gap; what else lies there is removed.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        if self.different() is None:
            write_file(self.folder / _OPTIONS, json.dumps(self.options).encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            part = _verified(path, self.done)
            if part is None:
                path.unlink()
            else:
                self._take(*part)
        for scratch in self.folder.glob(".*.safetensors.*"):
            scratch.unlink()

    def add(
        self,
        last: int,
        features: Float32[Tensor, "n D"],
        places: Int64[Tensor, " n"],
        bad: Mapping[str, str],
    ) -> None:
        """Keeps the features of the images from ``done`` to ``last`` - 1.

        Args:
            last: the first image that is not among them.
            features: of those that can be read.
            places: of those among all images, ascending.
            bad: path and reason of the others.

        Raises:
            OSError: the disk is full or not writable.
        """
        tensors = {"features": features.contiguous(), "places": places}
        facts = {"sha256": _sum(tensors), "bad": json.dumps(list(bad.items()))}
        path = self.folder / f"{self.done:012d}-{last:012d}.safetensors"
        write_file(path, safetensors.torch.save(tensors, facts))
        self._take(Part(self.done, last, path, len(features), features.shape[1]), dict(bad))

    @property
    def done(self) -> int:
        """How many images are dealt with."""
        return self._parts[-1].last if self._parts else 0

    @property
    def images(self) -> int:
        """How many of them have features."""
        return sum(part.images for part in self._parts)

    @property
    def dim(self) -> int:
        """Numbers of each image; 0 before the first."""
        return next((part.dim for part in self._parts if part.images), 0)

    def blocks(self, size: int = 4096) -> Iterator[Float32[np.ndarray, "n D"]]:
        """All features in order, ``size`` images at a time, however the parts were cut."""
        waiting: list[np.ndarray] = []
        for part in self._parts:
            if part.images:
                waiting.append(safetensors.torch.load_file(part.path)["features"].numpy())
            while sum(map(len, waiting)) >= size:
                joined = np.concatenate(waiting)
                yield joined[:size]
                waiting = [joined[size:]]
        if sum(map(len, waiting)):
            yield np.concatenate(waiting)

    def places(self) -> Int64[np.ndarray, " N"]:
        """Which images have features."""
        found = [safetensors.torch.load_file(part.path)["places"].numpy() for part in self._parts]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def take(self, rows: Sequence[int]) -> Float32[np.ndarray, "n D"]:
        """The features of some rows (ascending places among the images that have features)."""
        wanted, begin, found = np.asarray(rows, dtype=np.int64), 0, []
        for block in self.blocks():
            here = wanted[(wanted >= begin) & (wanted < begin + len(block))] - begin
            found.append(block[here])
            begin += len(block)
        return np.concatenate(found)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, part: Part, bad: Mapping[str, str]) -> None:
        self._parts.append(part)
        self.bad.update(bad)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of options that are not the same, as JSON has them."""
    plain = json.loads(json.dumps(now))
    return [name.replace("_", " ") for name in plain if before.get(name) != plain[name]]


def _verified(path: Path, first: int) -> tuple[Part, dict[str, str]] | None:
    """A part that begins at ``first`` and is as it was written, with what could not be read; else None."""
    begin, _, end = path.stem.partition("-")
    if not (begin.isdecimal() and end.isdecimal() and int(begin) == first):
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("features", "places")}
    except (SafetensorError, OSError):
        return None
    if facts.get("sha256") != _sum(tensors):
        return None
    count, dim = tensors["features"].shape
    return Part(first, int(end), path, count, dim), dict(json.loads(facts["bad"]))


def _sum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("features", "places"):
        digest.update(f"{tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
