# SPDX-License-Identifier: Apache-2.0
"""Writes one shard of a prepared set: the same bytes on every machine, whole or not at all."""

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Num
from torch import Tensor

from fastmim.data.augment import Box
from fastmim.data.decoding.decode import open_image
from fastmim.data.prepared.claim import claimed
from fastmim.data.prepared.records import FileSum, Plan, ShardNote, file_name
from fastmim.data.prepared.shards import COLUMNS, npy_header, read_record
from fastmim.data.read import BadImage
from fastmim.data.table import ImageTable
from fastmim.errors import UserError

FULL_COLOUR = 95
"""The lowest quality at which colour is stored at full resolution (4:4:4)."""
REPORT_EVERY = 0.25  # seconds
PATIENCE = 10.0  # seconds; the workers of a killed process need a moment to die


class Done(NamedTuple):
    """What was done since the last report."""

    images: int
    """Good and bad ones; below 0 where earlier reports are taken back."""
    bad: tuple[tuple[str, str], ...]
    """(path, reason)"""


class Stored(NamedTuple):
    """One image as it is stored."""

    content: bytes
    width: int
    """Of the upright original."""
    height: int


def store(table: ImageTable, row: int, plan: Plan) -> Stored:
    """Decodes an image, squashes it to a square and encodes that.

    Raises:
        BadImage: it cannot be read.
    """
    image = open_image(table.read(row), plan.channels, plan.dtype == "float32")
    pixels = image.crop(Box(0, 0, image.width, image.height), plan.side)
    return Stored(encode(pixels, plan), image.width, image.height)


