# SPDX-License-Identifier: Apache-2.0
"""transformers' networks, tiny and random: saved by it, read by us, and computing the same in timm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from fastmim.backbones.adapter import build
from fastmim.backbones.official import Imported, read_official
from fastmim.errors import UserError

PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
WIDE = {**PLAIN, "intermediate_size": 256}
SWIN = {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
PVT = {
    **{"hidden_sizes": [16, 32, 64, 64], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    **{"mlp_ratios": [4, 4, 2, 2], "sr_ratios": [8, 4, 2, 1]},
}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}


def saved(model: nn.Module, folder: Path) -> nn.Module:
    """The network with weights that are all different, in eval mode, and in ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        for weight in model.parameters():
            weight.data.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    return model.eval()


def images(side: int = 64) -> Tensor:
    return torch.linspace(-2, 2, 2 * 3 * side * side).sin().reshape(2, 3, side, side)


def loaded(imported: Imported, **args: Any) -> nn.Module:
    assert imported.layout == "Hugging Face"
    size = {"img_size": imported.resolution} if imported.resolution else {}
    model = timm.create_model(imported.architecture, **{**imported.model_args, **size, **args}).eval()
    model.load_state_dict(imported.weights)
    return model


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE)), "vit_base_patch16_224"),
    "beit": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**WIDE, use_relative_position_bias=True, use_mask_token=True)
        ),
        "beit_base_patch16_224",
    ),
    "beit_shared": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**WIDE, use_shared_relative_position_bias=True)
        ),
        "beit_base_patch16_224",
    ),
    "pvt_v2": (lambda: transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**PVT)), "pvt_v2_b2"),
    "convnext": (
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONVNEXT)),
        "convnext_tiny",
    ),
    "convnextv2": (
        lambda: transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**CONVNEXT)),
        "convnextv2_tiny",
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(tmp_path: Path, name: str) -> None:
    make, architecture = CLASSIFIERS[name]
    theirs = saved(make(), tmp_path)
    imported = read_official(tmp_path)
    assert imported.architecture == architecture and not imported.missing
    with torch.no_grad():
        same(loaded(imported, num_classes=2)(images()), theirs(images()).logits)


def test_swin(tmp_path: Path) -> None:
    theirs = saved(transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)), tmp_path)
    imported = read_official(tmp_path)
    assert imported.resolution == 64 and not imported.missing and "window_size" not in imported.model_args
    body = build(imported.architecture, 64, model_args=imported.model_args).eval()
    with torch.no_grad():
        same(loaded(imported, num_classes=2, window_size=2)(images()), theirs(images()).logits)
        body.model.load_state_dict({key: value for key, value in imported.weights.items() if key[:5] != "head."})
        hidden = theirs.swin(images()).last_hidden_state
        same(body(images())[-1].flatten(2).transpose(1, 2), hidden)


def test_masked_swin(tmp_path: Path) -> None:
    config = transformers.SwinConfig(**SWIN, encoder_stride=8)
    saved(transformers.SwinForMaskedImageModeling(config), tmp_path)
    imported = read_official(tmp_path)
    assert {"decoder.0.weight", "decoder.0.bias"} < set(imported.unused) and not imported.missing


@pytest.mark.parametrize("heads", [2, 4])
def test_bodies_and_their_heads(tmp_path: Path, heads: int) -> None:
    """config.json tells the number of heads."""
    theirs = saved(transformers.ViTModel(transformers.ViTConfig(**{**WIDE, "num_attention_heads": heads})), tmp_path)
    imported = read_official(tmp_path)
    assert imported.model_args["num_heads"] == heads and not imported.notes
    assert set(imported.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    with torch.no_grad():
        ours = loaded(imported, num_classes=0).forward_features(images())
        same(ours, theirs(images()).last_hidden_state)
    (tmp_path / "config.json").unlink()
    assert any("cannot be seen" in note for note in read_official(tmp_path).notes)


def test_vit_mae(tmp_path: Path) -> None:
    decoder = {
        **{"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        **{"decoder_intermediate_size": 64, "mask_ratio": 0.0},
    }
    theirs = saved(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**WIDE, **decoder)), tmp_path)
    imported = read_official(tmp_path)
    assert not imported.missing and all(key.startswith("decoder.") for key in imported.unused)
    in_order = torch.arange(16.0)[None].expand(2, -1)
    with torch.no_grad():
        ours = loaded(imported, num_classes=0).forward_features(images())
        same(ours, theirs.vit(images(), noise=in_order).last_hidden_state)


def test_deit(tmp_path: Path) -> None:
    config = transformers.DeiTConfig(**WIDE)
    theirs = saved(transformers.DeiTForImageClassificationWithTeacher(config), tmp_path)
    imported = read_official(tmp_path)
    assert imported.architecture == "deit_base_distilled_patch16_224" and not imported.missing
    with torch.no_grad():
        same(loaded(imported, num_classes=2)(images()), theirs(images()).logits)
    saved(transformers.DeiTForImageClassification(config), tmp_path)
    imported = read_official(tmp_path)
    assert set(imported.unused) == {"classifier.weight", "classifier.bias"} and not imported.missing


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2(tmp_path: Path, registers: bool) -> None:
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**PLAIN)
        theirs = saved(transformers.Dinov2WithRegistersForImageClassification(config), tmp_path)
        body = theirs.dinov2_with_registers
    else:
        theirs = saved(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**PLAIN)), tmp_path)
        body = theirs.dinov2
    imported = read_official(tmp_path)
    assert not imported.missing and {"classifier.weight", "embeddings.mask_token"} <= set(imported.unused)
    with torch.no_grad():
        same(loaded(imported, num_classes=0).forward_features(images()), body(images()).last_hidden_state)


def test_another_activation(tmp_path: Path) -> None:
    theirs = saved(transformers.ViTModel(transformers.ViTConfig(**WIDE, hidden_act="quick_gelu")), tmp_path)
    imported = read_official(tmp_path)
    with torch.no_grad():
        ours = loaded(imported, num_classes=0).forward_features(images())
        same(ours, theirs(images()).last_hidden_state)


def test_what_is_not_read(tmp_path: Path) -> None:
    saved(transformers.ViTModel(transformers.ViTConfig(**WIDE)), tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"vit"', '"vitdet"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"vitdet is not read; what is: vit, vit_mae, deit, beit"):
        read_official(tmp_path)
