# SPDX-License-Identifier: Apache-2.0
"""Any timm network becomes a backbone, and hiding hides."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from fastmim.backbones.adapter import Stage, TimmBackbone, build
from fastmim.backbones.blueprint import Blueprint
from fastmim.backbones.catalog import describe, families
from fastmim.backbones.hiding import HidingBackbone
from fastmim.errors import UserError


class Case(NamedTuple):
    model: str
    channels: int
    stride: int
    resolution: int = 64
    hides: str = "pixels"


# One small network of each kind; the numbers are of the deepest map.
CASES = [
    Case("cait_xxs24_224", 192, 16, hides="pixels tokens"),
    Case("cmt_tiny", 368, 32),
    Case("coat_tiny", 152, 32),
    Case("convit_tiny", 192, 16, hides="pixels tokens"),
    Case("convmixer_768_32", 768, 7, resolution=63),
    Case("cs3darknet_focus_s", 512, 32),
    Case("densenet121", 1024, 32),
    Case("dla46x_c", 256, 32),
    Case("edgenext_xx_small", 168, 32),
    Case("efficientformerv2_s0", 176, 32),
    Case("efficientvim_m1", 320, 64),
    Case("efficientvit_b0", 128, 32),
    Case("efficientvit_m0", 192, 64),
    Case("fasternet_t0", 320, 32, hides="pixels tokens"),
    Case("fastvit_t8", 384, 32),
    Case("gmlp_ti16_224", 128, 16),
    Case("hiera_tiny_224", 768, 32, hides="drop pixels"),
    Case("hrnet_w18_small", 1024, 32),
    Case("inception_v3", 2048, 32, resolution=96),
    Case("lcnet_035", 176, 32),
    Case("levit_128s", 384, 64),
    Case("mobilevit_xxs", 320, 32),
    Case("pit_ti_224", 256, 32),
    Case("pvt_v2_b0", 256, 32),
    Case("regnetx_002", 368, 32),
    Case("swin_tiny_patch4_window7_224", 768, 32, hides="pixels tokens"),
    Case("swinv2_cr_tiny_224", 768, 32, hides="pixels tokens"),
    Case("test_byobnet", 256, 32),
    Case("test_coatnet", 128, 32),
    Case("test_convnext", 64, 32),
    Case("test_efficientnet", 64, 32),
    Case("test_mambaout", 64, 32),
    Case("test_nfnet", 192, 32),
    Case("test_resnet", 96, 32),
    Case("test_vit", 64, 16, hides="drop pixels tokens"),
    Case("test_vit_relpos", 96, 16, hides="pixels tokens"),
    Case("tiny_vit_5m_224", 320, 32),
    Case("vit_small_patch16_dinov3", 384, 16, hides="drop pixels tokens"),
    Case("vit_tiny_r_s16_p8_224", 192, 32),
    Case("xcit_nano_12_p8_224", 128, 8),
]
# What a network may lose to pruning: its last norm, its head, and what only a class token passes through.
HEAD = (
    r"(norm|fc_norm|head|bn2|conv_head|final_conv|aggregate|cls_token|blocks_token_only|cls_attn_blocks"
    r"|downsamp_modules|final_layer)"
)

VIT, EVA, SWIN = "test_vit", "vit_tiny_patch16_dinov3_qkvb", "swin_tiny_patch4_window7_224"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_a_network_becomes_a_backbone(case: Case) -> None:
    backbone = build(case.model, case.resolution)
    assert backbone.stages == (Stage(case.channels, case.stride),)
    assert backbone.hides == set(case.hides.split())

    hiding = HidingBackbone(backbone)
    images = torch.randn(2, 3, case.resolution, case.resolution)
    blocks = 4 if case.resolution % 4 == 0 else 3
    (one,) = hiding(images, torch.eye(blocks, dtype=torch.bool).expand(2, -1, -1))
    side = case.resolution // case.stride
    assert one.shape == (2, case.channels, side, side)

    (one * torch.randn_like(one)).sum().backward()
    assert [name for name, weight in hiding.named_parameters() if weight.requires_grad and weight.grad is None] == []

    stock = timm.create_model(backbone.architecture, num_classes=0, **json.loads(json.dumps(backbone.create_args)))
    loaded = stock.load_state_dict(backbone.weights(), strict=False)
    head = re.compile(rf"^{HEAD}(\.|$)")
    assert loaded.unexpected_keys == []
    assert [key for key in loaded.missing_keys if not head.match(key)] == []
    assert {f"model.{key}" for key in backbone.weights()} == set(backbone.state_dict())


def test_stages_in_depth_order_whatever_the_order_of_indices() -> None:
    backbone = build("test_convnext", 64, indices=[-1, 0, 2])
    assert backbone.stages == (Stage(24, 4), Stage(48, 16), Stage(64, 32))
    maps = HidingBackbone(backbone)(torch.randn(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(24, 16, 16), (48, 4, 4), (64, 2, 2)]


def test_a_map_equals_timms_own() -> None:
    stock = timm.create_model(VIT, num_classes=0, img_size=64).eval()
    backbone = build(VIT, 64).eval()
    backbone.model.load_state_dict(stock.state_dict())
    images = torch.randn(2, 3, 64, 64)
    tokens = stock.forward_features(images)[:, stock.num_prefix_tokens :]
    torch.testing.assert_close(backbone(images)[0].flatten(2).transpose(1, 2), tokens, rtol=0, atol=0)


def test_weights_that_no_map_depends_on_are_frozen_and_kept() -> None:
    backbone = build("hrnet_w18_small", 64)
    frozen = {name for name, weight in backbone.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all(name.startswith(("model.stage4", "model.incre_modules")) for name in frozen)
    assert all(weight.requires_grad for weight in build("test_resnet", 64).parameters())


@pytest.mark.parametrize(
    ("model", "resolution", "window"),
    [
        ("swin_base_patch4_window7_224", 128, 4),
        ("swin_base_patch4_window12_384", 128, 4),
        (SWIN, 192, 6),
        ("swinv2_cr_tiny_224", 128, 4),
    ],
)
def test_windows_follow_the_resolution(model: str, resolution: int, window: int) -> None:
    args = Blueprint(model, {}).at(resolution, (3,)).create_args
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=0, **args)
    stages = net.layers if hasattr(net, "layers") else net.stages
    assert {block.window_size for stage in stages for block in stage.blocks} == {(window, window)}


def test_model_args_reach_the_network() -> None:
    backbone = build(SWIN, 64, model_args={"embed_dim": 24, "window_size": 3})
    assert backbone.stages == (Stage(192, 32),)
    assert backbone.create_args["window_size"] == 3
    assert backbone.model.layers[0].blocks[0].window_size == (3, 3)


@pytest.mark.parametrize(
    ("name", "resolution", "options", "message"),
    [
        ("vit_smal_patch16_224", 128, {}, "nearest: vit_small_patch16_224"),
        ("resnet5", 128, {}, "nearest: resnet5"),
        ("hf-hub:timm/test_vit", 128, {}, "timm has no model"),
        ("local-dir:no/such/folder", 128, {}, "no config.json in no/such/folder"),
        (VIT, 128, {"model_args": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        (VIT, 128, {"model_args": {"img_size": 96}}, "'img_size' is set by fastmim"),
        (VIT, 128, {"indices": [2, 6]}, r"indices: \[6\] given, but the network has 6 maps: 0 to 5"),
        ("vit_small_patch14_dinov2", 128, {}, "covers 14 px.*nearest that work: 126, 140"),
        (SWIN, 100, {}, "covers 32 px.*nearest that work: 96, 128"),
        ("efficientformer_l1", 192, {}, "nearest that work: 224"),
        (VIT, 8, {}, "nearest that work: 16"),
    ],
)
def test_mistakes_are_one_clear_line(name: str, resolution: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build(name, resolution, **options)
    assert "\n" not in str(raised.value)


def test_local_dir_round_trip(tmp_path: Path) -> None:
    first = build(VIT, 64, model_args={"depth": 2}).eval()
    stock = timm.create_model(first.architecture, num_classes=0, **first.create_args)
    stock.load_state_dict(first.weights(), strict=False)
    save_for_hf(stock, tmp_path, model_args=first.create_args, safe_serialization=True)

    again = build(f"local-dir:{tmp_path}", 64).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), first(images), rtol=0, atol=0)
    assert (again.architecture, again.create_args["depth"]) == (VIT, 2)
    assert build(f"local-dir:{tmp_path}", 96)(torch.randn(1, 3, 96, 96))[0].shape == (1, 64, 6, 6)

    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(f"local-dir:{tmp_path}")):
        build(f"local-dir:{tmp_path}", 64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be built"):
        build(f"local-dir:{tmp_path}", 64)


# Hiding


def hidden_half(batch: int, side: int) -> Tensor:
    """Half of the places of each image, others in each."""
    order = torch.stack([torch.randperm(side * side) for _ in range(batch)])
    return (order < side * side // 2).unflatten(1, (side, side))


@pytest.mark.parametrize("model", [VIT, EVA, SWIN, "test_vit_relpos", "fasternet_t0", "samvit_base_patch16_224"])
def test_with_nothing_hidden_every_way_is_the_plain_network(model: str) -> None:
    small = {"depth": 2, "embed_dim": 96, "num_heads": 4, "global_attn_indexes": (1,)} if "sam" in model else {}
    backbone = build(model, 64, model_args=small).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = backbone(images)
    for how in backbone.hides:
        hiding = HidingBackbone(copy.deepcopy(backbone), how)
        for mask in (None, torch.zeros(2, 4, 4, dtype=torch.bool)):
            torch.testing.assert_close(hiding(images, mask), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("model", "how"), [(VIT, "pixels"), (SWIN, "pixels"), (VIT, "tokens"), (SWIN, "tokens")])
def test_hidden_pixels_change_nothing(model: str, how: str) -> None:
    hiding = HidingBackbone(build(model, 64), how).eval()
    images, mask = torch.randn(2, 3, 64, 64), hidden_half(2, 4)
    seen = hiding(images, mask)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask), seen, rtol=0, atol=0)
    assert not torch.equal(hiding(torch.where(hidden, images, 9.0), mask)[0], seen[0])
    assert not torch.equal(hiding(images)[0], seen[0])


@pytest.mark.parametrize("how", ["pixels", "tokens"])
def test_what_is_put_in_place_learns_and_never_decays(how: str) -> None:
    hiding = HidingBackbone(build(VIT, 64), how)
    hiding(torch.randn(2, 3, 64, 64), hidden_half(2, 4))[0].square().sum().backward()
    name = {"pixels": "colour", "tokens": "backbone.mask_token"}[how]
    assert dict(hiding.named_parameters())[name].grad.abs().max() > 0
    assert {name, "backbone.model.pos_embed", "backbone.model.cls_token"} <= hiding.no_weight_decay()
    assert not any("mask_token" in key or "colour" in key for key in hiding.weights())


DROPPING = [VIT, EVA, "vit_small_patch16_rope_mixed_224", "deit_tiny_distilled_patch16_224"]


@pytest.mark.parametrize("model", DROPPING)
def test_dropping_equals_attention_that_cannot_see_the_hidden(model: str) -> None:
    hiding = HidingBackbone(build(model, 64, indices=[1, -1]), "drop").eval()
    net = hiding.backbone.model
    images, mask = torch.randn(2, 3, 64, 64), hidden_half(2, 4)
    maps = hiding(images, mask)

    unseen = torch.cat([torch.zeros(2, net.num_prefix_tokens, dtype=torch.bool), mask.flatten(1)], dim=1)
    bias = torch.zeros(unseen.shape).masked_fill(unseen, float("-inf"))[:, None, None]
    expected = net.forward_intermediates(
        images, indices=[1, -1], norm=True, intermediates_only=True, attn_mask=bias.expand(-1, -1, unseen.shape[1], -1)
    )
    for one, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, reference.masked_fill(mask.unsqueeze(1), 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [VIT, EVA])
def test_dropped_patches_are_not_encoded(model: str) -> None:
    hiding = HidingBackbone(build(model, 64), "drop").eval()
    lengths: list[int] = []
    hiding.backbone.model.blocks[0].register_forward_hook(lambda block, args, out: lengths.append(out.shape[1]))
    images, mask = torch.randn(2, 3, 64, 64), hidden_half(2, 4)
    (seen,) = hiding(images, mask, hidden=8)
    assert lengths == [8 + hiding.backbone.model.num_prefix_tokens]
    assert (seen.abs().sum(dim=1) == 0).equal(mask)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask), [seen], rtol=0, atol=0)


HIERA, SMALL_HIERA = "hiera_tiny_224", {"embed_dim": 24, "stages": (1, 2, 2, 1)}


@pytest.mark.parametrize("size", [128, 160])
@pytest.mark.parametrize(
    ("model", "args"), [(HIERA, SMALL_HIERA), ("hiera_small_abswin_256", {"stages": (1, 1, 1, 1)})]
)
def test_hiera_leaves_units_out_as_timm_does(model: str, args: dict[str, Any], size: int) -> None:
    hiding = HidingBackbone(build(model, size, model_args=args), "drop").eval()
    assert hiding.backbone.mask_stride == 32
    net, grid = hiding.backbone.model, size // 32
    images, mask = torch.randn(2, 3, size, size), hidden_half(2, grid)
    blocks: list[int] = []
    net.blocks[-1].register_forward_hook(lambda block, inputs, out: blocks.append(out.shape[1]))
    (seen,) = hiding(images, mask, hidden=grid**2 // 2)
    assert blocks == [grid**2 - grid**2 // 2]

    visible = net.forward_features(images, mask=~mask.flatten(1))
    expected = torch.zeros(2, grid**2, visible.shape[2])
    for image, hidden in enumerate(mask.flatten(1)):
        expected[image, ~hidden] = visible[image]
    torch.testing.assert_close(seen.flatten(2).transpose(1, 2), expected)
    assert (seen.abs().sum(dim=1) == 0).equal(mask)

    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask), [seen], rtol=0, atol=0)
    assert not torch.equal(hiding(torch.where(hidden, images, 9.0), mask)[0], seen)
    torch.testing.assert_close(hiding(images, torch.zeros_like(mask)), hiding(images))


def test_hiera_leaves_units_out_at_another_size_and_trains() -> None:
    hiding = HidingBackbone(build(HIERA, 128, model_args=SMALL_HIERA), "drop")
    hiding.backbone.resize(160)
    hiding(torch.randn(2, 3, 160, 160), hidden_half(2, 5))[0].square().sum().backward()
    assert [name for name, weight in hiding.named_parameters() if weight.grad is None] == []
    assert not torch.equal(hiding(torch.ones(1, 3, 160, 160))[0], hiding(torch.zeros(1, 3, 160, 160))[0])


@pytest.mark.parametrize("options", [{"indices": [0, -1]}, {"indices": [2]}, {"discard": 1}])
def test_hiera_leaves_units_out_of_its_deepest_map_alone(options: dict[str, Any]) -> None:
    backbone = build(HIERA, 128, model_args=SMALL_HIERA, **options)
    with pytest.raises(UserError, match="'drop' only in its map of stride 32, not in those"):
        HidingBackbone(backbone, "drop")


@pytest.mark.parametrize("how", ["tokens", "drop"])
def test_hiding_leaves_nothing_behind(how: str) -> None:
    hiding = HidingBackbone(build(VIT, 64, model_args={"dynamic_img_size": False}), how).eval()
    images, mask = torch.randn(2, 3, 64, 64), hidden_half(2, 4)
    plain = hiding(images)
    hiding(images, mask)
    with pytest.raises(AssertionError):
        hiding(torch.randn(2, 3, 128, 128), torch.zeros(2, 8, 8, dtype=torch.bool))  # timm refuses another size
    torch.testing.assert_close(hiding(images), plain, rtol=0, atol=0)


COMPILE = """
import torch
from fastmim.backbones.adapter import build
from fastmim.backbones.hiding import HidingBackbone

