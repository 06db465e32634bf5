# SPDX-License-Identifier: Apache-2.0
"""Decoders against plain loops, and what each promises: what it reads, where it predicts, that all of it learns."""

from typing import Any

import pytest
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmim.errors import UserError
from fastmim.mim.decoder import DECODERS, CrossDecoder, TransformerDecoder, sincos_positions
from fastmim.mim.masking import Masks, RandomBlocks

ATTENTIVE = [name for name in DECODERS if name != "linear"]
# stride and cell: the map finer than the target, as fine, coarser; cells of odd sizes; blocks are 16 px, or 14 or 32.
SIZES = [(4, 8, 16), (8, 8, 16), (16, 8, 16), (16, 16, 16), (32, 8, 32), (14, 7, 14), (2, 8, 16)]


def build(name: str, stride: int = 8, cell: int = 8, **options: Any) -> nn.Module:
    """A small decoder with a fixed seed: 48 channels to 27."""
    torch.manual_seed(0)
    size = {"fill": True, "dim": 64, "depth": 2, "grid": 64 // stride} if name != "linear" else {}
    return DECODERS[name](48, stride, cell, 27, **(size | options))


def masks_of(count: int, side: int, ratio: float = 0.5, predict: float | None = None) -> Masks:
    return RandomBlocks(ratio, predict=predict)(torch.arange(count), side)


def features(count: int, side: int) -> Tensor:
    return torch.randn(count, 48, side, side, generator=torch.Generator().manual_seed(1))


# What all keep.


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("stride", "cell", "block"), SIZES)
def test_every_decoder_predicts_on_the_targets_grid(name: str, stride: int, cell: int, block: int) -> None:
    side = 4 * block
    out = build(name, stride, cell)([features(2, side // stride)], masks_of(2, 4, predict=0.25))
    assert out.shape == (2, 27, side // cell, side // cell) and out.dtype == torch.float32


@pytest.mark.parametrize("name", DECODERS)
def test_every_weight_is_given_its_first_value(name: str) -> None:
    """Memory that nothing was written to is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        decoder = build(name)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in decoder.state_dict().items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize("name", DECODERS)
def test_all_parameters_learn(name: str) -> None:
    decoder = build(name)
    decoder([features(2, 8)], masks_of(2, 4, predict=0.25)).square().sum().backward()
    assert [key for key, each in decoder.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_know_their_counts_without_asking_the_device(name: str) -> None:
    with FakeTensorMode():  # fake tensors have no values
        decoder = build(name)
        mask = torch.empty(2, 4, 4, dtype=torch.bool)
        assert decoder([torch.empty(2, 48, 8, 8)], Masks(mask, mask, 12, 12)).shape == (2, 27, 8, 8)


@pytest.mark.parametrize("name", DECODERS)
def test_several_masks_of_an_image_are_rows_like_others(name: str) -> None:
    masks, maps = RandomBlocks(0.75, masks=4)(torch.arange(2), 4), features(8, 8)
    decoder = build(name)
    together = decoder([maps], masks)
    for row in range(8):
        alone = Masks(masks.hidden[row : row + 1], masks.predicted[row : row + 1], *masks[2:])
        torch.testing.assert_close(decoder([maps[row : row + 1]], alone), together[row : row + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIVE)
def test_hidden_places_are_not_read(name: str) -> None:
    decoder, masks, maps = build(name), masks_of(2, 4), features(2, 8)
    hidden = masks.hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    noisy = torch.where(hidden, torch.full_like(maps, torch.nan), maps)
    torch.testing.assert_close(decoder([noisy], masks), decoder([maps], masks), rtol=0, atol=0)
    other = decoder([torch.where(hidden, maps, maps + 1)], masks)
    assert (other - decoder([maps], masks)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ATTENTIVE)
def test_mask_tokens_know_their_place(name: str) -> None:
    out = build(name)([torch.zeros(1, 48, 8, 8)], masks_of(1, 8))
    hidden = masks_of(1, 8).hidden[0]
    assert (out[0][:, hidden].std(dim=1) > 1e-3).any()


@pytest.mark.parametrize("name", ATTENTIVE)
def test_heads_may_be_chosen(name: str) -> None:
    maps, masks = features(1, 8), masks_of(1, 4)
    by_default = build(name)([maps], masks)
    assert torch.equal(build(name, heads=2)([maps], masks), by_default)
    assert not torch.allclose(build(name, heads=4)([maps], masks), by_default)


@pytest.mark.parametrize("name", ATTENTIVE)
def test_decoders_work_in_half_precision(name: str) -> None:
    decoder, maps, masks = build(name), features(2, 8), masks_of(2, 4, predict=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decoder([maps.bfloat16()], masks)
    torch.testing.assert_close(out.float(), decoder([maps], masks), rtol=0, atol=0.05)


# Positions.


@pytest.mark.parametrize("side", [4, 7, 14, 28])
@pytest.mark.parametrize("dim", [64, 96, 512])
def test_positions_equal_those_of_timm_at_the_first_size(side: int, dim: int) -> None:
    expected = build_sincos2d_pos_embed([side, side], dim, interleave_sin_cos=True)
    torch.testing.assert_close(sincos_positions(side, side, dim), expected, rtol=0, atol=1e-6)


def test_a_map_of_another_size_keeps_the_coordinates_of_the_image() -> None:
    """A map three times as fine has a position in the middle of each position of the coarse one."""
    coarse = sincos_positions(4, 4, 64).unflatten(0, (4, 4))
    fine = sincos_positions(12, 4, 64).unflatten(0, (12, 12))
    torch.testing.assert_close(fine[1::3, 1::3], coarse, rtol=0, atol=1e-6)
    # Twice as fine: two positions lie a quarter beside the middle of the coarse one; the first sine is of the row.
    rows = sincos_positions(8, 4, 64).unflatten(0, (8, 8))[:, 0, 0]
    torch.testing.assert_close(rows, (torch.arange(8) / 2 - 0.25).sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_decoder_takes_maps_of_several_sizes_in_a_run(name: str) -> None:
    decoder = build(name, grid=8)
    for side in (8, 12, 8, 16):
        out = decoder([features(1, side)], masks_of(1, side // 2))
        again = build(name, grid=8)([features(1, side)], masks_of(1, side // 2))
        assert out.shape == (1, 27, side, side) and torch.equal(out, again)
        if side != 8:
            assert not torch.allclose(out, build(name, grid=side)([features(1, side)], masks_of(1, side // 2)))


# Cross-attention.


def slow_attention(block: nn.Module, queries: Tensor, memory: Tensor) -> Tensor:
    """One image, one head and one query at a time."""
    heads: int = block.heads  # type: ignore[assignment]
    query = block.query(block.norm_attention(queries))  # type: ignore[operator]
    key, value = block.key_value(memory).chunk(2, dim=1)  # type: ignore[operator]
    size = query.shape[1] // heads
    out = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for place in range(len(query)):
            weight = (key[:, part] @ query[place, part] / size**0.5).exp()
            out[place, part] = (weight / weight.sum()) @ value[:, part]
    return out


def slow_cross(decoder: CrossDecoder, features: Tensor, hidden: Tensor, predicted: Tensor, ratio: float) -> Tensor:
    """One image; ``ratio`` = stride / cell."""
    side, block = features.shape[-1], features.shape[-1] // hidden.shape[-1]
    places = [(y, x) for y in range(side) for x in range(side)]
    positions = sincos_positions(side, decoder.positions.grid, 64).unflatten(0, (side, side))
    seen = [(y, x) for y, x in places if not hidden[y // block, x // block]]
    asked = [(y, x) for y, x in places if predicted[y // block, x // block]]
    memory = torch.stack([decoder.embed(features[:, y, x]) + positions[y, x] for y, x in seen])
    memory = decoder.embed_norm(memory)
    queries = torch.stack([decoder.mask_token + positions[y, x] for y, x in asked])
    for each in decoder.blocks:
        queries = queries + each.out(slow_attention(each, queries, memory))  # type: ignore[operator]
        queries = queries + each.mlp(each.norm_mlp(queries))  # type: ignore[operator]
    answers = decoder.norm(queries) @ decoder.head.linear.weight[..., 0, 0].T + decoder.head.linear.bias
    cells = round(side * ratio)
    out = torch.zeros(27, cells, cells)
    for (y, x), answer in zip(asked, answers, strict=True):
        if ratio >= 1:  # a position predicts several cells
            finer = round(ratio)
            for channel in range(27):
                for i in range(finer):
                    for j in range(finer):
                        out[channel, y * finer + i, x * finer + j] = answer[channel * finer**2 + i * finer + j]
        else:  # several positions predict a cell together
            coarser = round(1 / ratio)
            out[:, y // coarser, x // coarser] += answer / coarser**2
    return out


@pytest.mark.parametrize(("stride", "cell", "block"), [(8, 8, 16), (16, 8, 16), (4, 8, 16), (16, 8, 32)])
@pytest.mark.parametrize("predict", [None, 0.25])
@torch.no_grad()
def test_the_cross_decoder_equals_the_plain_loop(stride: int, cell: int, block: int, predict: float | None) -> None:
    decoder, masks, maps = build("cross", stride, cell), masks_of(2, 4, 0.75, predict), features(2, 4 * block // stride)
    assert isinstance(decoder, CrossDecoder)
    out = decoder([maps], masks)
    for row in range(2):
        expected = slow_cross(decoder, maps[row], masks.hidden[row], masks.predicted[row], stride / cell)
        torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-5)


def test_the_cross_decoder_predicts_nothing_elsewhere() -> None:
    masks = masks_of(3, 4, 0.75, predict=0.25)
    out = build("cross", 8, 4)([features(3, 8)], masks)
    predicted = masks.predicted.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (out.abs().sum(dim=1) > 0).eq(predicted).all()


def test_the_cross_decoder_refuses_maps_that_are_coarser_than_the_blocks() -> None:
    with pytest.raises(UserError, match="multiple of the stride"):
        build("cross")([features(1, 4)], masks_of(1, 8))


# Transformer.


def test_without_a_token_to_fill_in_the_backbones_own_is_read() -> None:
    decoder, masks, maps = build("transformer", fill=False), masks_of(2, 8), features(2, 8)
    assert isinstance(decoder, TransformerDecoder) and decoder.mask_token is None
    other = torch.where(masks.hidden[:, None], maps + 1, maps)
    assert not torch.allclose(decoder([other], masks), decoder([maps], masks))
