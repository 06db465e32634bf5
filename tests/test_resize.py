# SPDX-License-Identifier: Apache-2.0
"""A network goes on at another size of images as the same network."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fastmim.backbones.adapter import TimmBackbone, build
from fastmim.backbones.hiding import HidingBackbone
from fastmim.backbones.resizing import PairMove, distances, offsets, places, plan_carry
from fastmim.errors import UserError

VIT, SWIN, EVA, CMT = "test_vit", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "cmt_small"
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
SMALL_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_EVA = {**SMALL_VIT, "patch_size": 16}
SMALL_CMT = {"stem_dim": 8, "embed_dims": (16, 32, 64, 128), "depths": (1, 2, 1, 1)}


# The maps, against loops


def cubic(distance: float) -> float:
    """Keys' kernel with a = -1/2, as Pillow uses it."""
    x = abs(distance)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def hat(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


@pytest.mark.parametrize(("old", "new"), [(8, 10), (8, 12), (12, 8), (10, 3), (2, 5)])
@pytest.mark.parametrize(("positive", "kernel"), [(False, cubic), (True, hat)])
def test_places_equal_a_loop(old: int, new: int, positive: bool, kernel: Callable[[float], float]) -> None:
    matrix, width = places(old, new, positive), max(1.0, old / new)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        weights = [kernel((j - centre) / width) for j in range(old)]
        expected = torch.tensor([weight / sum(weights) for weight in weights])
        torch.testing.assert_close(matrix[i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 5), (4, 6), (6, 4), (7, 2), (1, 3), (3, 1)])
def test_offsets_equal_a_loop(old: int, new: int) -> None:
    known = torch.randn(2 * old - 1).tolist()
    found = offsets(2 * old - 1, 2 * new - 1, False) @ torch.tensor(known)
    short = distances(old, new, False) @ torch.tensor(known[old - 1 :])
    for k in range(-new + 1, new):
        at = min(max(k * old / new, -old + 1), old - 1)
        low = min(math.floor(at), old - 2) if old > 1 else 0
        high = min(low + 1, old - 1)
        expected = known[low + old - 1] + (at - low) * (known[high + old - 1] - known[low + old - 1])
        assert found[k + new - 1].item() == pytest.approx(expected, abs=1e-5)
        if k >= 0:
            assert short[k].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 2), (6, 3)), ((6, 3), (4, 2)), ((4, 4), (2, 2)), ((3, 1), (5, 1))])
