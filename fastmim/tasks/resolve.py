# SPDX-License-Identifier: Apache-2.0
"""Every choice that was left open, made from the network and the images; and what does not fit together, refused."""

import math
from typing import Any

from fastmim.backbones.adapter import Backbone, Stage
from fastmim.backbones.hiding import backbone_side
from fastmim.config import Config, MethodConfig
from fastmim.errors import UserError
from fastmim.mim.decoder import default_size

FINEST = 4  # px: the cells of the first of several scales (LocalMIM, Wang et al. 2023, section 3.2)


def resolve(config: Config, backbone: Backbone, images: int, world: int = 1) -> Config:
    """Every choice that was left open and can change the result, but the micro-batch, which takes a measurement.

    Raises:
        UserError: sizes that do not fit together; the nearest that do are named.
    """
    chosen = {"method": _method(config, backbone), "optim": _optim(config, images, world)}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in chosen.items()}
    )


def cells_of(config: Config, stages: tuple[Stage, ...]) -> list[int]:
    """The side of the target's cells in pixels, for each map that something is predicted from.

    Of several maps, the stride of each; where all have one stride, as in a plain network, 4 px and twice as many from
    one to the next (LocalMIM, Wang et al. 2023, section 3.2).
    """
    method = config.method
    if method.scales is None:
        assert method.cell is not None
        return [method.cell]
    strides = [stage.stride for stage in stages]
    return strides if len(set(strides)) > 1 else [FINEST * 2**place for place in range(len(strides))]


def _method(config: Config, backbone: Backbone) -> dict[str, Any]:
    """Block, cell and decoder that fit the crops and the network."""
    method, stage = config.method, backbone.stages[-1]
    sizes = [resolution for resolution, _ in config.data.course]
    for side in sizes:
        backbone_side(side, method.hide)
    block = _checked_block(method, stage, sizes)
    # Moved together, blocks become positions of their own again (`fastmim.backbones.compact`).
    finest = block if method.hide == "compact" else stage.stride
    stages = tuple(Stage(one.channels, min(one.stride, finest)) for one in backbone.stages)
    stride = stages[-1].stride
    cell = method.cell or (_hog_cell(block, stride) if method.target.startswith("hog") else min(stride, block))
    if method.scales is None and (block % cell or (cell % stride and stride % cell)):
        raise UserError(
            f"cells of {cell} px do not divide blocks of {block} px and fit the network's stride of {stride};"
            f" leave --cell out, or try {_hog_cell(block, stride)}"
        )
    if method.scales is not None:
        _check_scales(config, stages, block, sizes)
    _check_ratios(method, block, min(sizes))
    _check_decoder(method, block, max(one.stride for one in (stages if method.scales else stages[-1:])))
    dim, depth = default_size(stage.channels, hierarchical=stage.stride > 16)
    size = {
        "decoder_dim": method.decoder_dim or dim,
        "decoder_depth": method.decoder_depth or (1 if method.scales else depth),
    }
    return {"block": block, "cell": cell, **size}


def _checked_block(method: MethodConfig, stage: Stage, sizes: list[int]) -> int:
    common = math.gcd(*sizes)
    # Moved together, two blocks side by side make a position of the network.
    step = max(stage.stride // 2, 1) if method.hide == "compact" else stage.stride
    block = method.block or _block(sizes[0], common, step, stage.stride)
    for side in sizes:
        if side % block:
            raise UserError(f"resolution {side} is not a multiple of the block of {block} px; {_near(side, block)}")
        if method.masking == "grid" and side // block % 2:
            raise UserError(
                f"masking=grid takes blocks in cells of 2 x 2, but {side} px are {side // block} blocks of {block} px;"
                f" {_near(side, 2 * block)}"
            )
    return block


def _check_scales(config: Config, stages: tuple[Stage, ...], block: int, sizes: list[int]) -> None:
    for cell, stage in zip(cells_of(config, stages), stages, strict=True):
        fits = not (cell % block and block % cell) and not (cell % stage.stride and stage.stride % cell)
        if not fits or any(side % cell for side in sizes):
            raise UserError(
                f"scales: cells of {cell} px do not fit the stride of {stage.stride} px, blocks of {block} px and crops"
                f" of {', '.join(map(str, sizes))} px; choose fewer --scales, or multiples of {max(cell, block)} px"
            )


def _check_ratios(method: MethodConfig, block: int, side: int) -> None:
    blocks = (side // block) ** 2
    for name, ratio in (("mask_ratio", method.mask_ratio), ("predict_ratio", method.predict_ratio)):
        if ratio is not None and not 0 < round(ratio * blocks) < blocks:
            raise UserError(
                f"{name} {ratio} is {round(ratio * blocks)} of {blocks} blocks; a smaller --block or another ratio"
                " is needed"
            )


def _check_decoder(method: MethodConfig, block: int, stride: int) -> None:
    if method.decoder == "linear" and method.hide in ("drop", "compact"):
        raise UserError(
            f"the linear decoder sees nothing of blocks that hide={method.hide} leaves out;"
            " use decoder=transformer, or hide=tokens"
        )
    if method.decoder == "cross" and block % stride:
        raise UserError(
            f"the cross decoder picks whole positions of {stride} px, but a block has {block} px; use a --block that is"
            f" a multiple of {stride}, or decoder=transformer"
        )
    if method.decoder != "linear" and method.decoder_dim is not None and method.decoder_dim % 32:
        raise UserError(f"decoder_dim {method.decoder_dim} is not a multiple of 32; {_near(method.decoder_dim, 32)}")


def _optim(config: Config, images: int, world: int) -> dict[str, Any]:
    """Global batch and learning rate."""
    optim = config.optim
    batch = optim.global_batch or _power_of_two(images / 32) // world * world
    if batch % world:
        raise UserError(f"global_batch {batch} is not a multiple of the {world} processes; {_near(batch, world)}")
    if optim.micro_batch is not None and batch % (optim.micro_batch * world):
        raise UserError(f"global_batch {batch} is not a multiple of {world} x micro_batch {optim.micro_batch}")
    lr = optim.lr or (optim.lr_per_256 * batch / 256 if optim.lr_per_256 else 2.4e-3 * math.sqrt(batch / 4096))
    return {"global_batch": batch, "lr": lr, "lr_per_256": None}


def _block(resolution: int, common: int, step: int, stride: int) -> int:
    """An eighth of the first crop, as the paper's 16 px at 128, but a multiple of ``step`` that divides all crops."""
    most = max(step, resolution // 8)
    fits = (block for block in range(step, most + 1, step) if block % stride == 0 or stride % block == 0)
    return max((block for block in fits if common % block == 0), default=step)


def _hog_cell(block: int, stride: int) -> int:
    """The paper's 8 px, or the largest below that fits block and stride (7 for patches of 14 px)."""
    return max(c for c in range(1, 9) if block % c == 0 and (stride % c == 0 or c % stride == 0))


def _power_of_two(value: float) -> int:
    return min(4096, max(64, 2 ** round(math.log2(max(value, 1)))))


def _near(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"nearest that work: {', '.join(str(size) for size in (below, above) if size > 0)}"
