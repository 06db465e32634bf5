# SPDX-License-Identifier: Apache-2.0
"""Small pictures of images side by side, for people to look at."""

import io
import math
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmim.config import Config
from fastmim.data.loader import EvalLoader
from fastmim.data.table import ImageTable
from fastmim.run_images import plain_pictures
from fastmim.tasks.pretrain import viewable

_GAP, _TITLE, _LINE, _FRAME = 4, 28, 16, 3
_GROUND = 224  # where an image cannot be read


def thumbnails(config: Config, table: ImageTable, side: int) -> UInt8[Tensor, "n 3 s s"]:
    """The largest centred square of every image, as people can look at it; grey where it cannot be read.

    Args:
        config: whose channels, values, mean and std say what the images are.
        table: which images.
        side: of a thumbnail in pixels.
    """
    found = torch.full((len(table), 3, side, side), _GROUND, dtype=torch.uint8)
    for batch in EvalLoader(plain_pictures(config, table), resolution=side, batch_size=64):
        found[batch["indices"]] = viewable(batch["images"], config)
    return found


def tiled(
    tiles: UInt8[Tensor, "n 3 s s"],
    title: str,
    across: int = 8,
    *,
    captions: Sequence[str] = (),
    frames: Sequence[str | None] = (),
) -> Image.Image:
    """Tiles row by row below a title.

    Args:
        tiles: square pictures.
        title: one line.
        across: tiles of a row.
        captions: a short text below each tile, cut where it would not fit.
        frames: a colour around each tile, or None.
    """
    side = tiles.shape[-1]
    line = _LINE if captions else 0
    right, down = side + _GAP, side + _GAP + line
    height = _TITLE + math.ceil(len(tiles) / across) * down + _GAP
    sheet = Image.new("RGB", (across * right + _GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, "black", ImageFont.load_default(16))
    font = ImageFont.load_default(12)
    for number, tile in enumerate(tiles):
        left, top = _GAP + number % across * right, _TITLE + number // across * down
        sheet.paste(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()), (left, top))
        if frames and frames[number]:
            pen.rectangle((left, top, left + side - 1, top + side - 1), outline=frames[number], width=_FRAME)
        if captions:
            pen.text((left + 1, top + side + 1), _fitting(captions[number], side, font), "black", font)
    return sheet


def stacked(parts: Sequence[Image.Image]) -> bytes:
    """Pictures one below the other, as PNG."""
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as has room."""
    if font.getlength(text) <= width:
        return text
    return next(
        cut for end in range(len(text), -1, -1) if font.getlength(cut := text[:end] + "...") <= width or not end
    )
