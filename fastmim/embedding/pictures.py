# SPDX-License-Identifier: Apache-2.0
"""What features look like: images beside those that they call alike, and all of them on a map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastmim.config import Config
from fastmim.contact_sheet import stacked, thumbnails, tiled
from fastmim.data.table import ImageTable
from fastmim.embedding.folders import Classes
from fastmim.embedding.formats import plain
from fastmim.embedding.map import draw_map, lay_out, most_images, shortened
from fastmim.embedding.parts import Parts
from fastmim.tasks.probing.knn import nearest_neighbours
from fastmim.train.checkpoint import write_file

QUERIES, NEIGHBOURS, TILE = 10, 8, 96
# Of more images an even choice is compared: enough to find what is alike, and a second on a CPU.
GALLERY, GALLERY_BYTES = 50_000, 2**28
SAME, OTHER = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion


def draw_pictures(
    path: Path, config: Config, table: ImageTable, parts: Parts, classes: Classes | None, name: str, seed: int
) -> tuple[Path, ...]:
    """Writes NAME-neighbours.png and NAME-map.png beside the features; none of a single image.

    Args:
        path: of the features.
        config: what the images are.
        table: those that have features.
        parts: the features.
        classes: of the same images.
        name: of the network.
        seed: of the map.
    """
    if len(table) < 2:
        return ()
    neighbours, chart = (path.with_name(f"{path.stem}-{kind}.png") for kind in ("neighbours", "map"))
    write_file(neighbours, _neighbours_sheet(config, table, parts, classes, name))
    rows = evenly(len(table), most_images(parts.dim))
    found = lay_out(torch.from_numpy(parts.take(rows)), seed)
    write_file(chart, draw_map(found, config, table.take(rows), _of(classes, rows), len(table), name))
    return neighbours, chart


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spread, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64).tolist()


def neighbours(
    features: Float[Tensor, "N D"], queries: int = QUERIES, count: int = NEIGHBOURS
) -> tuple[Int64[Tensor, "Q K"], Float[Tensor, "Q K"]]:
    """Evenly spread queries, each followed by its nearest images, and the cosines after centring; K = 1 + count."""
    chosen = torch.tensor(evenly(len(features), queries))
    found, cosine = nearest_neighbours(features, chosen, count)
    return torch.cat([chosen[:, None], found], 1), torch.cat([torch.ones(len(chosen), 1), cosine], 1)


def _neighbours_sheet(config: Config, table: ImageTable, parts: Parts, classes: Classes | None, name: str) -> bytes:
    gallery = evenly(len(table), max(2, min(GALLERY, GALLERY_BYTES // (4 * parts.dim))))
    places, cosines = neighbours(torch.from_numpy(parts.take(gallery)))
    rows = np.asarray(gallery)[places.numpy()]
    tiles = thumbnails(config, table.take(rows.reshape(-1)), TILE)
    captions = [
        text for row, cosine in zip(rows.tolist(), cosines, strict=True) for text in _captions(row, cosine, classes)
    ]
    frames = [colour for row in rows.tolist() for colour in _frames(row, classes)]
    title = f"{shortened(name)}: an image, and its nearest by cosine among {len(gallery):,}"
    title += "; blue: of its class folder, orange: of another" if classes is not None else ""
    return stacked([tiled(tiles, title, rows.shape[1], captions=captions, frames=frames)])


def _captions(row: Sequence[int], cosine: Float[Tensor, " K"], classes: Classes | None) -> list[str]:
    first = plain(classes.names[classes.labels[row[0]]]) if classes is not None else "image"
    return [first, *(f"{value:.2f}" for value in cosine[1:].tolist())]


def _frames(row: Sequence[int], classes: Classes | None) -> list[str | None]:
    if classes is None:
        return [None] * len(row)
    own, *others = (classes.labels[place] for place in row)
    return [None, *(SAME if label == own else OTHER for label in others)]


def _of(classes: Classes | None, rows: Sequence[int]) -> Classes | None:
    return classes and Classes(classes.names, tuple(classes.labels[row] for row in rows))
