# SPDX-License-Identifier: Apache-2.0
"""Object stores, through fsspec: s3://, gs://, and whatever else it knows.

Keys, end points and the like come from where each store's own tools look for them (AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS ...), or from fsspec's settings (FSSPEC_S3_ANON=true).
"""

import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastmim.data.read import MAX_BYTES, BadImage
from fastmim.errors import UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
PAUSES = (0.5, 2.0)
"""Seconds to wait before a failed request is made again: a moment's trouble must not replace an image for good."""


def read_object(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of an object, or ``size`` of them from ``offset`` on.

    Raises:
        BadImage: missing, empty, too many bytes, truncated (it ends before), or unreadable (every other fault).
        UserError: the package for this kind of store is not installed.
    """
    store, path = _open_store(url)
    # A range, so that a huge object does not fill the memory.
    stop = offset + (MAX_BYTES + 1 if size is None else size)
    for pause in (*PAUSES, None):
        try:
            content = bytes(store.cat_file(path, start=offset, end=stop))
            break
        except FileNotFoundError:
            raise BadImage("missing") from None
        except Exception as error:  # each store has its own kinds
            length = _length(store, path)  # a range outside of an object is a fault in S3, and of an empty one any is
            if length is not None and length < (1 if size is None else stop):
                raise BadImage("empty" if size is None else "truncated") from None
            if pause is None or isinstance(error, PermissionError):
                raise BadImage("unreadable") from error
            time.sleep(pause)
    if size is None and len(content) > MAX_BYTES:
        raise BadImage("too many bytes")
    if not content:
        raise BadImage("empty" if size is None else "truncated")
    if size is not None and len(content) < size:
        raise BadImage("truncated")
    return content


def list_objects(url: str) -> Iterator[tuple[str, int]]:
    """(name relative to ``url``, number of bytes) of every object below it, sorted by name.

    Raises:
        UserError: there is nothing, the store cannot be reached, or access is refused.
    """
    with _asking(url):
        # One folder of the first level at a time: all infos of a million objects take a gigabyte.
        store, path = _open_store(url, use_listings_cache=False)
        root = path.rstrip("/") + "/"
        entries = store.ls(path, detail=True)
        ordered = sorted(entries, key=lambda entry: entry["name"] + "/" * (entry["type"] == "directory"))
        for entry in ordered:
            if entry["type"] == "directory":
                for name, info in sorted(store.find(entry["name"], detail=True).items()):
                    yield name.removeprefix(root), int(info["size"] or 0)
            elif entry["name"].rstrip("/") != path.rstrip("/"):
                yield entry["name"].removeprefix(root), int(entry["size"] or 0)


def object_sizes(urls: Sequence[str]) -> list[int]:
    """Number of bytes of each object; many are asked for at the same time. All must be of one store.

    Raises:
        UserError: one is missing, or the store cannot be reached.
    """
    if not urls:
        return []
    with _asking(urls[0]):
        pairs = [_open_store(url) for url in urls]
        return [int(size or 0) for size in pairs[0][0].sizes([path for _, path in pairs])]


@contextmanager
def open_object(url: str, block: int) -> Iterator[Any]:
    """An object as a file that is read in requests of ``block`` bytes.

    Raises:
        UserError: it is missing, or cannot be read.
    """
    with _asking(url):
        store, path = _open_store(url)
        with store.open(path, "rb", block_size=block, cache_type="readahead") as file:
            yield file


def _open_store(url: str, **options: Any) -> tuple[Any, str]:
    protocol, _, rest = url.partition("://")
    # Only the bucket's part: in a whole URL, fsspec takes "::" for several file systems in a chain.
    root = f"{protocol}://{rest.partition('/')[0]}"
    store = _store(os.getpid(), root, tuple(sorted(options.items())))
    return store, store._strip_protocol(url)


@functools.lru_cache(maxsize=16)
def _store(process: int, root: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """A file system of this process: connections of a parent do not work in a forked child."""
    import fsspec.core

    protocol = root.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(root, **dict(options))[0]
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'fastmim[{extra}]'" if extra else _one_line(error)
        raise UserError(f"{root!r} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{root!r} is no store that fsspec knows: {_one_line(error)}") from None


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turns whatever a store's package raises into one line."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{url!r} does not exist ({_one_line(error)}); look for a typing mistake in the names"
        ) from None
    except PermissionError as error:
        raise UserError(f"{url!r}: access is refused ({_one_line(error)}); check the credentials") from None
    except Exception as error:  # each store has its own kinds
        raise UserError(f"{url!r} cannot be read ({_one_line(error)}); check end point and credentials") from None


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;")


def _length(store: Any, path: str) -> int | None:
    try:
        return int(store.info(path)["size"])
    except Exception:  # the caller has an error to tell of already
        return None