@pytest.mark.parametrize("positive", [False, True])
def test_a_bias_of_pairs_equals_a_loop(old: tuple[int, int], new: tuple[int, int], positive: bool) -> None:
    """Each new pair of places gets the mean of the old pairs, weighted by where its query and its key lie."""
    kernel = hat if positive else cubic

    def weights(old: int, new: int, place: int) -> list[float]:
        """Of each old cell of a row by row grid, for one new cell."""
        row, column = ([], [])
        for line, at in ((row, place // new), (column, place % new)):
            centre, width = (at + 0.5) * old / new - 0.5, max(1.0, old / new)
            line += [kernel((j - centre) / width) for j in range(old)]
        total = sum(row) * sum(column)
        return [one * other / total for one in row for other in column]

    table = torch.randn(2, old[0] ** 2, old[1] ** 2)
    shape = (2, new[0] ** 2, new[1] ** 2)
    carry = plan_carry("x", {"stages.1.pos_bias": tuple(table.shape)}, {"stages.1.pos_bias": shape}, 0)
    found = carry("stages.1.pos_bias", table, positive=positive)
    assert found.shape == shape
    for q in range(shape[1]):
        for k in range(shape[2]):
            of_q, of_k = torch.tensor(weights(old[0], new[0], q)), torch.tensor(weights(old[1], new[1], k))
            torch.testing.assert_close(found[:, q, k], of_q @ table @ of_k, rtol=0, atol=1e-5)
    if positive:
        assert carry("stages.1.pos_bias", table.square(), positive=True).min() >= 0


def test_a_bias_of_pairs_may_be_of_any_rectangle() -> None:
    """Rows and columns each go their own way, and the flattened matrix is no picture."""
    table = torch.randn(3, 2 * 4, 1 * 2)
    moved = PairMove((2, 4, 1, 2), (4, 6, 2, 3))(table, False)
    wide = table.view(3, 2, 4, 1, 2)
    for axis, (before, after) in enumerate(((2, 4), (4, 6), (1, 2), (2, 3)), start=1):
        wide = (places(before, after, False) @ wide.movedim(axis, -2)).movedim(-2, axis)
    torch.testing.assert_close(moved, wide.reshape(3, 24, 6), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"trains at one size.*pos_bias"):
        plan_carry("x", {"pos_bias": (3, 8, 2)}, {"pos_bias": (3, 24, 6)}, 0)


@pytest.mark.parametrize(("old", "new"), [(8, 10), (12, 8)])
def test_an_absolute_embedding_is_carried_as_timm_does(old: int, new: int) -> None:
    table = torch.randn(1, 5 + old**2, 6)
    carry = plan_carry("x", {"pos_embed": (1, 5 + old**2, 6)}, {"pos_embed": (1, 5 + new**2, 6)}, 5)
    expected = resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=5)
    torch.testing.assert_close(carry("pos_embed", table), expected, rtol=0, atol=1e-5)


# name, prefix tokens, the shapes at a grid or window of n, and the value of a smooth function there
def flat(grid: Tensor) -> Tensor:
    return grid.flatten(0, 1)


def waves(n: int) -> Tensor:
    """[n, n, 2]: a function of the place in the image, at the centres of n x n cells."""
    share = (torch.arange(n) + 0.5) / n
    return torch.stack([torch.cos(2 * share)[:, None] * share, torch.sin(share)[:, None] + share], dim=2)


def slopes(n: int, signed: bool = True) -> Tensor:
    """[2n - 1, 2n - 1, 2] (or [n, n, 2]): a function of the offset as a share of a window of n tokens."""
    share = torch.arange(-n + 1 if signed else 0, n) / n
    return torch.stack([share[:, None] + 2 * share, share.abs()[:, None] * share], dim=2)


def pairs(n: int) -> Tensor:
    """[2, (n n), (n/2 n/2)]: a function of the places of a query and of a key, whose grid is coarser."""
    return torch.einsum("qh,kh->hqk", flat(waves(n)), flat(waves(n // 2)) - 0.5)


SMOOTH: dict[str, tuple[str, int, Callable[[int], Tensor]]] = {
    "vit": ("pos_embed", 1, lambda n: torch.cat([torch.ones(1, 2), flat(waves(n))])[None]),
    "vit without class token in it": ("pos_embed", 1, lambda n: flat(waves(n))[None]),
    "nest": ("levels.0.pos_embed", 0, lambda n: flat(waves(n)).expand(1, 4, -1, -1)),
    "sam": ("pos_embed", 0, lambda n: waves(n)[None]),
    "pit": ("pos_embed", 1, lambda n: waves(n).permute(2, 0, 1)[None]),
    "swin": ("attn.relative_position_bias_table", 0, lambda n: flat(slopes(n))),
    "beit": ("attn.relative_position_bias_table", 1, lambda n: torch.cat([flat(slopes(n)), torch.ones(3, 2)])),
    "maxvit": ("rel_pos.relative_position_bias_table", 0, lambda n: slopes(n).permute(2, 0, 1)),
    "lambda": ("self_attn.pos_emb", 0, slopes),
    "mvit": ("attn.rel_pos_h", 1, lambda n: slopes(n)[:, n - 1]),
    "cmt": ("stages.0.pos_bias", 0, pairs),
    "levit": ("attn.attention_biases", 0, lambda n: flat(slopes(n, signed=False)).T),
}


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize(("old", "new"), [(8, 10), (8, 12), (12, 8)])
def test_the_frame_of_coordinates_stays(kind: str, old: int, new: int) -> None:
    name, prefix, function = SMOOTH[kind]
    before, after = function(old), function(new)
    carry = plan_carry("x", {name: tuple(before.shape)}, {name: tuple(after.shape)}, prefix)
    back = plan_carry("x", {name: tuple(after.shape)}, {name: tuple(before.shape)}, prefix)
    # Only beyond the outermost known place or offset is there something to guess.
    assert (carry(name, before) - after).abs().mean() < 0.02
    assert (carry(name, before) - after).abs().max() < 0.3
    assert (back(name, carry(name, before)) - before).abs().mean() < 0.02


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("positive", [False, True])
def test_carrying_is_linear_and_keeps_sums_of_weights(kind: str, positive: bool) -> None:
    name, prefix, function = SMOOTH[kind]
    shape = tuple(function(8).shape)
    carry = plan_carry("x", {name: shape}, {name: tuple(function(10).shape)}, prefix)
    first, second = torch.randn(shape), torch.randn(shape)

    def move(value: Tensor) -> Tensor:
        return carry(name, value, positive=positive)

    torch.testing.assert_close(move(first + 3 * second), move(first) + 3 * move(second), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(move(torch.ones(shape)), torch.ones(function(10).shape), rtol=0, atol=1e-5)
    assert carry("another", first) is first
    assert move(first.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(move(first.double()), move(first).double(), rtol=1e-4, atol=1e-5)
    if positive:
        assert move(torch.rand(shape) ** 9).min() >= 0


# Whole networks: model, arguments, sizes. One of each kind of positions; the others hold none.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    VIT: ({}, (128, 160, 192, 64)),
    "vit_small_patch16_dinov3": (SMALL_VIT, (128, 160)),
    "vit_tiny_patch16_224": ({**SMALL_VIT, "class_token": False, "global_pool": "avg"}, (128, 160)),
    "test_vit2": ({}, (128, 192)),
    EVA: (SMALL_EVA, (128, 160)),
    "beit_base_patch16_224": (SMALL_VIT, (128, 160)),
    SWIN: (SMALL_SWIN, (128, 160, 192, 96)),
    "swinv2_tiny_window8_256": (SMALL_SWIN, (128, 160)),
    "hiera_tiny_224": ({"embed_dim": 24, "stages": (1, 1, 1, 1)}, (128, 160)),
    "pvt_v2_b0": ({}, (128, 160)),
    CMT: (SMALL_CMT, (128, 160, 224, 96)),
    "test_convnext": ({}, (128, 160)),
    "test_resnet": ({}, (128, 160)),
    "test_coatnet": ({}, (128, 160)),
    "levit_128s": ({}, (128, 192)),
    "mvitv2_tiny": ({}, (128, 160)),
    "samvit_base_patch16": ({**SMALL_VIT, "global_attn_indexes": (1,)}, (128, 160)),
    "lambda_resnet26rpt_256": ({}, (128, 160)),
}


def moved(model: str, resolution: int, **options: Any) -> TimmBackbone:
    """A network unlike any fresh one: every number of its state is moved."""
    backbone = build(model, resolution, **options)
    with torch.no_grad():
        weights = dict(backbone.named_parameters())
        for name, value in backbone.state_dict().items():
            if name in weights:
                value += 0.02 * torch.randn_like(value)
            elif value.is_floating_point():
                value += 0.1 * torch.rand_like(value)  # variances stay positive
    return backbone


@pytest.mark.parametrize("model", NETWORKS)
def test_a_network_goes_on_at_other_sizes(model: str) -> None:
    args, (first, *sizes) = NETWORKS[model]
    backbone = moved(model, first, model_args=args)
    for size in sizes:
        before = {name: weight.detach().clone() for name, weight in backbone.named_parameters()}
        buffers = {name: value.clone() for name, value in backbone.named_buffers()}
        random = torch.get_rng_state()
        backbone.check_resize(size)
        carry = backbone.resize(size)
        assert torch.equal(random, torch.get_rng_state())

        after = dict(backbone.named_parameters())
        assert after.keys() == before.keys()
        for name, weight in after.items():
            assert torch.equal(weight, carry(name, before[name])), name
            assert weight.requires_grad
        state = backbone.state_dict()
        for name in buffers.keys() & state.keys():
            assert torch.equal(state[name], buffers[name]), name

        (one,) = backbone(torch.randn(2, 3, size, size))
        stage = backbone.stages[0]
        assert one.shape == (2, stage.channels, size // stage.stride, size // stage.stride)
        # Exactly the network that timm would build, and load, at this size.
        stock = timm.create_model(backbone.architecture, num_classes=0, **backbone.create_args)
        assert stock.load_state_dict(backbone.weights(), strict=False).unexpected_keys == []
        assert backbone.resolution == size


@pytest.mark.parametrize("model", NETWORKS)
def test_the_same_size_is_the_same_network(model: str) -> None:
    args, (first, *_) = NETWORKS[model]
    backbone = moved(model, first, model_args=args).eval()
    images = torch.randn(1, 3, first, first)
    expected, net = backbone(images), backbone.model
    carry = backbone.resize(first)
    assert backbone.model is net
    assert all(carry(name, weight) is weight for name, weight in backbone.named_parameters())
    backbone.resolution = 0  # as if it came from elsewhere, so that it is built anew
    backbone.resize(first)
    assert backbone.model is not net
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0)


def smooth_images(size: int) -> Tensor:
    share = (torch.arange(size) + 0.5) / size
    row, column = share[:, None], share[None]
    return torch.stack([torch.sin(3 * row + 2 * column), torch.cos(5 * column) + 0 * row, row * column])[None]


def with_smooth_positions(model: str, args: dict[str, Any]) -> TimmBackbone:
    """A network whose positions say much, and smoothly, as after training."""
    torch.manual_seed(0)
    backbone = build(model, 128, model_args=args).eval()
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if name.endswith("pos_embed"):
                grid = math.isqrt(weight.shape[1])
                wave = flat(waves(grid)) @ torch.randn(2, weight.shape[2])
                weight[:, -(grid**2) :] = wave
            elif name.endswith("pos_bias"):
                grids = [flat(waves(math.isqrt(count))) for count in weight.shape[1:]]
                weight.copy_(3 * torch.einsum("qi,kj,hij->hqk", *grids, torch.randn(len(weight), 2, 2)))
            elif name.endswith("relative_position_bias_table"):
                weight.copy_(3 * flat(slopes(math.isqrt(len(weight)) // 2 + 1)) @ torch.randn(2, weight.shape[1]))
    return backbone


@pytest.mark.parametrize(
    ("model", "args"), [(VIT, {}), (SWIN, SMALL_SWIN), (EVA, SMALL_EVA), ("hiera_tiny_224", {}), (CMT, SMALL_CMT)]
)
@pytest.mark.parametrize("size", [160, 192])
def test_it_sees_the_same_in_a_larger_image(model: str, args: dict[str, Any], size: int) -> None:
    backbone = with_smooth_positions(model, args)
    (small,) = backbone(smooth_images(128))
    (large,) = backbone.at(size)(smooth_images(size))
    cosine = torch.cosine_similarity(small.mean((2, 3)), large.mean((2, 3)))
    assert cosine.item() > 0.98


# What is set stays set


@pytest.mark.parametrize(("model", "how"), [(VIT, "drop"), (EVA, "drop"), (VIT, "tokens"), (SWIN, "tokens")])
@pytest.mark.parametrize("size", [160, 192])
def test_hiding_goes_on(model: str, how: str, size: int) -> None:
    args = {VIT: {}, EVA: SMALL_EVA, SWIN: SMALL_SWIN}[model]
    hiding = HidingBackbone(build(model, 128, model_args=args), how).eval()
    token = hiding.backbone.mask_token
    hiding.backbone.resize(size)
    assert hiding.backbone.mask_token is token
    grid = size // 32
    images, mask = torch.randn(2, 3, size, size), torch.eye(grid, dtype=torch.bool).expand(2, -1, -1)
    (seen,) = hiding(images, mask)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask)[0], seen, rtol=0, atol=0)
    assert not torch.equal(hiding(images)[0], seen)
    torch.testing.assert_close(hiding(images, torch.zeros_like(mask)), hiding(images), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["drop", "tokens"])
def test_a_copy_shares_nothing(how: str) -> None:
    backbone = build(VIT, 128)
    backbone.hide_by(how)
    backbone.eval()
    images, mask = torch.randn(1, 3, 128, 128), torch.eye(8, dtype=torch.bool)[None]
    plain, seen = backbone(images), backbone(images, mask)
    other = backbone.at(160)
    assert (backbone.resolution, other.resolution) == (128, 160)
    assert not {id(weight) for weight in backbone.parameters()} & {id(weight) for weight in other.parameters()}
    with torch.no_grad():
        for weight in other.parameters():
            weight += 1
    other(torch.randn(1, 3, 160, 160), torch.eye(10, dtype=torch.bool)[None])
    torch.testing.assert_close(backbone(images), plain, rtol=0, atol=0)
    torch.testing.assert_close(backbone(images, mask), seen, rtol=0, atol=0)


def test_modes_frozen_weights_maps_and_precision_stay() -> None:
    backbone = build("hrnet_w18_small", 64)
    frozen = {name for name, weight in backbone.named_parameters() if not weight.requires_grad}
    backbone.model.bn1.eval()
    backbone.resize(96)
    assert {name for name, weight in backbone.named_parameters() if not weight.requires_grad} == frozen
    assert backbone.model.training
    assert not backbone.model.bn1.training

    several = build(SWIN, 64, model_args=SMALL_SWIN, indices=[0, 2]).double()
    several.resize(128)
    maps = several(torch.randn(1, 3, 128, 128).double())
    assert [tuple(one.shape) for one in maps] == [(1, 24, 32, 32), (1, 96, 8, 8)]
    assert all(weight.grad is None for weight in several.parameters())


def test_an_optimisers_moments_go_along() -> None:
    """The next step of Adam, taken on carried moments, is the carried step wherever all agree."""
    backbone = build(VIT, 128)
    optimiser = torch.optim.AdamW(backbone.parameters())
    backbone(torch.randn(2, 3, 128, 128))[0].square().sum().backward()
    optimiser.step()
    old = {name: optimiser.state[weight] for name, weight in backbone.named_parameters()}
    carry = backbone.resize(160)
    for name, weight in backbone.named_parameters():
        first = carry(name, old[name]["exp_avg"])
        second = carry(name, old[name]["exp_avg_sq"], positive=True)
        assert first.shape == second.shape == weight.shape
        assert second.min() >= 0
        assert torch.isfinite(first / (second.sqrt() + 1e-8)).all()


# What cannot be


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("mixer_s32_224", 160, r"mixer_s32_224 trains at one size.*mlp_tokens.fc1.weight and 23 more"),
        ("gmlp_ti16_224", 160, r"trains at one size.*gate.proj.weight"),
        ("resmlp_12_224", 160, r"trains at one size.*linear_tokens.weight"),
        (VIT, 100, "cannot take images of 100 px.*nearest that work: 96, 112"),
    ],
)
def test_what_cannot_grow_is_refused_and_left_as_it_was(model: str, size: int, message: str) -> None:
    backbone = build(model, 128)
    before, net = copy.deepcopy(backbone.state_dict()), backbone.model
    for attempt in (backbone.check_resize, backbone.resize, backbone.at):
        with pytest.raises(UserError, match=message) as raised:
            attempt(size)
        assert "\n" not in str(raised.value)
    assert backbone.model is net
    assert backbone.resolution == 128
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
