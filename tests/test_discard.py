# SPDX-License-Identifier: Apache-2.0
"""A network is pre-trained without its last blocks, and handed over whole."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fastmim.backbones.adapter import Stage, TimmBackbone, build
from fastmim.backbones.hiding import HidingBackbone
from fastmim.errors import UserError
from fastmim.export import export_timm, verify

VIT, SWIN = "test_vit", "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 2, 3, 2), "num_heads": (1, 2, 4, 8)}
SMALL_VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}


@dataclass(frozen=True)
class Case:
    model: str
    discard: int
    discarded: str
    map: int
    """Which map of the whole network is the deepest then."""
    args: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(VIT, 1, "blocks.5", 5),
    Case(VIT, 4, "blocks.2 blocks.3 blocks.4 blocks.5", 5),
    Case("eva02_tiny_patch14_224", 1, "blocks.2", 2, {**SMALL_VIT, "patch_size": 16}),
    Case("beit_base_patch16_224", 2, "blocks.1 blocks.2", 2, SMALL_VIT),
    Case(SWIN, 1, "layers.3.blocks.1", 3, SMALL_SWIN),
    Case(SWIN, 2, "layers.3", 2, SMALL_SWIN),
    Case(SWIN, 3, "layers.2.blocks.2 layers.3", 2, SMALL_SWIN),
    Case(SWIN, 7, "layers.1 layers.2 layers.3", 0, SMALL_SWIN),
    Case("swinv2_tiny_window8_256", 3, "layers.2.blocks.2 layers.3", 2, SMALL_SWIN),
    Case("pvt_v2_b0", 3, "stages.2.blocks.1 stages.3", 2),
    Case("pvt_v2_b0", 1, "stages.3.blocks.1", 3),
    Case("cmt_tiny", 1, "stages.3.blocks.1", 3),
    Case("cmt_tiny", 3, "stages.2.blocks.9 stages.3", 2),
    Case("test_convnext", 2, "stages.3", 2),
    Case("convnext_atto", 3, "stages.2.blocks.5 stages.3", 2, {"dims": (8, 16, 24, 32)}),
    Case("resnet10t", 1, "layer4", 3),
    Case("resnet26", 3, "layer3.1 layer4", 3),
    Case("regnetx_002", 8, "s3.b4 s4", 3),
    Case("efficientnet_b0", 1, "blocks.6.0", 4),
    Case("efficientnet_b0", 3, "blocks.5.2 blocks.5.3 blocks.6.0", 4),
    Case("efficientnet_b0", 6, "blocks.4.2 blocks.5 blocks.6", 3),
    Case("hiera_tiny_224", 1, "blocks.11", 3),
    Case("hiera_tiny_224", 3, "blocks.9 blocks.10 blocks.11", 2),
    Case("mobilevit_xxs", 2, "stages.4 final_conv", 3),
    Case("pit_ti_224", 5, "transformers.1.blocks.5 transformers.2", 1),
    Case("twins_svt_small", 1, "blocks.3.3", 3),
    Case("convmixer_768_32", 31, " ".join(f"blocks.{number}" for number in range(1, 32)), 31),
    Case("test_coatnet", 2, "stages.2.blocks.1 stages.3", 3),
]


def side(model: str) -> int:
    return 63 if "convmixer" in model else 64


def moved(backbone: TimmBackbone) -> TimmBackbone:
    """A network unlike any fresh one."""
    generator = torch.Generator().manual_seed(1)
    for value in backbone.weights().values():
        if value.is_floating_point():
            value += 0.05 * torch.rand(value.shape, generator=generator)
    return backbone


def without(backbone: TimmBackbone, blocks: tuple[str, ...]) -> TimmBackbone:
    """The whole network, in which the named blocks return what they are given."""
    for name in blocks:
        backbone.model.get_submodule(name).forward = lambda tokens, *rest, **options: tokens
    return backbone


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.discard}")
def test_the_deepest_map_is_that_of_the_last_block_left(case: Case) -> None:
    size = side(case.model)
    cut = build(case.model, size, model_args=case.args, discard=case.discard).eval()
    assert cut.discarded == tuple(case.discarded.split())

    whole = build(case.model, size, model_args=case.args, indices=[case.map]).eval()
    kept = whole.weights()
    assert cut.weights().keys() <= kept.keys()
    cut.model.load_state_dict({name: kept[name] for name in cut.weights()})
    blocks = tuple(name for name in cut.discarded if name in dict(whole.model.named_modules()))
    images = torch.randn(2, 3, size, size)
    expected = without(whole, blocks)(images)
    torch.testing.assert_close(cut(images), expected, rtol=0, atol=0)

    below = tuple(f"{name}." for name in cut.discarded)
    assert {name for name in kept if name not in cut.weights()} == {name for name in kept if name.startswith(below)}
    cut(images)[0].square().sum().backward()
    assert [name for name, weight in cut.named_parameters() if weight.grad is None] == []


def test_nothing_is_discarded_unless_asked_for() -> None:
    assert build(VIT, 64).discarded == ()
    assert build(SWIN, 64, model_args=SMALL_SWIN, discard=0).stages == (Stage(192, 32),)


def test_what_is_left_counts() -> None:
    """Strides, maps and sizes are those of the shortened network."""
    cut = build(SWIN, 64, model_args=SMALL_SWIN, discard=2, indices=[0, -1])
    assert cut.stages == (Stage(24, 4), Stage(96, 16))
    with pytest.raises(UserError, match=r"indices: \[3\] given, but the network has 3 maps: 0 to 2"):
        build(SWIN, 64, model_args=SMALL_SWIN, discard=2, indices=[3])
    with pytest.raises(UserError, match=r"indices: \[5\] given, but the network has 5 maps: 0 to 4"):
        build(VIT, 64, discard=1, indices=[5])
    with pytest.raises(UserError, match="covers 16 px"):
        build("test_convnext", 72, discard=2)
    assert build("test_convnext", 80, discard=2)(torch.randn(2, 3, 80, 80))[0].shape == (2, 48, 5, 5)


@pytest.mark.parametrize(
    ("model", "discard", "message"),
    [
        (VIT, 6, "discard: 6 of the 6 blocks of test_vit; at most 5 can be discarded"),
        (SWIN, 12, "at most 11 can be discarded"),
        ("resnet10t", 4, "at most 3 can be discarded"),
        (VIT, -1, "discard: -1 .* at most 5"),
        ("dla46x_c", 1, "does not know where the blocks of dla46x_c are"),
        ("vgg11", 1, "does not know where the blocks of vgg11 are"),
        ("coat_tiny", 1, "does not know where the blocks of coat_tiny are"),
        ("nextvit_small", 1, "nextvit_small cannot do without its last blocks"),
    ],
)
def test_what_cannot_be_discarded(model: str, discard: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build(model, 64, discard=discard)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("model", "how"), [(VIT, "drop"), (VIT, "tokens"), (SWIN, "tokens"), ("hiera_tiny_224", "")])
def test_a_shortened_network_grows_and_hides(model: str, how: str) -> None:
    cut = build(model, 64, model_args=SMALL_SWIN if model == SWIN else {}, discard=3)
    hiding = HidingBackbone(cut, how or "pixels").eval()
    weights = set(cut.weights())
    cut.resize(96)
    assert set(cut.weights()) == weights
    mask = torch.eye(3, dtype=torch.bool)[None]
    images = torch.randn(1, 3, 96, 96)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    seen = hiding(images, mask)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask), seen, rtol=0, atol=0)
    assert seen[0].shape[1:] == (cut.stages[0].channels, 96 // cut.stages[0].stride, 96 // cut.stages[0].stride)


# Handed over


EXPORTS = [case for case in CASES if case.model in (VIT, SWIN, "convnext_atto", "efficientnet_b0", "hiera_tiny_224")]


def export(network: TimmBackbone, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    return export_timm(
        network.architecture,
        network.create_args,
        network.weights() if weights is None else weights,
        folder,
        resolution=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        card={},
        discarded=network.discarded,
    )


@pytest.mark.parametrize("case", EXPORTS, ids=lambda case: f"{case.model}-{case.discard}")
def test_the_whole_network_is_handed_over(case: Case, tmp_path: Path) -> None:
    cut = moved(build(case.model, 64, model_args=case.args, discard=case.discard)).eval()
    folder = export(cut, tmp_path / "short")
    whole = export(build(case.model, 64, model_args=case.args), tmp_path / "whole")
    assert (folder / "config.json").read_text() == (whole / "config.json").read_text()

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = loaded.state_dict()
    assert state.keys() == timm.create_model(case.model, num_classes=0, **cut.create_args).state_dict().keys()
    for name, value in cut.weights().items():
        assert torch.equal(state[name], value), name
    images = torch.randn(2, 3, 64, 64)
    assert loaded(images).isfinite().all()
    assert verify(folder, cut, images, case.discard) == 0

    text = (folder / "README.md").read_text()
    section = text.split("## Discarded in pre-training\n")[1].split("\n## ")[0]
    assert re.findall(r"^- `(.*)`$", section, re.MULTILINE) == list(cut.discarded)
    assert not any(f"- `{name}." in text for name in cut.discarded)
    assert "Discarded" not in (whole / "README.md").read_text()


def test_blocks_that_are_left_see_what_they_saw(tmp_path: Path) -> None:
    """By timm alone: the block before the discarded ones returns, in the loaded network, the map that was trained."""
    cut = moved(build("test_vit", 64, discard=2, indices=[3])).eval()
    loaded = timm.create_model(f"local-dir:{export(cut, tmp_path / 'timm')}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    (found,) = loaded.forward_intermediates(images, indices=[3], norm=True, intermediates_only=True)
    torch.testing.assert_close(found, cut(images)[0], rtol=0, atol=0)


def test_verify_compares_the_map_that_was_trained(tmp_path: Path) -> None:
    cut = moved(build(VIT, 64, discard=2)).eval()
    folder, images = export(cut, tmp_path / "timm"), torch.randn(1, 3, 64, 64)
    assert verify(folder, lambda images: [one + 0.25 for one in cut(images)], images, 2) == pytest.approx(
        0.25, abs=1e-4
    )
    assert verify(folder, cut, images) > 0.1


def test_only_discarded_weights_may_be_missing(tmp_path: Path) -> None:
    cut = build(VIT, 64, discard=2)
    weights = cut.weights()
    del weights["blocks.3.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"missing: blocks\.3\.attn\.qkv\.weight$"):
        export(cut, tmp_path / "timm", weights)
    assert json.loads(json.dumps(cut.discarded)) == ["blocks.4", "blocks.5"]