def encode(pixels: Num[Tensor, "C N N"], plan: Plan) -> bytes:
    """A square as a JPEG or .npy file."""
    values = pixels.permute(1, 2, 0).contiguous().numpy()
    if plan.stored == "npy":
        assert values.dtype == plan.dtype
        return npy_header(plan.squares) + values.tobytes()
    assert plan.quality is not None
    if plan.channels == 1:
        return simplejpeg.encode_jpeg(values, plan.quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(values, plan.quality, "RGB", "444" if plan.quality >= FULL_COLOUR else "420")


def stored_bytes(content: int) -> int:
    """About what an image of ``content`` encoded bytes takes on the disk: two members of the tar and an index row."""
    return 512 + -(-content // 512) * 512 + 1024 + 64


class TarWriter:
    """Plain ustar, byte for byte the same for the same members; webdataset pairs members by their key."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def add(self, name: str, content: bytes) -> int:
        """Appends a member; the offset of its content."""
        head = tarfile.TarInfo(name)
        head.size, head.mode = len(content), 0o644
        self._write(head.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self._bytes
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> FileSum:
        """Ends the archive, and says what it is."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        return FileSum(bytes=self._bytes, sha256=self._digest.hexdigest())

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)


def write_shard(
    table: ImageTable,
    number: int,
    plan: Plan,
    folder: Path,
    begin: Callable[[int], None] = lambda row: None,
    deadly: Mapping[int, str] = MappingProxyType({}),
) -> Iterator[Done]:
    """Writes ``shard-NUMBER``: the tar, then its index, then its note; yields reports on the way.

    Args:
        table: all images of the set.
        number: of the shard.
        plan: what the set is to be.
        folder: of the set.
        begin: is told the row of each image before it is opened.
        deadly: rows that are not to be opened, and the reasons.

    Raises:
        UserError: another process is writing it.
        OSError: the folder cannot be written to.
    """
    final = {ending: folder / file_name(number, ending) for ending in ("tar", "npz", "json")}
    try:
        with claimed(_scratch(folder, number), PATIENCE) as claim:
            # Its note comes first off and last on: a shard that has one is whole.
            final["json"].unlink(missing_ok=True)
            tar, index = TarWriter(claim.file), _Index()
            bad: list[tuple[str, str]] = []
            images = _images(table, plan.rows(number), plan, begin, deadly)
            for report in _add_all(table, images, plan, tar, index):
                bad += report.bad
                yield report
            tar_sum = tar.close()
            content = index.content()
            index_sum = FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            claim.finish(final["tar"])
            write_whole(final["npz"], content)
            note = ShardNote(
                plan=plan.digest,
                count=len(index),
                tar=tar_sum,
                index=index_sum,
                bad=[list(pair) for pair in bad],
            )
            write_whole(final["json"], json.dumps(note.model_dump()).encode())
    except TimeoutError as error:
        raise UserError(f"{error}; wait for it, or stop it") from None


def remove_scratch(folder: Path, number: int) -> None:
    """Removes what a process that was killed left of a shard, unless another one has taken it over."""
    with claimed(_scratch(folder, number), patience=0):
        for ending in ("npz", "json"):
            (folder / file_name(number, f"{ending}.tmp")).unlink(missing_ok=True)


def _scratch(folder: Path, number: int) -> Path:
    """Where the tar of a shard is written until it is whole; who has claimed it writes the shard."""
    return folder / file_name(number, "tar.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file as a whole.

    Raises:
        OSError: the folder cannot be written to.
    """
    with claimed(Path(f"{path}.tmp")) as claim:
        claim.file.write(content)
        claim.finish(path)


def is_done(folder: Path, number: int, plan: Plan) -> ShardNote | None:
    """The note of a shard that is whole: made by ``plan``, and its files have their lengths."""
    try:
        note = read_record(str(folder), file_name(number, "json"), ShardNote)
    except UserError:
        return None  # a damaged note: the shard is made again
    if note is None or note.plan != plan.digest:
        return None
    for ending, file in (("tar", note.tar), ("npz", note.index)):
        path = folder / file_name(number, ending)
        if not path.is_file() or path.stat().st_size != file.bytes:
            return None
    return note


class _Index:
    """What ``shard-00000.npz`` is made of."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._names = io.BytesIO()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: int, offset: int, image: Stored, name: bytes) -> None:
        self._names.write(name)
        self._rows.append((key, offset, len(image.content), image.width, image.height, self._names.tell()))

    def content(self) -> bytes:
        table = np.array(self._rows, np.int64).reshape(-1, 6)
        numbers = dict(zip(("key", "offset", "size", "width", "height", "ends"), table.T, strict=True))
        columns = numbers | {"names": np.frombuffer(self._names.getvalue(), np.uint8)}
        out = io.BytesIO()
        np.savez(out, **{name: columns[name].astype(kind) for name, kind in COLUMNS.items()})  # type: ignore[arg-type]
        return out.getvalue()


def _images(
    table: ImageTable, rows: range, plan: Plan, begin: Callable[[int], None], deadly: Mapping[int, str]
) -> Iterator[tuple[int, Stored | str]]:
    """Each row with the image or the reason why there is none."""
    for row in rows:
        begin(row)
        try:
            yield row, deadly.get(row) or store(table, row, plan)
        except BadImage as error:
            yield row, error.reason
        except Exception as error:
            error.add_note(f"while preparing {table.path(row)!r}")
            raise


def _add_all(
    table: ImageTable, images: Iterator[tuple[int, Stored | str]], plan: Plan, tar: TarWriter, index: _Index
) -> Iterator[Done]:
    ending = {"jpeg": "jpg", "npy": "npy"}[plan.stored]
    count, reported = 0, time.monotonic()
    bad: list[tuple[str, str]] = []
    for row, image in images:
        count += 1
        if isinstance(image, str):
            bad.append((table.path(row), image))
        else:
            note = {"name": table.name(row), "width": image.width, "height": image.height}
            offset = tar.add(f"{row:09d}.{ending}", image.content)
            # Plain ASCII: bytes of a name that are no UTF-8 come back from the escapes with os.fsencode.
            tar.add(f"{row:09d}.json", json.dumps(note).encode())
            index.add(row, offset, image, table.blob[table.start[row] : table.end[row]])
        if time.monotonic() - reported > REPORT_EVERY:
            yield Done(count, tuple(bad))
            count, bad, reported = 0, [], time.monotonic()
    yield Done(count, tuple(bad))