mask = torch.eye(4, dtype=torch.bool).expand(2, -1, -1)
for model in ("test_vit", "test_convnext"):
    backbone = build(model, 64)
    for how in backbone.hides:
        hiding = HidingBackbone(build(model, 64), how)
        torch.compiler.reset()  # torch counts the compilations of one function, of whichever network
        compiled = torch.compile(hiding, backend="eager", fullgraph=True)
        for images in torch.randn(2, 2, 3, 64, 64):
            torch.testing.assert_close(compiled(images, mask, 4), hiding(images, mask, 4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images), hiding(images), rtol=1e-4, atol=1e-5)

hiding = HidingBackbone(build("hiera_tiny_224", 64, model_args={"stages": (1, 1, 1, 1)}), "drop")
torch.compiler.reset()
compiled = torch.compile(hiding, backend="eager", fullgraph=True)
images, mask = torch.randn(2, 3, 64, 64), torch.eye(2, dtype=torch.bool).expand(2, -1, -1)
torch.testing.assert_close(compiled(images, mask, 2), hiding(images, mask, 2), rtol=1e-4, atol=1e-5)
"""


def test_compiled_as_one_graph_equals_eager() -> None:
    # In a process of its own: the type checks of the test run cannot be compiled.
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("block", "patch"), [(32, 16), (16, 4)])
def test_blocks_of_several_patches(block: int, patch: int) -> None:
    hiding = HidingBackbone(build(VIT if patch == 16 else SWIN, 64), "tokens").eval()
    assert hiding.backbone.mask_stride == patch
    mask = hidden_half(1, 64 // block)
    scale = block // patch
    fine = mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(hiding(images, mask), hiding.backbone(images, fine), rtol=0, atol=0)


def test_wrong_ways_and_wrong_masks_are_refused() -> None:
    with pytest.raises(UserError, match="cannot hide by 'drop'; what works: compact, pixels, tokens"):
        HidingBackbone(build(SWIN, 64), "drop")
    with pytest.raises(UserError, match="cannot hide by 'tokens'; what works: compact, pixels"):
        HidingBackbone(build("test_resnet", 64), "tokens")
    images = torch.randn(2, 3, 64, 64)
    tokens, drop = HidingBackbone(build(VIT, 64), "tokens"), HidingBackbone(build(VIT, 64), "drop")
    with pytest.raises(UserError, match="a block has 8 px; choose a block that is a multiple of 16"):
        tokens(images, torch.zeros(2, 8, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="5 x 5 blocks does not divide"):
        tokens(images, torch.zeros(2, 5, 5, dtype=torch.bool))
    uneven = torch.zeros(2, 4, 4, dtype=torch.bool)
    uneven[0, 0, 0] = True
    with pytest.raises(ValueError, match="equally many hidden places"):
        drop(images, uneven)
    with pytest.raises(ValueError, match="hide_by"):
        build(VIT, 64)(images, uneven)


# Networks of the user's own


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 8, stride=8)
        self.stages = (Stage(5, 8),)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]

    def weights(self) -> dict[str, Tensor]:
        return self.state_dict()


def test_a_network_of_ones_own() -> None:
    hiding = HidingBackbone(Tiny())
    (one,) = hiding(torch.randn(2, 3, 32, 32), hidden_half(2, 4))
    assert one.shape == (2, 5, 4, 4)
    assert set(hiding.weights()) == {"stem.weight", "stem.bias"}
    assert hiding.no_weight_decay() == {"colour"}


@pytest.mark.parametrize("member", ["stages", "forward", "weights"])
def test_a_missing_member_is_named(member: str) -> None:
    kind = type("Mine", (Tiny,), {"forward": nn.Module.forward} if member == "forward" else {})
    network = kind()
    if member != "forward":
        setattr(network, member, None)
    with pytest.raises(UserError, match=f"Mine has no .*'{member}'"):
        HidingBackbone(network)


def test_maps_must_keep_the_promise_of_stages() -> None:
    network = Tiny()
    network.stages = (Stage(5, 16),)
    with pytest.raises(UserError, match=r"\(2, 5, 4, 4\).*promise.*\(2, 5, 2, 2\)"):
        HidingBackbone(network)(torch.randn(2, 3, 32, 32))


# Catalog


def test_catalog() -> None:
    found = families()
    assert len(found) >= 90
    assert "resnet50" in found["resnet"]
    assert found["cmt"] == ["cmt_base", "cmt_small", "cmt_tiny", "cmt_xsmall"]
    assert all(timm.is_model(name) for names in found.values() for name in names)

    told = describe("test_convnext")
    params = sum(weight.numel() for weight in timm.create_model("test_convnext", num_classes=0).parameters())
    stages = [(24, 4), (32, 8), (48, 16), (64, 32)]
    hides = frozenset({"pixels"})
    assert told == {"name": "test_convnext", "params": params, "stages": stages, "hides": hides, "fits": True}
    assert describe(VIT)["stages"] == [(64, 16)]
    assert [describe("vit_small_patch14_dinov2", size)["fits"] for size in (126, 128)] == [True, False]
    with pytest.raises(UserError, match="timm has no model"):
        describe("resnet5o")


def test_a_backbone_is_ready_to_train() -> None:
    backbone = build("levit_128s", 64)
    assert isinstance(backbone, TimmBackbone)
    assert backbone.training
    assert all(part.training for part in backbone.modules())
