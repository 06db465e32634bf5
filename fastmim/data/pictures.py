# SPDX-License-Identifier: Apache-2.0
"""Pictures of any source, of which a crop can be taken: a photo, or a small square that stands for one."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Num, UInt8
from torch import Tensor

from fastmim.data.augment import Box
from fastmim.data.cache import SquareCache
from fastmim.data.decoding.decode import open_image
from fastmim.data.decoding.resize import EXTRA_OF_SQUARES, resize_crop
from fastmim.data.prepared.shard_cache import ShardCache
from fastmim.data.prepared.shards import decode_square, decode_square_into, read_raw_square
from fastmim.data.read import read_range
from fastmim.data.table import ImageTable

Pixels = UInt8[Tensor, "C S S"] | Float32[Tensor, "C S S"]


@runtime_checkable
class Picture(Protocol):
    """What has an upright size and can be cropped."""

    @property
    def width(self) -> int:
        """Of the upright original, in pixels."""
        ...

    @property
    def height(self) -> int:
        """Of the upright original, in pixels."""
        ...

    def crop(self, box: Box, size: int) -> Pixels:
        """The part inside ``box`` (pixels of the upright original), as ``size`` x ``size`` pixels.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class Square:
    """A picture squashed to a square; crops are still chosen in the pixels of the original."""

    width: int
    height: int
    pixels: Num[Tensor, "C N N"]

    def crop(self, box: Box, size: int) -> Pixels:
        """The part inside ``box``, which is brought to the square's grid."""
        return resize_crop(self.pixels, self.scaled(box), size, EXTRA_OF_SQUARES)

    def scaled(self, box: Box) -> tuple[float, float, float, float]:
        """``box`` in the square's own pixels."""
        return scaled(box, self.width, self.height, self.pixels.shape[-1])


def scaled(box: Box, width: int, height: int, side: int) -> tuple[float, float, float, float]:
    """``box`` of a picture of ``width`` x ``height`` in the pixels of a square of ``side``."""
    across, down = side / width, side / height
    return box.left * across, box.top * down, box.right * across, box.bottom * down


@dataclass(frozen=True)
class Pictures:
    """Opens the pictures of a table.

    Args:
        table: where they lie.
        channels: of the pixels.
        raw: stored values as float32, not 0 to 255.
        cache: keeps a square of each picture, of which all crops are then taken.
        shards: local copies of the shards of an object store.
    """

    table: ImageTable
    channels: int = 3
    raw: bool = False
    cache: SquareCache | None = None
    shards: ShardCache | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels."""
        return torch.float32 if self.raw else torch.uint8

    @property
    def side(self) -> int | None:
        """The squares' side in pixels; None where crops are taken of the pictures themselves."""
        if self.table.squares is not None:
            return self.table.squares.side
        return None if self.cache is None else self.cache.side

    def open(self, index: int) -> Picture:
        """The picture at ``index``.

        Raises:
            BadImage: it cannot be read.
        """
        if self.table.squares is not None:
            width, height = self._true_size(index)
            return Square(width, height, decode_square(self.read(index), self.table.squares))
        if self.cache is None:
            return open_image(self.table.read(index), self.channels, self.raw)
        kept = self.cache.get(index)
        if kept is None:
            whole = open_image(self.table.read(index), self.channels, self.raw)
            pixels = whole.crop(Box(0, 0, whole.width, whole.height), self.cache.side)
            kept = (whole.width, whole.height, pixels)
            self.cache.put(index, *kept)
        return Square(*kept)

    def square_into(self, index: int, out: Num[Tensor, "N N C"]) -> tuple[int, int]:
        """Writes the square of a picture, and returns width and height of the original.

        Raises:
            BadImage: it cannot be read.
        """
        squares = self.table.squares
        if squares is not None:
            place, offset = self._place(index), int(self.table.offset[index])
            if not read_raw_square(place, offset, int(self.table.size[index]), squares, out):
                decode_square_into(self.read(index), squares, out)
            return self._true_size(index)
        square = self.open(index)
        assert isinstance(square, Square)
        out.copy_(square.pixels.permute(1, 2, 0))
        return square.width, square.height

    def read(self, index: int) -> bytes:
        """The encoded picture; of an object store's shard from its local copy.

        Raises:
            BadImage: it cannot be read.
        """
        if self.table.squares is None:
            return self.table.read(index)
        return read_range(self._place(index), int(self.table.offset[index]), int(self.table.size[index]))

    def _place(self, index: int) -> str:
        """The shard that holds a prepared square, or its local copy."""
        container = self.table.containers[self.table.container[index]]
        return container if self.shards is None else self.shards.local(container)

    def _true_size(self, index: int) -> tuple[int, int]:
        assert self.table.true_size is not None
        width, height = self.table.true_size[index]
        return int(width), int(height)
