# SPDX-License-Identifier: Apache-2.0
"""The files that features are written to: npz for NumPy, parquet for tables, csv for all else.

They are written block by block, so that memory does not grow with the images, and become visible by one rename.
"""

import csv
import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.embedding.folders import Classes
from fastmim.embedding.parts import Parts
from fastmim.errors import UserError
from fastmim.train.checkpoint import replacing, write_file

_META = "meta"
_KEY = b"fastmim"


@dataclass(frozen=True)
class Contents:
    """What is written."""

    parts: Parts
    paths: Sequence[str]
    """Of the images that have features; any bytes (surrogateescape)."""
    classes: Classes | None
    """Of the same images."""
    meta: dict[str, Any]
    """What the features were computed with, as plain JSON values."""


def check_out(path: Path) -> None:
    """Before anything costly begins.

    Raises:
        UserError: ``path`` cannot be written, or its ending is of no format, or of one that needs another package.
    """
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"{str(path)!r} must end in one of: {', '.join(WRITERS)}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{str(path)!r} cannot be written: Permission denied")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "writing .parquet needs pyarrow: pip install 'fastmim[eval]', or give an --out that ends in .npz"
        )


def write(path: Path, contents: Contents) -> None:
    """Replaces ``path`` as a whole, in the format that its ending names.

    Raises:
        OSError: the disk is full or not writable; what was there before is as it was.
    """
    WRITERS[path.suffix.lower()](path, contents)


def read_meta(path: Path) -> dict[str, Any] | None:
    """What the features in a file were computed with; None where it is none of ours."""
    try:
        text = READERS[path.suffix.lower()](path)
        meta = json.loads(text) if text else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return meta if isinstance(meta, dict) else None


def beside(path: Path, ending: str) -> Path:
    """A file that belongs to the features: their name with something after it."""
    return path.with_name(path.name + ending)


def plain(text: str) -> str:
    """A name that may hold any bytes, as text that every program can show."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _write_npz(path: Path, contents: Contents) -> None:
    """``numpy.load(path)`` reads it; without pickle, and in time linear in what is read."""
    parts, classes = contents.parts, contents.classes
    arrays = {"paths": np.array(contents.paths, dtype=np.str_), _META: np.array(json.dumps(contents.meta))}
    if classes is not None:
        arrays |= {"labels": np.array(classes.labels, dtype=np.int64), "classes": np.array(classes.names)}
    with replacing(path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (parts.images, parts.dim)}
            np.lib.format.write_array_header_2_0(member, header)
            for block in parts.blocks():
                member.write(block.astype("<f4", copy=False).tobytes())
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _read_npz(path: Path) -> str:
    with np.load(path, allow_pickle=False) as file:
        return str(file[_META])


def _write_parquet(path: Path, contents: Contents) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts, classes = contents.parts, contents.classes
    fields = [pa.field("path", pa.string()), pa.field("feature", pa.list_(pa.float32(), parts.dim))]
    if classes is not None:
        fields.insert(1, pa.field("label", pa.string()))
    schema = pa.schema(fields, metadata={_KEY: json.dumps(contents.meta).encode()})
    begin = 0
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for block in parts.blocks():
            rows = slice(begin, begin + len(block))
            flat = pa.array(np.ascontiguousarray(block).reshape(-1))
            columns = [
                pa.array([plain(text) for text in contents.paths[rows]], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, parts.dim),
            ]
            if classes is not None:
                columns.insert(
                    1, pa.array([plain(classes.names[label]) for label in classes.labels[rows]], pa.string())
                )
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            begin += len(block)


def _read_parquet(path: Path) -> str:
    import pyarrow.parquet as pq

    found: bytes = (pq.read_schema(path).metadata or {}).get(_KEY, b"")
    return found.decode()


def _write_csv(path: Path, contents: Contents) -> None:
    """Each number with as many digits as bring the same float32 back; what they were computed with lies beside it."""
    paths = iter(contents.paths)
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"f{number}" for number in range(contents.parts.dim))])
        for block in contents.parts.blocks():
            writer.writerows([next(paths), *map(str, row)] for row in block)
    write_file(beside(path, ".json"), json.dumps(contents.meta, indent=1).encode())


def _read_csv(path: Path) -> str:
    return beside(path, ".json").read_text(encoding="utf-8") if path.is_file() else ""


def bad_list(bad: dict[str, str]) -> bytes:
    """CSV with the columns path and reason."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "reason"))
    writer.writerows(bad.items())
    return text.getvalue().encode("utf-8", "surrogateescape")


WRITERS: dict[str, Callable[[Path, Contents], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
READERS: dict[str, Callable[[Path], str]] = {".npz": _read_npz, ".parquet": _read_parquet, ".csv": _read_csv}
