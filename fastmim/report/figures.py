# SPDX-License-Identifier: Apache-2.0
"""Pictures for the report: what was hidden, what was predicted, and HOG drawn as oriented strokes."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from fastmim.report.folder import Neighbours, Reconstruction

Picture = UInt8[np.ndarray, "H W 3"]

BINS = 9
MOST_SAMPLES = 8
MOST_QUERIES = 8
MOST_NEIGHBOURS = 8
LARGEST_SIDE = 320

# Tiles are dark in both colour schemes, as photographs are the same in both.
_GROUND = np.array([20, 22, 27], dtype=np.float32)
_LINE = np.array([226, 230, 238], dtype=np.float32)
_HIDDEN_LINE = np.array([255, 184, 77], dtype=np.float32)
_COVER = np.array([122, 124, 130], dtype=np.uint8)
_SEEN_GROUND = np.array([46, 50, 58], dtype=np.float32)
_DIM = 0.4


@dataclass(frozen=True)
class Tile:
    """A picture as a data: URI with its alternative text."""

    caption: str
    alt: str
    uri: str


def data_uri(picture: Picture) -> str:
    """The picture as WebP inside a URI; encoded from pixels alone, so that no metadata of a photo can travel along."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE * 2, LARGEST_SIDE * 2))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def glyphs(hog: Float[np.ndarray, "C h w"], full: float, line: Float[np.ndarray, "3"] = _LINE) -> Picture:
    """HOG as a star of strokes per cell: along the edge, longer and brighter where the histogram is larger.

    Bin k counts gradients with atan2(gx, gy) in [k, k + 1) * pi / 9, so at its middle phi the gradient points along
    (sin phi, cos phi) with x to the right and y down (both differences are "first minus second", which turns the
    vector round and leaves its axis). The edge is perpendicular: (cos phi, -sin phi), which on a screen is phi
    counter-clockwise from the horizontal.

    Args:
        hog: channel = colour * 9 + bin; averaged over the colours.
        full: the value drawn as a stroke across the whole cell.
        line: colour of the strokes, 0 to 255.
    """
    _, height, width = hog.shape
    strength = np.clip(hog.reshape(-1, BINS, height, width).mean(axis=0) / full, 0, 1)[..., None, None]
    side = max(8, 448 // max(height, width))
    place = np.arange(side, dtype=np.float32) + 0.5 - side / 2
    phi = ((np.arange(BINS, dtype=np.float32) + 0.5) * np.pi / BINS)[:, None, None, None, None]
    along = place[None, :] * np.cos(phi) - place[:, None] * np.sin(phi)
    across = place[None, :] * np.sin(phi) + place[:, None] * np.cos(phi)
    # Clipping a distance to 0..1 pixel is what smooths the strokes' borders.
    stroke = np.clip(strength * side * 0.48 - np.abs(along) + 0.5, 0, 1)
    stroke *= np.clip(side / 24 + 0.5 - np.abs(across), 0, 1)
    ink = (stroke * np.sqrt(strength)).max(axis=0)
    ink = ink.transpose(0, 2, 1, 3).reshape(height * side, width * side, 1)
    return (_GROUND + ink * (line - _GROUND)).round().astype(np.uint8)


def cells_to_picture(values: Float[np.ndarray, "C h w"]) -> Float[np.ndarray, "H W 3"]:
    """Pixel targets as a picture; channel = colour * cell * cell + row * cell + column."""
    channels, height, width = values.shape
    cell = round((channels / 3) ** 0.5)
    picture = values.reshape(3, cell, cell, height, width).transpose(3, 1, 4, 2, 0)
    return picture.reshape(height * cell, width * cell, 3)


def reconstruction_rows(
    shown: Reconstruction, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[tuple[Tile, Tile, Tile, Tile]]:
    """For each sample: the image, what the network saw, the target, the prediction (hidden part bright, rest dimmed).

    Args:
        shown: at most the first ``MOST_SAMPLES`` are drawn.
        mean: what was subtracted from each colour (0 to 1) before a "pixels" target.
        std: what each colour was divided by.
    """
    rows = []
    for index in range(min(len(shown.images), MOST_SAMPLES)):
        image, mask = shown.images[index].transpose(1, 2, 0), shown.mask[index]
        if shown.kind == "hog":
            target, prediction = _draw_hog(shown.target[index], shown.prediction[index], mask)
        else:
            target, prediction = _draw_pixels(shown, index, np.array(mean), np.array(std))
        hidden = np.where(_scaled(mask, image), _COVER, image)
        name = f"sample {index + 1}"
        rows.append(
            (
                Tile("Image", f"{name}: the image", data_uri(image)),
                Tile("What the network saw", f"{name}: the image with the hidden blocks in grey", data_uri(hidden)),
                Tile("Target", f"{name}: the target of every cell", data_uri(target)),
                Tile("Prediction", f"{name}: the prediction, hidden cells bright, others dimmed", data_uri(prediction)),
            )
        )
    return rows


def neighbour_rows(found: Neighbours) -> list[list[Tile]]:
    """For each query: its tile, then its nearest images with their cosine similarity."""
    rows = []
    for query in range(min(len(found.thumbs), MOST_QUERIES)):
        thumbs = found.thumbs[query, : 1 + MOST_NEIGHBOURS].transpose(0, 2, 3, 1)
        row = [Tile("query", f"query {query + 1}", data_uri(thumbs[0]))]
        for rank, thumb in enumerate(thumbs[1:]):
            similarity = f"{found.similarity[query, rank]:.2f}"
            alt = f"query {query + 1}, neighbour {rank + 1}, cosine similarity {similarity}"
            row.append(Tile(similarity, alt, data_uri(thumb)))
        rows.append(row)
    return rows


def _draw_hog(
    target: Float[np.ndarray, "C h w"], prediction: Float[np.ndarray, "C h w"], mask: Bool[np.ndarray, "g g"]
) -> tuple[Picture, Picture]:
    # One scale for both, or a timid prediction would look as sure as the target.
    full = max(float(target.reshape(-1, BINS, *target.shape[1:]).mean(axis=0).max()), 1e-6)
    hidden, seen = glyphs(prediction, full, _HIDDEN_LINE), _dimmed(glyphs(prediction, full))
    return glyphs(target, full), np.where(_scaled(mask, hidden), hidden, seen)


def _draw_pixels(
    shown: Reconstruction, index: int, mean: Float[np.ndarray, "3"], std: Float[np.ndarray, "3"]
) -> tuple[Picture, Picture]:
    # A cell of normalised pixels has mean 0 and deviation 1 whatever its colour was: three deviations fill the range.
    spread, centre = (std, mean) if shown.kind == "pixels" else (np.full(3, 1 / 6), np.full(3, 0.5))

    def picture(values: Float[np.ndarray, "C h w"]) -> Picture:
        levels = cells_to_picture(values) * spread + centre
        return (np.clip(np.nan_to_num(levels), 0, 1) * 255).round().astype(np.uint8)

    target, predicted = picture(shown.target[index]), picture(shown.prediction[index])
    return target, np.where(_scaled(shown.mask[index], predicted), predicted, _dimmed(target))


def _dimmed(picture: Picture) -> Picture:
    return (_SEEN_GROUND + (picture - _GROUND) * _DIM).round().astype(np.uint8)


def _scaled(mask: Bool[np.ndarray, "g g"], picture: Picture) -> Bool[np.ndarray, "H W 1"]:
    """The mask at the size of a picture."""
    height, width, _ = picture.shape
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))[..., None]
