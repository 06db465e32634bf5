# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a prepared set, and what its files are called. docs/prepared.md shows them."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastmim.data.table import Squares

VERSION = 1
MANIFEST = "prepared.json"
PLAN = "prepared-plan.json"
MAX_SHARDS = 10**6
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Values that are checked, names that are all known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileSum(Record):
    """What a file must be."""

    bytes: int = Field(ge=0)
    sha256: Sha256


class Plan(Record):
    """What a set is made of and how: all that decides what its bytes are."""

    version: Literal[1] = 1
    source: Sha256
    """Fingerprint of the images (their names and sizes)."""
    images: int = Field(ge=1)
    """Number of them, bad ones too."""
    side: int = Field(ge=1, le=2**16)
    channels: int = Field(ge=1, le=2**16)
    dtype: Literal["uint8", "float32"]
    stored: Literal["jpeg", "npy"]
    quality: int | None = None
    """Of JPEG; None for npy."""
    shard_images: int = Field(ge=1)
    """Images that a shard stands for, bad ones too."""

    @property
    def squares(self) -> Squares:
        """What the records are."""
        return Squares(self.side, self.channels, self.dtype)

    @property
    def shards(self) -> int:
        """Number of shards of the whole set."""
        return -(-self.images // self.shard_images)

    def rows(self, number: int) -> range:
        """The images of a shard: one of each ``shards``, so that it shows something of all, however they are sorted."""
        return range(number, self.images, self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return _digest(self.model_dump())


def _any_text(value: Any) -> str:
    """Text that came from a file's name, which may be any bytes; pydantic's own check wants clean Unicode."""
    if not isinstance(value, str):
        raise ValueError("a text is needed")
    return value


class ShardNote(Record):
    """``shard-00000.json``: written last, so that a shard that has one is whole."""

    plan: Sha256
    """The plan's digest."""
    count: int = Field(ge=0)
    """Images in the shard."""
    tar: FileSum
    index: FileSum
    bad: list[list[Annotated[Any, AfterValidator(_any_text)]]]
    """[path, reason] of the images that were left out."""


class ShardEntry(Record):
    """A shard, in the list of the set."""

    count: int = Field(ge=0)
    tar: FileSum
    index: FileSum


class Prepared(Record):
    """``prepared.json``: written when all shards are there."""

    plan: Plan
    count: int = Field(ge=1)
    """Images in the set."""
    bad: int = Field(ge=0)
    """Images that were left out."""
    shards: list[ShardEntry] = Field(max_length=MAX_SHARDS)
    digest: Sha256 = "0" * 64
    """SHA-256 of all of the above: what the images are by content."""

    def sealed(self) -> "Prepared":
        """The same with its digest."""
        return self.model_copy(update={"digest": _digest(self.model_dump(exclude={"digest"}))})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_name(number: int, ending: str) -> str:
    """Of the tar, npz or json of a shard."""
    return f"shard-{number:05d}.{ending}"


def join_place(place: str, name: str) -> str:
    """The path or URL of a file of the set in ``place``."""
    return f"{place.rstrip('/')}/{name}"
