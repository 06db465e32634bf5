# SPDX-License-Identifier: Apache-2.0
"""How weights that depend on the size of the images are carried to another size.

A network trained at one size goes on at another in the same frame of coordinates: what stood for a place keeps standing
for the same share of the image (absolute embeddings), and what stood for an offset for the same share of the window
(relative ones), because windows follow the image, see `fastmim.backbones.blueprint`. Every map is linear, so that an
optimiser's moments can be carried with their weights.

What timm computes from the size and does not learn is taken as timm builds it anew. That keeps the frame for the rotary
embeddings of EVA-02 and DINOv3, XCiT's Fourier features and the position network of Swin V2, which count in shares of
the image or window. Other kinds count in tokens at every size, as convolutions do: rotary embeddings that have no
reference grid (``vit_*_rope_*``), the position networks of ``swinv2_cr_*`` and ``vit_relpos_*``, and Swin V2 networks
that were made with ``pretrained_window_sizes``.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fastmim.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Carry:
    """Brings tensors of a network's old shapes, weights or moments of them, to its new ones.

    Attributes:
        moves: for each parameter whose shape changes, by its name in ``named_parameters()``, how.
    """

    moves: Mapping[str, "Move | PairMove"]

    def __call__(self, name: str, value: Float[Tensor, "..."], *, positive: bool = False) -> Float[Tensor, "..."]:
        """``value``, of the shape that the parameter ``name`` had, at the shape that it has now; itself where equal.

        Args:
            name: of a parameter.
            value: on any device, in any precision.
            positive: use weights that are all positive (bilinear), so that what is not negative stays so: for Adam's
                second moments, whose root is taken. Bicubic ones would overshoot.
        """
        return self.moves[name](value, positive) if name in self.moves else value

    def under(self, prefix: str) -> "Carry":
        """The same for a module that holds the network under a name, such as ``"backbone."``."""
        return Carry({prefix + name: move for name, move in self.moves.items()})


@dataclass(frozen=True)
class Move:
    """The linear map of one parameter: one matrix, applied to the rows and to the columns of a grid of positions.

    Attributes:
        axes: of the tensor, along which positions lie.
        flat: whether one axis holds the whole square grid, row by row.
        front: entries of a flat axis before the grid that are no positions (class and register tokens).
        back: entries after it (BEiT's offsets to and from the class token).
        old: side of the grid as it was.
        new: side of the grid as it is.
        matrix: (old, new, positive) to the matrix of one axis.
    """

    axes: tuple[int, ...]
    flat: bool
    front: int
    back: int
    old: int
    new: int
    matrix: Callable[[int, int, bool], Float[Tensor, "new old"]]

    def __call__(self, value: Float[Tensor, "..."], positive: bool) -> Float[Tensor, "..."]:
        matrix = self.matrix(self.old, self.new, positive).to(value.device)
        exact = value.to(torch.promote_types(value.dtype, matrix.dtype))  # half precision would lose what it averages
        matrix = matrix.to(exact.dtype)
        if not self.flat:
            for axis in self.axes:
                exact = _along(matrix, exact, axis)
            return exact.to(value.dtype)
        (axis,) = self.axes
        front, grid, back = exact.split([self.front, self.old**2, self.back], dim=axis)
        grid = grid.unflatten(axis, (self.old, self.old))
        grid = _along(matrix, _along(matrix, grid, axis), axis + 1).flatten(axis, axis + 1)
        return torch.cat([front, grid, back], dim=axis).to(value.dtype)


@dataclass(frozen=True)
class PairMove:
    """The linear map of a bias for every pair of places, ``[heads, queries, keys]`` (CMT's).

    A value stands for two places of the image, that of a query and that of a key, each on a grid of its own. Both grids
    are interpolated as `places`. The matrix of queries and keys is no picture: next to the last place of a row of
    queries stands the first of the row below.

    Attributes:
        old: height and width of the queries' grid and of the keys' as they were.
        new: as they are.
    """

    old: tuple[int, int, int, int]
    new: tuple[int, int, int, int]

    @classmethod
    def between(cls, old: Shape, new: Shape) -> "PairMove | None":
        """From shape to shape, where all grids are square; None where they are not."""
        sides = [math.isqrt(count) for count in (*old[1:], *new[1:])]
        if len(old) != 3 or len(new) != 3 or [side**2 for side in sides] != [*old[1:], *new[1:]]:
            return None
        return cls((sides[0], sides[0], sides[1], sides[1]), (sides[2], sides[2], sides[3], sides[3]))

    def __call__(self, value: Float[Tensor, "heads q k"], positive: bool) -> Float[Tensor, "heads _q _k"]:
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        exact = exact.unflatten(2, self.old[2:]).unflatten(1, self.old[:2])
        for axis, (before, after) in enumerate(zip(self.old, self.new, strict=True), start=1):
            if before != after:
                exact = _along(places(before, after, positive).to(exact), exact, axis)
        return exact.flatten(3).flatten(1, 2).to(value.dtype)


def places(old: int, new: int, positive: bool) -> Float[Tensor, "new old"]:
    """Embeddings of the cells of an axis, at the centres of ``new`` cells over the same image.

    Cubic, and averaging when there become fewer (Pillow's kernel, as timm's own resampling); linear if ``positive``.
    """
    mode = "bilinear" if positive else "bicubic"
    rows = torch.eye(old)[None, None]  # one known cell is 1 in each
    return F.interpolate(rows, size=(old, new), mode=mode, antialias=True, align_corners=False)[0, 0].T


def offsets(old: int, new: int, positive: bool) -> Float[Tensor, "new old"]:
    """Values of the offsets -(w - 1) to w - 1 of a window of w tokens: the offset k is k / w of the window.

    Linear between the known offsets; the outermost stands for those beyond. ``old`` and ``new`` are 2 w - 1.
    """
    return _hats(old // 2 + 1, new // 2 + 1, torch.arange(old) - old // 2, torch.arange(new) - new // 2)


def distances(old: int, new: int, positive: bool) -> Float[Tensor, "new old"]:
    """As `offsets`, where only their lengths 0 to w - 1 are told apart; ``old`` and ``new`` are w."""
    return _hats(old, new, torch.arange(old), torch.arange(new))


class _Kind(NamedTuple):
    """What a parameter holds for each position of an axis, and whether an axis may hold a whole grid of them."""

    names: str
    matrix: Callable[[int, int, bool], Float[Tensor, "new old"]]
    flat: bool


_PAIRS = "pos_bias"  # CMT's
# The last parts of the names in timm. None of these kinds is told apart by shape alone.
_KINDS = (
    _Kind(r"pos_embed\d?|patch_pos", places, flat=True),  # ViT, BEiT, Hiera, SAM, VOLO, PiT, NesT, Visformer, TNT ...
    _Kind(r"relative_position_bias_table", offsets, flat=True),  # Swin, BEiT, GC ViT, MaxViT, CoAtNet ...
    _Kind(r"rel_pos_[hw]|height_rel|width_rel|pos_emb", offsets, flat=False),  # MViTv2, SAM, BoTNet, LambdaNet
    _Kind(r"attention_biases", distances, flat=True),  # LeViT, EfficientViT, EfficientFormerV2
)


def plan_carry(architecture: str, old: Mapping[str, Shape], new: Mapping[str, Shape], prefix: int) -> Carry:
    """How the parameters of a network are carried from shapes to shapes.

    Args:
        architecture: its name, for the message.
        old: the shapes of its parameters, by name.
        new: those at another size.
        prefix: its class and register tokens, which an absolute embedding may or may not hold.

    Raises:
        UserError: weights of another kind depend on the size.
    """
    moves = {name: _move(name, shape, new[name], prefix) for name, shape in old.items() if shape != new[name]}
    fixed = [name.removeprefix("model.") for name, move in moves.items() if move is None]
    if fixed:
        more = f" and {len(fixed) - 1} more" if len(fixed) > 1 else ""
        raise UserError(
            f"{architecture} trains at one size of images only: the shapes of its weights {fixed[0]}{more} depend on "
            "it; give a single resolution, or take a network that can grow, such as a ViT, Swin or ConvNeXt"
        )
    return Carry({name: move for name, move in moves.items() if move is not None})


def _move(name: str, old: Shape, new: Shape, prefix: int) -> Move | PairMove | None:
    """None where it is not known what the positions of the parameter mean."""
    last = name.rpartition(".")[2]
    if last == _PAIRS:
        return PairMove.between(old, new)
    kind = next((kind for kind in _KINDS if re.fullmatch(kind.names, last)), None)
    axes = tuple(axis for axis, (before, after) in enumerate(zip(old, new, strict=True)) if before != after)
    if kind is None:
        return None
    before, after = old[axes[0]], new[axes[0]]
    if len(axes) == 2 or not kind.flat:
        return Move(axes, False, 0, 0, before, after, kind.matrix)
    for front, back in ((0, 0), (prefix, 0) if kind.matrix is places else (0, 3)):
        grids = before - front - back, after - front - back
        side, wanted = (math.isqrt(max(count, 0)) for count in grids)
        if grids == (side**2, wanted**2):
            return Move(axes, True, front, back, side, wanted, kind.matrix)
    return None


def _along(matrix: Float[Tensor, "new old"], value: Float[Tensor, "..."], axis: int) -> Float[Tensor, "..."]:
    return torch.tensordot(matrix, value, dims=([1], [axis])).movedim(0, axis)


def _hats(
    old: int, new: int, known: Int64[Tensor, " known"], wanted: Int64[Tensor, " wanted"]
) -> Float[Tensor, "wanted known"]:
    """Linear interpolation as a matrix: a known offset's weight falls from 1 to 0 on the way to its neighbours."""
    at = (wanted * (old / new)).clamp(-(old - 1), old - 1)
    return (1 - (at[:, None] - known[None]).abs()).clamp(min=0)
