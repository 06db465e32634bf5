# SPDX-License-Identifier: Apache-2.0
"""The format of prepared sets (docs/prepared.md): how they are read.

A prepared set may have been copied, cut short or made by others: whatever is wrong with it is one line.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import simplejpeg
import torch
from jaxtyping import Float32, Num, UInt8
from pydantic import ValidationError
from torch import Tensor

from fastmim.data.prepared.records import (
    MANIFEST,
    PLAN,
    VERSION,
    FileSum,
    Plan,
    Prepared,
    Record,
    ShardEntry,
    file_name,
    join_place,
)
from fastmim.data.read import BadImage, is_remote, read_into
from fastmim.data.table import ImageTable, Squares
from fastmim.errors import UserError

COLUMNS = {
    "key": np.int64,
    "offset": np.int64,
    "size": np.int64,
    "width": np.int32,
    "height": np.int32,
    "names": np.uint8,
    "ends": np.int64,
}
"""The arrays of an index: one number for each image, but ``names``, which are all names as bytes, one after another."""
_MAGIC = b"\x93NUMPY\x01\x00"
_AT_ONCE = 16  # requests to an object store

Columns = dict[str, np.ndarray]
RecordT = TypeVar("RecordT", bound=Record)


# ---- Reading a set


def is_prepared(place: str) -> bool:
    """Whether a folder or a URL holds a prepared set, or the beginning of one (which ``load_prepared`` refuses)."""
    if not is_remote(place):
        return any(os.path.isfile(join_place(place, name)) for name in (MANIFEST, PLAN))  # noqa: PTH113 - any text
    for name in (MANIFEST, PLAN):
        try:
            _read(join_place(place, name))
            return True
        except BadImage:
            continue
    return False


def load_prepared(place: str) -> ImageTable:
    """The images of a prepared set, with the upright sizes of the originals and their names.

    The indices are checked by their sums, the tars by their sizes: reading all of them takes too long for each start.

    Raises:
        UserError: the set is not finished, files are missing or damaged, or its format is not known.
    """
    prepared = load_manifest(place)
    _check_sizes(place, prepared)

    def load(number: int) -> Columns:
        entry = prepared.shards[number]
        where = join_place(place, file_name(number, "npz"))
        try:
            return parse_index(_read(where), entry)
        except BadImage as error:
            raise _damaged(place, f"{where!r} is {error.reason}") from None

    numbers = range(len(prepared.shards))
    if is_remote(place):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            columns = list(pool.map(load, numbers))
    else:
        columns = [load(number) for number in numbers]
    counts = np.array([entry.count for entry in prepared.shards])
    shift = np.concatenate([[0], np.cumsum([len(one["names"]) for one in columns])])
    end = np.concatenate([one["ends"] + first for one, first in zip(columns, shift[:-1], strict=True)])
    plan = prepared.plan
    table = ImageTable(
        blob=b"".join(one["names"].tobytes() for one in columns),
        start=np.concatenate([[0], end[:-1]]).astype(np.int64),
        end=end,
        containers=tuple(join_place(place, file_name(number, "tar")) for number in numbers),
        container=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        offset=np.concatenate([one["offset"] for one in columns]),
        size=np.concatenate([one["size"] for one in columns]),
        formats={plan.stored: prepared.count},
        true_size=np.concatenate([np.stack([one["width"], one["height"]], axis=1) for one in columns]),
        squares=plan.squares,
        source=prepared.digest,
    )
    # The order of the source, in which neighbours lie in different shards.
    return table.take(np.argsort(np.concatenate([one["key"] for one in columns]), kind="stable"))


def load_manifest(place: str) -> Prepared:
    """``prepared.json`` of the set in ``place``.

    Raises:
        UserError: there is none, it is damaged, or its format is not known.
    """
    prepared = read_record(place, MANIFEST, Prepared)
    if prepared is None:
        if read_record(place, PLAN, Plan) is not None:
            raise UserError(
                f"{place!r} is a prepared set that is not finished; run the same fastmim prepare again,"
                f" or fastmim prepare --out {place} --merge when all parts are done"
            )
        raise UserError(f"{place!r} holds no prepared set ({MANIFEST}); make one with fastmim prepare")
    whole = len(prepared.shards) == prepared.plan.shards and prepared.sealed() == prepared
    if not whole or sum(entry.count for entry in prepared.shards) != prepared.count:
        raise _damaged(place, f"{MANIFEST} has been changed")
    return prepared


def read_record(place: str, name: str, schema: type[RecordT]) -> RecordT | None:
    """A JSON file of a set; None if there is no such file.

    Raises:
        UserError: it cannot be read, is damaged, or of a version that is not known.
    """
    try:
        content = json.loads(_read(join_place(place, name)))
        plan = content.get("plan", content) if isinstance(content, dict) else None
        version = plan.get("version", VERSION) if isinstance(plan, dict) else VERSION
        if version != VERSION:
            raise UserError(
                f"{join_place(place, name)!r} has format version {version!r}, but this fastmim reads {VERSION};"
                " use the fastmim that made it, or prepare again"
            )
        return schema.model_validate(content)
    except BadImage as error:
        if error.reason == "missing":
            return None
        raise _damaged(place, f"{name} is {error.reason}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(place, f"{name}: {where}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise _damaged(place, f"{name} is no JSON") from None


def load_sums(table: ImageTable) -> dict[str, FileSum]:
    """Length and SHA-256 of each tar of the prepared set that ``table`` was loaded from, by path or URL.

    Raises:
        UserError: as ``load_prepared``.
    """
    place = table.containers[0].rpartition("/")[0]
    entries = load_manifest(place).shards
    return {join_place(place, file_name(number, "tar")): entry.tar for number, entry in enumerate(entries)}


def _read(where: str) -> bytes:
    """All of a small file or object."""
    if is_remote(where):
        from fastmim.data.sources.remote import read_object

        return read_object(where)
    try:
        with open(where, "rb") as file:  # noqa: PTH123 - any text may be a place
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing") from None
    except (OSError, ValueError):
        raise BadImage("unreadable") from None


def _check_sizes(place: str, prepared: Prepared) -> None:
    wanted = {file_name(number, "tar"): entry.tar.bytes for number, entry in enumerate(prepared.shards)}
    wanted |= {file_name(number, "npz"): entry.index.bytes for number, entry in enumerate(prepared.shards)}
    found = _sizes(place, wanted)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise _damaged(place, f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    for name, size in wanted.items():
        if found[name] != size:
            raise _damaged(place, f"{name} has {found[name]} bytes and not {size}")


def _sizes(place: str, names: Iterable[str]) -> dict[str, int]:
    if is_remote(place):
        from fastmim.data.sources.remote import list_objects

        return {name.rsplit("/", 1)[-1]: size for name, size in list_objects(place)}
    found = {}
    for name in names:
        try:
            found[name] = os.stat(join_place(place, name)).st_size  # noqa: PTH116 - thousands of them
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{join_place(place, name)!r} cannot be read: {error.strerror}") from None
    return found


def parse_index(content: bytes, entry: ShardEntry) -> Columns:
    """The arrays of ``shard-00000.npz``.

    Raises:
        BadImage: they are not what the set says, or do not fit each other.
    """
    if hashlib.sha256(content).hexdigest() != entry.index.sha256:
        raise BadImage("damaged")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except Exception:  # a dozen kinds, from zip, zlib, NumPy and its parser of headers
        raise BadImage("damaged") from None
    if {name: column.dtype for name, column in columns.items()} != COLUMNS or not _fits(columns, entry):
        raise BadImage("damaged")
    return columns


def _fits(columns: Columns, entry: ShardEntry) -> bool:
    """Whether an index can be true: no record beyond the tar, no name beyond the names, no empty picture."""
    numbers = [columns[name] for name in COLUMNS if name != "names"]
    if any(column.shape != (entry.count,) for column in numbers) or columns["names"].ndim != 1:
        return False
    if not entry.count:
        return not len(columns["names"])
    offset, size, ends = columns["offset"], columns["size"], columns["ends"]
    lengths = np.diff(ends, prepend=0)
    checks: tuple[Callable[[], Any], ...] = (
        lambda: offset.min() >= 0 and size.min() > 0,
        lambda: (size <= entry.tar.bytes).all() and (offset <= entry.tar.bytes - size).all(),
        lambda: lengths.min() >= 0 and ends[-1] == len(columns["names"]),
        lambda: min(columns["width"].min(), columns["height"].min()) > 0,
    )
    return all(bool(check()) for check in checks)


def _damaged(place: str, what: str) -> UserError:
    return UserError(
        f"the prepared set {place!r} is damaged: {what}; copy it again, or run its fastmim prepare again, which makes"
        " what is missing"
    )


# ---- Reading a square


@functools.cache
def npy_header(squares: Squares) -> bytes:
    """What stands before the values of a .npy file of a square; a multiple of 64 bytes, so that values are aligned."""
    kind = {"uint8": "|u1", "float32": "<f4"}[squares.dtype]
    shape = (squares.side, squares.side, squares.channels)
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64 - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def read_raw_square(path: str, offset: int, size: int, squares: Squares, out: Num[Tensor, "N N C"]) -> bool:
    """Reads a record of plain values from its file straight into ``out``; False if it is not one, or a JPEG.

    Raises:
        BadImage: the file is missing or ends before.
    """
    header = npy_header(squares)
    if size != len(header) + out.nbytes:
        return False
    found = bytearray(len(header))
    values: Any = out.numpy()
    read_into(path, offset, [memoryview(found), memoryview(values).cast("B")])
    return found == header


def decode_square(content: bytes, squares: Squares) -> UInt8[Tensor, "C N N"] | Float32[Tensor, "C N N"]:
    """The pixels of a record, in memory of their own (colours side by side).

    Raises:
        BadImage: it is damaged, or of another shape or type than the set's.
    """
    out = torch.empty(squares.side, squares.side, squares.channels, dtype=getattr(torch, squares.dtype))
    decode_square_into(content, squares, out)
    return out.permute(2, 0, 1)


def decode_square_into(content: bytes, squares: Squares, out: Num[Tensor, "N N C"] | Num[np.ndarray, "N N C"]) -> None:
    """Writes the pixels of a record into ``out``, whose memory must be in one piece; after an error it may be anything.

    Raises:
        BadImage: it is damaged, or of another shape or type than the set's.
    """
    pixels = out.numpy() if isinstance(out, Tensor) else out
    assert pixels.shape == (squares.side, squares.side, squares.channels) and pixels.flags.c_contiguous
    assert pixels.dtype == squares.dtype
    if content.startswith(_MAGIC) or squares.dtype != "uint8":
        header = npy_header(squares)
        if not content.startswith(header) or len(content) != len(header) + pixels.nbytes:
            raise BadImage("damaged")
        pixels[...] = np.frombuffer(content, pixels.dtype, offset=len(header)).reshape(pixels.shape)
        return
    colours = {1: "GRAY", 3: "RGB"}.get(squares.channels)
    if colours is None:
        raise BadImage("damaged")
    try:
        decoded = simplejpeg.decode_jpeg(content, colours, buffer=pixels)
    except ValueError:
        raise BadImage("damaged") from None
    # A smaller picture fits into the memory too, in the wrong places.
    if decoded.shape != pixels.shape:
        raise BadImage("damaged")
