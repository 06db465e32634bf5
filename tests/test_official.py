# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of FastMIM itself: read, brought to timm, and computing what the original code computes."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from official_weights import image, official_output, official_state
from torch import Tensor

from fastmim.backbones.adapter import TimmBackbone, build
from fastmim.backbones.official import Imported, describe, read_official
from fastmim.errors import UserError

VIT, SWIN, PVT, CMT = (
    "pretrain__vit_base(6 heads)",
    "pretrain__swin_base(window 4)",
    "pretrain__pvtv2_b2",
    "pretrain__cmt_small",
)


def saved(state: dict[str, Tensor], path: Path) -> Path:
    """As the original code saves."""
    rest = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 1, "scaler": {}}
    torch.save({"model": state, **rest, "args": argparse.Namespace(lr=1e-3, mask_type="block")}, path)
    return path


def backbone(imported: Imported) -> TimmBackbone:
    built = build(imported.architecture, 128, model_args=imported.model_args).eval()
    done = built.model.load_state_dict(imported.weights, strict=False)
    assert not done.unexpected_keys and set(done.missing_keys) <= set(imported.missing)
    return built


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def tokens(built: TimmBackbone) -> Tensor:
    return built(image(2, 128))[-1].flatten(2).transpose(1, 2)


def test_pre_trained_vit_and_its_heads(tmp_path: Path) -> None:
    """6 heads give the original's numbers; 12 load as silently and give others."""
    path = saved(official_state(VIT), tmp_path / "vit.pth")
    imported = read_official(path)
    assert (imported.architecture, imported.model_args, imported.resolution) == (
        "vit_base_patch16_224",
        {"num_heads": 6},
        128,
    )
    assert imported.layout == "FastMIM" and not imported.missing
    assert {key.split(".")[0] for key in imported.unused} == {
        *("mask_token", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
    }
    assert "--heads 12" in imported.notes[0]
    golden = official_output(VIT)
    built = backbone(imported)
    with torch.no_grad():
        assert difference(built.model.forward_features(image(2, 128)), golden) < 1e-4  # with the class token
    assert difference(tokens(built), golden[:, 1:]) < 1e-4
    other = read_official(path, heads=12)
    assert other.model_args == {} and other.weights.keys() == imported.weights.keys()
    with torch.device("meta"):
        twelve = timm.create_model(other.architecture, num_classes=0, img_size=128).eval()
    twelve.load_state_dict(other.weights, assign=True)
    with torch.no_grad():
        assert difference(twelve.forward_features(image(2, 128)), golden) > 1e-3  # the weights of the formula are small
    assert not any("heads" in note for note in other.notes)
    with pytest.raises(UserError, match="heads: 7 do not divide"):
        read_official(path, heads=7)


@pytest.mark.parametrize(
    ("name", "architecture", "resolution"),
    [
        (SWIN, "swin_base_patch4_window7_224", 128),
        (PVT, "pvt_v2_b2", None),
        (CMT, "cmt_small", 128),
    ],
)
def test_pre_trained(tmp_path: Path, name: str, architecture: str, resolution: int | None) -> None:
    imported = read_official(saved(official_state(name), tmp_path / "one.pth"))
    assert (imported.architecture, imported.model_args, imported.resolution) == (architecture, {}, resolution)
    assert imported.layout == "FastMIM" and not imported.missing and "mask_token" in imported.unused
    assert difference(tokens(backbone(imported)), official_output(name)) < 1e-4
    with pytest.raises(UserError, match="no plain ViT"):
        read_official(tmp_path / "one.pth", heads=6)


@pytest.mark.parametrize(
    ("name", "architecture", "args"),
    [
        ("finetune__vit_base_patch16", "vit_base_patch16_224", {"global_pool": "avg"}),
        ("finetune__pvtv2_b2", "pvt_v2_b2", {}),
        ("finetune__cmt_small", "cmt_small", {}),
    ],
)
def test_fine_tuned(tmp_path: Path, name: str, architecture: str, args: dict[str, object]) -> None:
    imported = read_official(saved(official_state(name), tmp_path / "one.pth"))
    assert (imported.architecture, imported.model_args) == (architecture, args)
    assert not imported.missing and not imported.unused
    model = timm.create_model(architecture, num_classes=1000, **imported.model_args).eval()
    done = model.load_state_dict(imported.weights, strict=False)
    assert not done.unexpected_keys and all(key.endswith("num_batches_tracked") for key in done.missing_keys)
    with torch.no_grad():
        assert difference(model(image(2, 224)), official_output(name)) < 1e-4


def test_fine_tuned_swin_normalises_after_pooling(tmp_path: Path) -> None:
    """Which timm's cannot: the body is exact, and what would compute something else is left out and said."""
    name = "finetune__swin_base_patch4_window7_224"
    state = official_state(name)
    imported = read_official(saved(state, tmp_path / "one.pth"))
    assert imported.architecture == "swin_base_patch4_window7_224" and imported.resolution == 224
    assert set(imported.missing) == {"norm.weight", "norm.bias"}
    assert set(imported.unused) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    model = timm.create_model(imported.architecture, num_classes=0).eval()
    model.load_state_dict(imported.weights, strict=False)
    model.norm = torch.nn.Identity()
    with torch.no_grad():
        pooled = model.forward_features(image(2, 224)).mean(dim=(1, 2))
        pooled = F.layer_norm(pooled, pooled.shape[1:], state["fc_norm.weight"], state["fc_norm.bias"])
        logits = F.linear(pooled, state["head.weight"], state["head.bias"])
    assert difference(logits, official_output(name)) < 1e-4
    lines = describe(imported)
    assert lines[2] == "weights: 325 of 327 of the network"
    assert lines[3] == "left out: head (2), fc_norm (2)" or lines[3] == "left out: fc_norm (2), head (2)"
    assert "keep their initial values: norm (2)" in lines and any("after pooling" in line for line in lines)
