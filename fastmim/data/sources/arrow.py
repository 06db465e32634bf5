# SPDX-License-Identifier: Apache-2.0
"""Images in Hugging Face ``datasets`` folders and .parquet files (extra ``datasets``).

``datasets`` keeps a table in Arrow files, in which the bytes of each image lie in one piece, not compressed. So a row
is a stretch of such a file, and is read without ``datasets``.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from fastmim.data.sources.rows import FORMAT_OF_SUFFIX, Rows, suffix_of
from fastmim.data.table import WHOLE
from fastmim.errors import UserError

_REMEDY = "load it with datasets, call flatten_indices(), save_to_disk(), and give that folder"
# What the files of each format begin with (after as many bytes), for rows that hold no name.
_MAGIC = (
    ("jpg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG"),
    ("webp", 8, b"WEBP"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    ("tif", 0, b"II*\0"),
    ("tif", 0, b"MM\0*"),
    ("avif", 4, b"ftypavi"),
    ("dcm", 128, b"DICM"),
)
_HEAD = 132  # bytes that tell them apart

Entry = tuple[str, bytes, int, int]
"""Container, name, number of bytes, and offset; as in ``ImageTable``."""


def read_saved(folder: str, rows: Rows) -> None:
    """Adds the images of a folder that ``save_to_disk`` wrote; of all splits, since each is a folder that can be given.

    Names are split/row.suffix.

    Raises:
        UserError: it is damaged, or has no column of images or more than one.
    """
    datasets = _datasets(folder)
    try:
        loaded = datasets.load_from_disk(folder, keep_in_memory=False)
    except Exception as error:  # from JSON, Arrow and the file system
        raise UserError(f"the datasets folder {folder!r} cannot be read: {_one_line(error)}") from None
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "data"): loaded}
    for name in sorted(splits):
        _add_split(rows, folder, name, splits[name])


def read_parquet(place: str, files: Sequence[str], rows: Rows) -> None:
    """Adds the images of .parquet files; ``datasets`` first writes them once as Arrow files, to its cache.

    Names are data/row.suffix.

    Raises:
        UserError: a file is damaged, or there is no column of images or more than one.
    """
    datasets = _datasets(place)
    try:
        loaded = datasets.load_dataset("parquet", data_files={"data": list(files)}, split="data", keep_in_memory=False)
    except Exception as error:  # from Arrow, the file system, and datasets' own kinds
        raise UserError(f"the .parquet files in {place!r} cannot be read: {_one_line(error)}") from None
    _add_split(rows, place, "data", loaded)


def _datasets(place: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{place!r} needs the package datasets: pip install 'fastmim[datasets]'") from None
    return datasets


def _add_split(rows: Rows, place: str, split: str, dataset: Any) -> None:
    column = _image_column(place, dataset.features)
    seen = 0
    for cached in dataset.cache_files:
        path = os.path.abspath(cached["filename"])  # noqa: PTH100 - a string is what is kept
        for entries, count in _read_arrow(place, path, column, split, seen):
            seen += count
            for container, group in itertools.groupby(entries, lambda entry: entry[0]):
                found = list(group)
                offsets = [entry[3] for entry in found]
                names = [entry[1] for entry in found]
                rows.add(container, names, [entry[2] for entry in found], offsets)
    if seen != len(dataset):
        raise UserError(f"the rows of {place!r} are not those of its files in order; {_REMEDY}")


def _image_column(place: str, features: Any) -> str:
    from datasets import Image

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))

    names = [name for name, feature in features.items() if holds_images(feature)]
    if len(names) == 1 or "image" in names:
        return "image" if "image" in names else names[0]
    found = ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in features.items())
    wanted = "one of them alone, or called 'image'" if names else "one of the type Image"
    raise UserError(f"{place!r} has {len(names) or 'no'} columns of images: found {found}; wanted {wanted}")


def _read_arrow(place: str, path: str, column: str, split: str, first: int) -> Iterator[tuple[list[Entry], int]]:
    """What each batch of an Arrow file holds, and its number of rows."""
    import pyarrow

    with pyarrow.memory_map(path) as source:
        whole = source.read_buffer()
        source.seek(0)
        seen = 0
        for batch in pyarrow.ipc.open_stream(source):
            images = batch.column(batch.schema.get_field_index(column))
            there, ends = _stretches(place, images, whole)
            if not seen:
                _verify(place, path, images, there, ends)
            entries = []
            paths = images.field("path").to_pylist()
            for row, file in enumerate(paths):
                name = f"{split}/{first + seen + row:08d}"
                if there[row]:
                    begin, size = int(ends[row]), int(ends[row + 1] - ends[row])
                    suffix = suffix_of(os.fsencode(file or ""))
                    if suffix not in FORMAT_OF_SUFFIX:
                        suffix = _sniff(whole.slice(begin, min(size, _HEAD)).to_pybytes())
                    entries.append((path, f"{name}.{suffix}".encode(), size, begin))
                elif file:
                    entries.append(("", os.fsencode(file), _size_of_file(place, name, file), WHOLE))
            seen += len(images)
            yield entries, len(images)


def _stretches(place: str, images: Any, whole: Any) -> tuple[Bool[np.ndarray, " n"], Int64[np.ndarray, " n+1"]]:
    """Which rows hold bytes, and where in the file each row begins and the last one ends."""
    content = images.field("bytes")
    kind = str(content.type)
    if kind not in ("binary", "large_binary"):
        raise UserError(f"the images in {place!r} are kept as {kind}, and not as bytes; {_REMEDY}")
    _, ends, data = content.buffers()
    there = np.asarray(content.is_valid()) & np.asarray(images.is_valid())
    if data is None or not data.size:
        return there, np.zeros(len(content) + 1, np.int64)
    begin = data.address - whole.address
    if begin < 0 or begin + data.size > whole.size:
        # Decompressed, or converted: the bytes are in memory, but not so in the file.
        raise UserError(f"the images in {place!r} are compressed in the Arrow file; {_REMEDY}")
    width = np.dtype(np.int64 if kind == "large_binary" else np.int32)
    return there, begin + np.frombuffer(ends, width, len(content) + 1, content.offset * width.itemsize).astype(np.int64)


def _verify(place: str, path: str, images: Any, there: Bool[np.ndarray, " n"], ends: Int64[np.ndarray, " n+1"]) -> None:
    """Reads two rows back from the file: what is found above rests on how Arrow lays out its memory."""
    rows = np.flatnonzero(there)
    with open(path, "rb") as file:  # noqa: PTH123 - any text may be a path
        for row in [*rows[:1].tolist(), *rows[1:][-1:].tolist()]:
            file.seek(int(ends[row]))
            if file.read(int(ends[row + 1] - ends[row])) != images[row]["bytes"].as_py():
                raise UserError(f"the images in {place!r} cannot be read in place; {_REMEDY}")


def _sniff(head: bytes) -> str:
    return next((suffix for suffix, skip, magic in _MAGIC if head[skip:].startswith(magic)), "bin")


def _size_of_file(place: str, name: str, path: str) -> int:
    try:
        if not path.startswith("/"):
            raise FileNotFoundError(2, "its path is not absolute")
        return os.stat(path).st_size  # noqa: PTH116 - any text may be a path
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"row {name} of {place!r} has no bytes, only the path {path!r}: {reason};"
            " save the dataset where the file is, so that it is taken in"
        ) from None


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
