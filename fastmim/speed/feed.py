# SPDX-License-Identifier: Apache-2.0
"""How fast a loader hands over the user's own images."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fastmim import recipes
from fastmim.config import Config, update
from fastmim.data.sources.scan import first_look, scan
from fastmim.data.table import ImageTable
from fastmim.run_images import crop_place, training_loader, training_pictures, waiting_remedy
from fastmim.speed.trial import synchronize
from fastmim.train.device import pick_workers
from fastmim.train.distributed import Ranks


class Feed:
    """The images of a folder, or whatever else ``fastmim pretrain`` takes.

    Attributes:
        images: how many there are.
        words: options without which they cannot be read.
        speed: images per second, by the crop's side, once measured.

    Raises:
        UserError: there are none, or none can be read.
    """

    def __init__(self, data: str, device: torch.device) -> None:
        self.table: ImageTable = scan([data])
        self.device, self.images = device, len(self.table)
        squares = self.table.squares
        self.words: dict[str, str | int] = {}
        if squares is not None:
            values = "raw" if squares.dtype == "float32" else "8bit"
            self.words = {"channels": squares.channels, "values": values}
        self.config = update(recipes.load("fastmim"), self.words)
        first_look(self.table, self.config.data.channels, self.config.data.values == "raw")
        self.speed: dict[int, float] = {}

    def measure(self, sides: Iterable[int], batch: int, seconds: float) -> None:
        """Reads crops of each size for ``seconds``; sizes that stored squares are too small for are left out.

        Raises:
            UserError: too many images cannot be read.
        """
        squares = self.table.squares
        for side in sides:
            if squares is None or side <= squares.side:
                self.speed[side] = self._images_per_s(side, batch, seconds)

    def remedy(self, side: int) -> str:
        """What would make crops of ``side`` pixels come faster."""
        config, workers = self._at(side, 1), pick_workers(None, self.device)
        pictures = training_pictures(config, self.table, Path(), Ranks())
        return waiting_remedy(config, pictures, workers, self.device, self.speed[side])

    def _at(self, side: int, batch: int) -> Config:
        return update(self.config, {"resolution": side, "global_batch": batch, "micro_batch": batch})

    def _images_per_s(self, side: int, batch: int, seconds: float) -> float:
        config = self._at(side, batch)
        pictures = training_pictures(config, self.table, Path(), Ranks())
        config = update(config, {"crop_on": crop_place(config, pictures, self.device)})
        loader = training_loader(config, pictures, 1, self.device, Ranks(), None)
        count = 0
        with contextlib.closing(loader.batches(0)) as batches:  # type: ignore[type-var]
            next(batches)  # starts the workers
            start = time.perf_counter()
            while count == 0 or time.perf_counter() - start < seconds:
                count += len(next(batches)["images"])
            synchronize(self.device)
            return count / (time.perf_counter() - start)
