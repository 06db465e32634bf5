# SPDX-License-Identifier: Apache-2.0
"""CMT computes what the original computes, and answers all that timm's networks answer."""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from official_weights import image, official_output, official_state
from safetensors.torch import save_file
from test_resume import STEPS, digest, start, told
from timm.layers import set_fused_attn
from timm.models import model_entrypoint
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import fastmim
from fastmim.backbones.adapter import build
from fastmim.backbones.cmt import CMT, checkpoint_filter_fn, convert_official
from fastmim.backbones.cmt_layers import Attention
from fastmim.backbones.hiding import HidingBackbone
from fastmim.backbones.resizing import PairMove
from fastmim.errors import UserError
from fastmim.run_folder import Run

SMALL: dict[str, Any] = {"stem_dim": 8, "embed_dims": (16, 32, 64, 64), "depths": (1, 2, 2, 1), "mlp_ratio": 2.0}
VARIANTS = {"cmt_tiny": 160, "cmt_xsmall": 192, "cmt_small": 224, "cmt_base": 256}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**words: Any) -> CMT:
    return timm.create_model("cmt_small", **{"img_size": 64, "num_classes": 7, **SMALL, **words}).eval()


def moved(network: nn.Module) -> nn.Module:
    """Unlike any fresh one: every number of its state is moved."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value)
    return network


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith("encoder.")}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# The original's numbers


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_the_originals(fused: bool) -> None:
    set_fused_attn(fused)
    try:
        network = timm.create_model("cmt_small").eval()
    finally:
        set_fused_attn(True)
    missing, unexpected = network.load_state_dict(convert_official(official_state("finetune__cmt_small")), strict=False)
    assert unexpected == [] and all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        assert relative(network(image(2, 224)), official_output("finetune__cmt_small")) < 1e-4


def test_dense_maps_are_the_originals() -> None:
    backbone = build("cmt_small", 128).eval()
    state = convert_official(encoder_of(official_state("pretrain__cmt_small")))
    missing, unexpected = backbone.model.load_state_dict(state, strict=False)
    assert unexpected == [] and all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        tokens = backbone(image(2, 128))[0].flatten(2).mT
    assert relative(tokens, official_output("pretrain__cmt_small")) < 1e-4


def test_every_key_of_the_original_has_one_of_ours() -> None:
    state = official_state("finetune__cmt_small")
    assert len(convert_official(state)) == len(state)
    # What BatchNorm counts is in a real checkpoint too.
    assert list(convert_official({"stem_norm2.num_batches_tracked": torch.tensor(3)})) == [
        "stem.1.norm.num_batches_tracked"
    ]
    inner = encoder_of(official_state("pretrain__cmt_small"))
    converted = convert_official(inner)
    # The last norm of the encoder is never applied: the test above holds the maps without it.
    assert len(converted) == len(inner) - 2
    assert converted.keys() == convert_official({key.removeprefix("encoder."): v for key, v in inner.items()}).keys()
    for stranger in ("mask_token", "decoder_pred.weight", "blocks_e.0.norm1.weight", "blocks_a.0.attn.qkv.weight"):
        with pytest.raises(KeyError):
            convert_official({stranger: torch.zeros(1)})


def test_timm_loads_the_originals_checkpoints(tmp_path: Path) -> None:
    state = official_state("pretrain__cmt_small")
    network = timm.create_model("cmt_small", num_classes=0, img_size=224)
    found = checkpoint_filter_fn({"model": state}, network)
    assert found["stages.0.pos_bias"].shape == (1, 56 * 56, 49)
    bias = PairMove((32, 32, 4, 4), (56, 56, 7, 7))(state["encoder.relative_pos_a"], False)
    assert torch.equal(found["stages.0.pos_bias"], bias)
    assert network.load_state_dict(found, strict=False).unexpected_keys == []

    save_file(official_state("finetune__cmt_small"), tmp_path / "original.safetensors")
    overlay = {"file": str(tmp_path / "original.safetensors")}
    whole = timm.create_model("cmt_small", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert relative(whole(image(2, 224)), official_output("finetune__cmt_small")) < 1e-4
    larger = timm.create_model(
        "cmt_small", pretrained=True, pretrained_cfg_overlay=overlay, img_size=256, num_classes=9
    )
    assert torch.equal(larger.head.conv.weight, whole.head.conv.weight)
    assert torch.equal(larger.stages[3].pos_bias, PairMove((7,) * 4, (8,) * 4)(whole.stages[3].pos_bias, False))

    own = timm.create_model("cmt_small", num_classes=0, img_size=128).state_dict()
    same = checkpoint_filter_fn(own, timm.create_model("cmt_small", num_classes=0, img_size=128))
    assert same.keys() == own.keys() and all(same[key] is own[key] for key in own)


# What timm's networks answer


@pytest.mark.parametrize("name", VARIANTS)
def test_every_size_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
        assert network.default_cfg["input_size"] == (3, VARIANTS[name], VARIANTS[name])
        assert network(torch.empty(2, *network.default_cfg["input_size"])).shape == (2, 1000)
        assert network.num_features == network.feature_info[-1]["num_chs"]
        assert network.head_hidden_size == 1280
    assert model_entrypoint(name).__module__ == "fastmim.backbones.cmt"
    assert timm.list_models(module="cmt") == sorted(VARIANTS)


def test_intermediates_are_the_features() -> None:
    network, images = moved(small()), torch.randn(2, 3, 64, 64)
    last, maps = network.forward_intermediates(images)
    assert [tuple(one.shape[1:]) for one in maps] == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2)]
    assert torch.equal(last, network.forward_features(images)) and torch.equal(last, maps[-1])
    assert torch.equal(network(images), network.forward_head(last))
    assert network.forward_head(last, pre_logits=True).shape == (2, network.head_hidden_size) == (2, 1280)
    early, some = network.forward_intermediates(images, indices=[0, 2], stop_early=True)
    assert torch.equal(early, maps[2]) and [torch.equal(*pair) for pair in zip(some, (maps[0], maps[2]), strict=True)]
    assert len(network.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="'NCHW', not 'NLC'"):
        network.forward_intermediates(images, output_fmt="NLC")


def test_features_only_is_a_pyramid() -> None:
    network = moved(small(num_classes=0))
    pyramid = timm.create_model("cmt_small", img_size=64, features_only=True, out_indices=(1, 3), **SMALL).eval()
    renamed = {key.replace(".", "_", 1): value for key, value in network.state_dict().items()}
    assert pyramid.load_state_dict(renamed, strict=True)
    images = torch.randn(1, 3, 64, 64)
    expected = network.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    torch.testing.assert_close(pyramid(images), expected, rtol=0, atol=0)
    assert pyramid.feature_info.reduction() == [8, 32] and pyramid.feature_info.channels() == [32, 64]


@pytest.mark.parametrize("indices", [1, [0], [1, 2], [-1]])
def test_pruning_leaves_nothing_without_a_gradient(indices: int | list[int]) -> None:
    network, images = moved(small()), torch.randn(2, 3, 64, 64)
    expected = network.forward_intermediates(images, indices, intermediates_only=True)
    assert network.prune_intermediate_layers(indices) == network.prune_intermediate_layers(indices)
    maps = network.forward_intermediates(images, indices, intermediates_only=True)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    maps[-1].square().sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert torch.equal(network(images), maps[-1])
    assert network.num_features == maps[-1].shape[1]
    network.reset_classifier(3, "avg")
    assert network(images).shape == (2, 3)


def test_the_head_comes_and_goes_with_the_classes() -> None:
    network, images = moved(small()), torch.randn(2, 3, 64, 64)
    features, projection = network.forward_features(images), network.head.conv
    network.reset_classifier(5)
    assert network.head.conv is projection and network.get_classifier().out_features == 5
    assert network(images).shape == (2, 5)
    network.reset_classifier(0)
    assert torch.equal(network(images), features.mean((2, 3))) and network.head_hidden_size == 64
    assert not any(key.startswith("head") for key in network.state_dict())
    network.reset_classifier(0, "catavgmax")
    assert network(images).shape == (2, 128) == (2, network.head_hidden_size)
    network.reset_classifier(4, "avg")
    assert network(images).shape == (2, 4) and network.head.norm.num_features == 1280
    with pytest.raises(ValueError, match="classes need a pooled map"):
        network.reset_classifier(4, "")
    dropping = small(drop_rate=1.0, num_classes=2).train()
    assert torch.equal(dropping(images), dropping.get_classifier().bias.expand(2, -1))


def test_drop_path_grows_linearly() -> None:
    network = small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in network.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * number / 5 for number in range(6)])
    block, x = network.stages[3].blocks[0], torch.randn(1, 64, 2, 2)
    bias = network.stages[3].pos_bias
    block.drop_path.drop_prob = 1.0
    local = x + block.lpu(x)
    assert not torch.equal(block(x, bias), local)
    assert torch.equal(block.train()(x, bias), local)


def test_a_block_trains_alike_when_it_is_computed_twice() -> None:
    network, images = moved(small()), torch.randn(2, 3, 64, 64)
    grads = []
    for twice in (False, True):
        network.set_grad_checkpointing(twice)
        network.zero_grad()
        network(images).square().sum().backward()
        grads.append([weight.grad.clone() for weight in network.parameters()])
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_attention_equals_a_loop() -> None:
    layer, x = moved(Attention(6, 3, 2)).eval(), torch.randn(1, 6, 4, 4)
    bias = torch.randn(3, 16, 4)
    mixed = torch.zeros(16, 6)
    tokens, reduced = x[0].flatten(1).T, layer.reduce(x)[0].flatten(1).T
    q, k, v = layer.q(tokens), layer.k(reduced), layer.v(reduced)
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        for i in range(16):
            weights = [math.exp(float(q[i, part] @ k[j, part]) / 2**0.5 + float(bias[head, i, j])) for j in range(4)]
            mixed[i, part] = sum(w * v[j, part] for j, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(layer(x, bias), layer.proj(mixed).T.view(1, 6, 4, 4), rtol=1e-4, atol=1e-5)


def test_layer_decay_goes_from_the_stem_to_the_head() -> None:
    network = small()
    groups = param_groups_layer_decay(network, weight_decay=0.05, no_weight_decay_list=network.no_weight_decay())
    names = {id(weight): name for name, weight in network.named_parameters()}
    scale = {names[id(weight)]: group["lr_scale"] for group in groups for weight in group["params"]}
    order = ["stem.2.conv.weight", "stages.0.pos_bias", "stages.1.blocks.0.lpu.weight", "stages.1.blocks.1.lpu.weight"]
    order += ["stages.2.downsample.conv.weight", "stages.3.blocks.0.lpu.weight", "head.conv.weight"]
    scales = [scale[name] for name in order]
    assert scales == sorted(set(scales)) and scales[-1] == 1
    assert scale["stages.0.pos_bias"] == scale["stages.0.downsample.conv.weight"] == scale["stages.0.blocks.0.lpu.bias"]
    assert len(set(scale.values())) == 1 + 6 + 1  # stem, blocks, head
    decay = {names[id(weight)]: group["weight_decay"] for group in groups for weight in group["params"]}
    assert {name for name in decay if name.endswith("pos_bias")} == network.no_weight_decay()
    assert all(decay[name] == 0 for name in network.no_weight_decay())
    coarse = network.group_matcher(coarse=True)
    groups = timm.models.group_parameters(network, coarse)
    assert sorted(Counter(name.split(".")[1] for group in groups.values() for name in group if "stages" in name)) == [
        *"0123"
    ]
    assert len(groups) == 6


def test_position_biases_begin_small() -> None:
    for stage in timm.create_model("cmt_tiny", num_classes=0).stages:
        assert 0.01 < stage.pos_bias.std() < 0.03 and stage.pos_bias.abs().max() < 2


# Sizes


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (32, 160)])
def test_another_size_is_set_in_place(size: tuple[int, int]) -> None:
    network = moved(small(num_classes=0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.stages[1].pos_bias.requires_grad_(False)
    network.set_input_size(img_size=size)
    assert timm.models.get_model_args(network)["img_size"] == size
    for name, value in network.state_dict().items():
        assert name.endswith("pos_bias") or torch.equal(value, before[name])
    images = torch.randn(1, 3, *size)
    maps = network.forward_intermediates(images, intermediates_only=True)
    assert [tuple(one.shape[2:]) for one in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert [stage.pos_bias.requires_grad for stage in network.stages] == [True, False, True, True]
    with pytest.raises((AssertionError, RuntimeError), match="set_input_size"):
        network(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="a multiple of 32 px"):
        network.set_input_size(100)
    network.set_input_size(size)
    torch.testing.assert_close(network.forward_intermediates(images, intermediates_only=True), maps, rtol=0, atol=0)


def smooth(side: int, channels: int) -> Tensor:
    """[1, channels, side, side]: waves that are slow for the image."""
    share = (torch.arange(side) + 0.5) / side
    turns = torch.arange(1, channels + 1)[:, None, None] / channels
    return (torch.sin(4 * turns * share[:, None] + 1) + torch.cos(5 * turns * share))[None]


def test_attention_says_the_same_in_a_larger_image() -> None:
    """From 128 to 224 px: what a strong, smooth bias makes of a smooth map stays. The matrix as a picture loses it."""
    layer = Attention(8, 2, 1).eval()
    share = (torch.arange(8) + 0.5) / 8
    row, column = (grid.flatten() for grid in torch.meshgrid(share, share, indexing="ij"))
    far = (row[:, None] - row[None]).square() + (column[:, None] - column[None] - 0.2).square()
    bias = torch.stack([-12 * far, 6 * row[:, None] * column[None] - 9 * far])
    large = PairMove((8, 8, 8, 8), (14, 14, 14, 14))(bias, False)
    picture = nn.functional.interpolate(bias[None], (196, 196), mode="bicubic", align_corners=False, antialias=True)[0]

    def shown(x: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.interpolate(layer(x, bias), (8, 8), mode="bilinear", antialias=True)

    expected = layer(smooth(8, 8), bias)
    spread = (expected - expected.mean((2, 3), keepdim=True)).norm()
    right = (shown(smooth(14, 8), large) - expected).norm() / spread
    wrong = (shown(smooth(14, 8), picture) - expected).norm() / spread
    assert right < 0.05
    assert wrong > 10 * right


def test_a_size_that_it_cannot_take_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot take images of 100 px.*nearest that work: 96, 128"):
        build("cmt_small", 100, model_args=SMALL)
    with pytest.raises(UserError, match=r"of 7 px|cannot be reduced by 7"):
        build("cmt_small", 128, model_args={**SMALL, "sr_ratios": (7, 4, 2, 1)})


# In a run


def test_hidden_pixels_change_nothing() -> None:
    hiding = HidingBackbone(build("cmt_small", 64, model_args=SMALL)).eval()
    images, mask = torch.randn(2, 3, 64, 64), torch.eye(4, dtype=torch.bool).expand(2, -1, -1)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    seen = hiding(images, mask)
    torch.testing.assert_close(hiding(torch.where(hidden, 9.0, images), mask), seen, rtol=0, atol=0)
    assert not torch.equal(hiding(torch.where(hidden, images, 9.0), mask)[0], seen[0])
    assert {f"backbone.model.stages.{stage}.pos_bias" for stage in range(4)} <= hiding.no_weight_decay()


GROWING: dict[str, Any] = {
    "model": "cmt_small",
    "model_args": {"stem_dim": 4, "embed_dims": [4, 8, 8, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
                   "mlp_ratio": 2.0, "drop_path_rate": 0.1},
    "phases": "96:0.5,128:0.5", "hide": "pixels", "keep": STEPS, "workers": 0, "holdout": 0.1,
}  # fmt: skip


def test_a_run_grows_resumes_and_is_handed_over(photos: Path, tmp_path: Path) -> None:
    whole = start(photos, tmp_path / "whole", **GROWING)
    cut = tmp_path / "cut"
    for at in (19, 31):  # in either phase, of which the second begins with step 20
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(whole.path, cut)
        for folder in (cut / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > at:
                shutil.rmtree(folder)
        status = json.loads((cut / "status.json").read_text())
        (cut / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
        fastmim.resume(cut)
        assert digest(cut) == digest(whole.path)
        assert told(cut) == told(whole.path)

    config = json.loads((whole.exported / "config.json").read_text())
    assert config["registered_by"] == "fastmim.backbones.cmt"
    assert config["pretrained_cfg"]["input_size"] == [3, 128, 128]
    assert Run(whole.path).load(img_size=224)(torch.randn(1, 3, 224, 224)).shape == (1, 16)
    # A process that knows of it only what the card says, then what the report says.
    card = (whole.exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    report = (whole.path / "report.html").read_text()
    assert "import timm\nimport fastmim.backbones.cmt\n\nfolder" in report
    check = "\nnetwork = timm.create_model(f'local-dir:{folder}', pretrained=True)\nprint(network.num_features)"
    done = subprocess.run(
        [sys.executable, "-c", f"{card}\nfolder = {str(whole.exported)!r}{check}"],
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.split() == ["16"]


def test_blocks_are_discarded_and_handed_over_fresh(photos: Path, tmp_path: Path) -> None:
    words = {name: value for name, value in GROWING.items() if name != "phases"}
    run = start(photos, tmp_path / "run", **{**words, "resolution": 64, "discard": 1, "epochs": 1.0})
    assert "\n- `stages.3`\n" in (run.exported / "README.md").read_text()
    assert run.load()(torch.randn(1, 3, 64, 64)).shape == (1, 16)
