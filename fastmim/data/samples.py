# SPDX-License-Identifier: Apache-2.0
"""What a worker does: places of the stream in, pixels in a ring out."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils.data import Dataset

from fastmim.data.augment import Box, random_box
from fastmim.data.order import Sample
from fastmim.data.pictures import Pictures, scaled
from fastmim.data.read import BadImage
from fastmim.data.workers import Ring
from fastmim.seeding import derive

ATTEMPTS = 16


class Piece(NamedTuple):
    """A part of a batch, which one worker makes."""

    number: int
    """Of the batch, from the start of the sitting."""
    row: int
    """Where in the batch the part begins."""
    rows: int
    """Images of the whole batch."""
    resolution: int
    """Side of the crops in pixels."""
    samples: tuple[Sample, ...]


# A crop of 8-bit colours, "C S S", and the seed of all that is random about it, to another of the same shape.
Augment = Callable[[Tensor, int], Tensor]


class Cut(NamedTuple):
    """How a picture is cropped."""

    choose: Callable[[int, int], Box]
    """The box of a picture of (width, height)."""
    mirror: bool


class _Made(NamedTuple):
    """A sample as it came about."""

    place: int
    """Index of the image that was read: of another one, where the sample's own is bad."""
    box: tuple[float, ...]
    """Of a square; empty for a crop."""


@dataclass(frozen=True)
class TrainSamples(Dataset[Any]):
    """Makes the pieces of batches.

    Args:
        pictures: what crops are taken of.
        crop_scale: smallest and largest share of a picture's area.
        flip: mirror half of the crops.
        seed: what everything random follows from.
        side: of the squares that are handed over whole, with their boxes; None to hand crops over.
        ring: where pixels are written; None to return them (where memory cannot be shared).
        augment: what else is done to each crop; not with ``side``.
    """

    pictures: Pictures
    crop_scale: tuple[float, float]
    flip: bool
    seed: int
    side: int | None
    ring: Ring | None
    augment: Augment | None = None

    def __getitems__(self, piece: Piece) -> dict[str, Any]:
        pictures, size, count = self.pictures, self.side or piece.resolution, len(piece.samples)
        # Squares come with their colours side by side, as decoders and antialiased resizing want them.
        one = (size, size, pictures.channels) if self.side else (pictures.channels, size, size)
        if self.ring is None:
            images = torch.empty((count, *one), dtype=pictures.dtype)
        else:
            batch = self.ring.view(piece.number, (piece.rows, *one), pictures.dtype)
            images = batch[piece.row : piece.row + count]
        bad: list[tuple[str, str]] = []
        made: list[_Made | None] = []
        cuts = [self.cut(*sample) for sample in piece.samples]
        for image, sample, cut in zip(images, piece.samples, cuts, strict=True):
            made.append(self._fill(image, sample, cut, bad))
        filled = [
            one or _Made(sample[1], (0.0, 0.0, 1.0, 1.0)) for one, sample in zip(made, piece.samples, strict=True)
        ]
        answer: dict[str, Any] = {
            "number": piece.number,
            "shape": (piece.rows, *one),
            "resolution": piece.resolution,
            "last": piece.row + count == piece.rows,
            "keys": [derive(self.seed, "key", epoch, index) for epoch, index in piece.samples],
            "indices": [one.place for one in filled],
            "bad": bad,
            "complete": None not in made,
        }
        if self.side:
            answer |= {"boxes": [one.box for one in filled], "mirror": [cut.mirror for cut in cuts]}
        return answer if self.ring is not None else answer | {"images": images}

    def cut(self, epoch: int, index: int) -> Cut:
        """The crop of an image in an epoch: a pure function of the seed."""
        rng = random.Random(derive(self.seed, "crop", epoch, index))
        mirror = rng.random() < 0.5
        return Cut(functools.partial(random_box, rng=rng, scale=self.crop_scale), mirror and self.flip)

    def _fill(
        self, image: Num[Tensor, "_ _ _"], sample: Sample, cut: Cut, bad: list[tuple[str, str]]
    ) -> "_Made | None":
        """Write the sample into ``image``, or another one in its place if it is bad; None if none can be read."""
        epoch, index = sample
        chosen = index
        for attempt in range(ATTEMPTS):
            try:
                return _Made(chosen, self._write(image, chosen, cut, derive(self.seed, "augment", epoch, index)))
            except BadImage as error:
                bad.append((self.pictures.table.path(chosen), error.reason))
            cut = self.cut(epoch, index)  # the same draws again, for a picture of another size
            chosen = derive(self.seed, "replace", epoch, index, attempt) % len(self.pictures.table)
        image.zero_()  # the run ends with this; but no pixels of an earlier batch should be taken for it
        return None

    def _write(self, image: Num[Tensor, "_ _ _"], index: int, cut: Cut, key: int) -> tuple[float, ...]:
        if self.side:
            width, height = self.pictures.square_into(index, image)
            return scaled(cut.choose(width, height), width, height, self.side)
        picture = self.pictures.open(index)
        pixels = picture.crop(cut.choose(picture.width, picture.height), image.shape[-1])
        pixels = pixels.flip(2) if cut.mirror else pixels
        image.copy_(self.augment(pixels, key) if self.augment is not None else pixels)
        return ()
