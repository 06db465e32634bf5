# SPDX-License-Identifier: Apache-2.0
"""Weights into networks of other sizes, channels and heads: what fits is taken over, the rest is said or refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fastmim
from fastmim.backbones.loading import load_weights
from fastmim.errors import UserError
from fastmim.starts import build_classifier, open_backbone, read_start

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(side: int = 32, **words: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=side, **{**VIT, "num_classes": 3, **words})


def test_everything_but_the_head_is_taken_over() -> None:
    torch.manual_seed(0)
    old, new = vit(), vit()
    loaded = load_weights(new, old.state_dict(), "x")
    assert loaded.fresh == loaded.unused == loaded.resized == ()
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]) != name.startswith("head.weight"), name
    load_weights(new, old.state_dict(), "x", head=True)
    assert torch.equal(new.head.weight, old.head.weight)


def test_positions_follow_the_size_and_what_is_missing_is_said() -> None:
    old, new = vit(), vit(48, global_pool="avg")
    loaded = load_weights(new, old.state_dict(), "x")
    assert loaded.resized == ("pos_embed",) and loaded.fresh == ("fc_norm.bias", "fc_norm.weight")
    assert loaded.unused == ("norm.bias", "norm.weight")
    # The class token's own embedding stays as it was.
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0]) and new.pos_embed.shape == (1, 37, 32)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 6), (1, 3), (5, 2)])
def test_other_channels(old: int, new: int) -> None:
    before, after = vit(in_chans=old), vit(in_chans=new)
    load_weights(after, before.state_dict(), "x")
    one, other = before.patch_embed.proj.weight, after.patch_embed.proj.weight
    # A grey image, the same in all channels, looks as bright as before.
    assert torch.allclose(one.sum(1), other.sum(1), atol=1e-5)


def test_windows_of_swin_follow() -> None:
    args: dict[str, Any] = {"embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}
    make = lambda side, window: timm.create_model(  # noqa: E731
        "swin_tiny_patch4_window7_224", img_size=side, window_size=window, num_classes=0, **args
    )
    old, new = make(64, 4), make(112, 7)
    loaded = load_weights(new, old.state_dict(), "x")
    assert len(loaded.resized) == 2 and all("relative_position_bias_table" in name for name in loaded.resized)
    centre = new.layers[0].blocks[0].attn.relative_position_bias_table[13 * 6 + 6]
    assert torch.allclose(centre, old.layers[0].blocks[0].attn.relative_position_bias_table[7 * 3 + 3])


def test_another_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"weights.pth does not fit the network: .* is \(.*\), but \(.*\) in it"):
        load_weights(vit(), vit(embed_dim=48, num_heads=3).state_dict(), "weights.pth")
    with pytest.raises(UserError, match="holds none of the network's weights; first found: a"):
        load_weights(vit(), {"a": torch.zeros(1)}, "x")


def test_starts_of_all_kinds_give_the_same_network(photos: Path, tmp_path: Path) -> None:
    words = {"model": "vit_tiny_patch16_224", "model_args": VIT, "resolution": 32, "decoder_dim": 32, "epochs": 1,
             "device": "cpu", "workers": 0, "tensorboard": False, "holdout": 0}  # fmt: skip
    run = fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
    network = run.load().eval()
    images = torch.randn(2, 3, 32, 32)
    for word in (run, run.path, f"local-dir:{run.exported}"):
        opened = open_backbone(word)
        assert opened.resolution == 32 and opened.channels == 3
        assert torch.allclose(
            opened.backbone.eval()(images)[-1].mean((2, 3)), network.forward_features(images)[:, 1:].mean(1), atol=1e-5
        )
        start = read_start(word)
        classifier, args, loaded = build_classifier(start, 4, 48)
        assert loaded is not None and loaded.resized == ("pos_embed",) and args["img_size"] == 48
        assert torch.equal(classifier.get_submodule("blocks.0.attn.qkv").weight, network.blocks[0].attn.qkv.weight)


def test_pretraining_goes_on_from_weights(photos: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"resolution": 32, "decoder_dim": 32, "epochs": 1, "device": "cpu", "workers": 0,
                             "tensorboard": False, "holdout": 0}  # fmt: skip
    first = fastmim.pretrain(
        data=str(photos), out=tmp_path / "a", model="vit_tiny_patch16_224", model_args=VIT, **words
    )
    second = fastmim.pretrain(data=str(photos), out=tmp_path / "b", init=str(first.path), lr=1e-7, **words)
    assert second.config.method.model == "vit_tiny_patch16_224" and second.config.method.model_args["embed_dim"] == 32
    one, other = (run.load().blocks[0].attn.qkv.weight for run in (first, second))
    assert torch.allclose(one, other, atol=1e-4)
    with pytest.raises(UserError, match="timm has no model 'nothing'"):
        fastmim.pretrain(data=str(photos), out=tmp_path / "c", init="nothing", **words)
