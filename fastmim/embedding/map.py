# SPDX-License-Identifier: Apache-2.0
"""Features as places on a plane, where what is near is alike: t-SNE (van der Maaten and Hinton 2008), else PCA."""

import importlib.util
import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastmim.config import Config
from fastmim.contact_sheet import thumbnails
from fastmim.data.table import ImageTable
from fastmim.embedding.folders import Classes
from fastmim.embedding.formats import plain
from fastmim.seeding import derive

MOST, MOST_BYTES = 3000, 2**28
# Below it, t-SNE has too few neighbours to keep.
FEWEST = 10
_COMPONENTS = 50  # as van der Maaten and Hinton reduce to, section 4.2: it takes noise away, and is fast
_SIDE, _MARGIN, _HEAD, _ROW = 800, 20, 66, 24  # of the panels in pixels; above them; of each row of the legend
_CELLS = 20  # thumbnails across, at most
MOST_CLASSES = 12
# The report's colours and, after them, other shapes: shapes tell apart what some kinds of colour vision do not.
_COLOURS = ("#1f5fbf", "#c2570c", "#1b7a43", "#8b3fb5", "#0e7c86", "#b3275e", "#6b6f1d", "#5b6069")
_SHAPES = "os^DvPX*"
_INK, _PALE = "#1b1d21", "#5b6069"


class Map(NamedTuple):
    """Where each image lies."""

    points: Float32[np.ndarray, "n 2"]
    """From 0 to 1; right and up."""
    method: str


def most_images(dim: int) -> int:
    """How many images of ``dim`` numbers a map shows."""
    return max(2, min(MOST, MOST_BYTES // (4 * dim)))


def lay_out(features: Float[Tensor, "n D"], seed: int) -> Map:
    """A map of at least two images; a pure function of its arguments on one machine.

    Features are centred and brought to length 1 first, so that near means a high cosine, as for neighbours.
    """
    unit = F.normalize(features.double() - features.double().mean(0), dim=1)
    start = _principal(unit, seed)
    points, method = start[:, :2].numpy(), "PCA"
    if len(unit) >= FEWEST and float(start.std()) > 0:
        if importlib.util.find_spec("sklearn") is None:
            method = "PCA (without scikit-learn)"
        else:
            points, method = _tsne(start.float().numpy(), seed), "t-SNE"
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / np.where(high > low, high - low, 1)
    return Map(scaled.astype(np.float32), method)


def _principal(unit: Float[Tensor, "n D"], seed: int) -> Float[Tensor, "n d"]:
    """The first principal components, at least two, each with the sign that makes its largest entry positive."""
    count = min(_COMPONENTS, *unit.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "map", 0))
        left, size, _ = torch.pca_lowrank(unit, q=count, niter=4)
    found = left * size
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    found = found * torch.where(largest < 0, -1.0, 1.0)
    return F.pad(found, (0, max(0, 2 - count)))


def _tsne(start: Float32[np.ndarray, "n d"], seed: int) -> Float32[np.ndarray, "n 2"]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(start) - 1) / 3)
    state = derive(seed, "map", 1) % 2**32
    return TSNE(2, perplexity=perplexity, init="pca", random_state=state).fit_transform(start)


def snapped(points: Float32[np.ndarray, "n 2"], cells: int) -> dict[tuple[int, int], int]:
    """For each cell (row from above, column) that holds images, the one that is nearest to its middle."""
    column, row = np.clip((points * cells).astype(np.int64), 0, cells - 1).T
    distance = ((points * cells - np.stack([column, row], 1) - 0.5) ** 2).sum(1)
    found: dict[tuple[int, int], int] = {}
    for image in np.argsort(-distance, kind="stable").tolist():  # the nearest is written last
        found[cells - 1 - int(row[image]), int(column[image])] = image
    return found


def draw_map(found: Map, config: Config, table: ImageTable, classes: Classes | None, total: int, name: str) -> bytes:
    """The map as PNG: thumbnails on a grid; left of them, where there are few classes, all images as coloured points.

    Args:
        found: where the images lie.
        config: what they are.
        table: the images.
        classes: of them.
        total: how many images there are, of which these are an even choice.
        name: of the network.
    """
    coloured = classes if classes is not None and len(classes.names) <= MOST_CLASSES else None
    panels = 1 if coloured is None else 2
    rows = _legend_rows(coloured)
    width, height = _MARGIN + panels * (_SIDE + _MARGIN), _HEAD + rows * _ROW + _SIDE + _MARGIN
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    cells = int(np.clip(np.ceil(np.sqrt(2 * len(table))), 4, _CELLS))
    chosen = snapped(found.points, cells)
    mosaic = _mosaic(chosen, config, table, cells, coloured)
    figure.figimage(mosaic, width - _MARGIN - _SIDE, _MARGIN, origin="upper")
    some = f"{len(table):,} of {total:,} images" if len(table) < total else f"{total:,} images"
    said = f"{found.method} of {some}; near is alike to the network; each cell shows one image"
    words = [(f"Features of {shortened(name)}", 22, 14, _INK), (said, 48, 10, _PALE)]
    for text, down, size, colour in words:
        figure.text(
            _MARGIN / width, 1 - down / height, text, fontsize=size, color=colour, va="center", parse_math=False
        )
    if coloured is not None:
        box = (_MARGIN / width, _MARGIN / height, _SIDE / width, _SIDE / height)
        _scatter(figure.add_axes(box), found.points, coloured)
        legend = figure.add_axes((0, 1 - (_HEAD + rows * _ROW - 4) / height, 1, rows * _ROW / height))
        _legend(legend, coloured, rows, width)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in letters that the font does not have
        figure.savefig(file, format="png")
    return file.getvalue()


def _mosaic(
    chosen: dict[tuple[int, int], int], config: Config, table: ImageTable, cells: int, classes: Classes | None
) -> UInt8[np.ndarray, "S S 3"]:
    """Thumbnails in their cells on white, each in a frame of its class's colour."""
    pitch = _SIDE // cells
    frame = 0 if classes is None else 2
    side = pitch - 2 - 2 * frame
    images = list(chosen.values())
    tiles = thumbnails(config, table.take(images), side).permute(0, 2, 3, 1).numpy()
    mosaic = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    for (row, column), image, tile in zip(chosen, images, tiles, strict=True):
        top, left = row * pitch + 1, column * pitch + 1
        if classes is not None:
            colour = _COLOURS[classes.labels[image] % len(_COLOURS)]
            mosaic[top : top + side + 2 * frame, left : left + side + 2 * frame] = _rgb(colour)
        mosaic[top + frame : top + frame + side, left + frame : left + frame + side] = tile
    return mosaic


def _rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _look(label: int) -> dict[str, Any]:
    return {"color": _COLOURS[label % len(_COLOURS)], "marker": _SHAPES[label % len(_SHAPES) - label // len(_COLOURS)]}


def _scatter(axes: Axes, points: Float32[np.ndarray, "n 2"], classes: Classes) -> None:
    labels = np.asarray(classes.labels)
    size = float(np.clip(30_000 / len(points), 18, 80))
    for label in np.unique(labels).tolist():
        here = points[labels == label]
        look = _look(label)
        spread = 1.6 if look["marker"] in "PX*" else 1.0  # they have little area for their width
        axes.scatter(here[:, 0], here[:, 1], s=spread * size, **look, alpha=0.75, linewidths=0.3, edgecolors="white")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#d5d5d0")


def _legend_rows(classes: Classes | None) -> int:
    return 0 if classes is None else -(-len(classes.names) // _per_row(classes))


def _per_row(classes: Classes) -> int:
    """Names of a row: as many as have room beside each other."""
    longest = min(28, max(len(plain(name)) for name in classes.names))
    return min(len(classes.names), (2 * _SIDE + _MARGIN) // (34 + 9 * longest))


def shortened(text: str, most: int = 45) -> str:
    """The end of a name, which says most of a path."""
    return text if len(text) <= most else "..." + text[3 - most :]


def _legend(axes: Axes, classes: Classes, rows: int, width: int) -> None:
    """A mark and a name for each class; not matplotlib's own, which passes over names that begin with _."""
    axes.set(xlim=(0, width), ylim=(rows, 0))
    axes.axis("off")
    across = _per_row(classes)
    for label, name in enumerate(classes.names):
        row, column = divmod(label, across)
        left = _MARGIN + column * (2 * _SIDE + _MARGIN) // across
        axes.scatter([left + 6], [row + 0.5], s=60, **_look(label))
        text = plain(name)
        short = text if len(text) <= 28 else text[:25] + "..."
        axes.text(left + 18, row + 0.5, short, fontsize=11, color=_INK, va="center", parse_math=False)
