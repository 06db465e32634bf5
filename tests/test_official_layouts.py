# SPDX-License-Identifier: Apache-2.0
"""Other projects' names, written out here once more and backwards: a timm network's weights come back the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fastmim.backbones.official import Imported, describe, read_official
from fastmim.errors import UserError

State = dict[str, Tensor]
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1}
SWIN = {"img_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
PVT = {"depths": [1, 2, 1, 1], "embed_dims": [16, 32, 80, 128], "mlp_ratios": [4, 4, 2, 2]}
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}


def fresh(architecture: str, **args: Any) -> nn.Module:
    """A network whose weights are all different, the norms' and biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model = timm.create_model(architecture, num_classes=5, **args).eval()
        for weight in model.parameters():
            weight.data.add_(0.1 * torch.randn(weight.shape))
    return model


def back(imported: Imported, model: nn.Module, side: int) -> None:
    """The same weights, and the same logits, from the arguments that were found."""
    args = imported.model_args
    size = {} if imported.resolution is None else {"img_size": imported.resolution}
    if "layers.0.blocks.0.attn.relative_position_bias_table" in imported.weights:
        table = imported.weights["layers.0.blocks.0.attn.relative_position_bias_table"]
        size["window_size"] = (round(len(table) ** 0.5) + 1) // 2  # `build` does this by the resolution
    again = timm.create_model(imported.architecture, num_classes=5, **{**args, **size}).eval()
    again.load_state_dict(imported.weights)
    stock = model.state_dict()
    assert imported.weights.keys() == stock.keys() and not imported.missing
    assert all(torch.equal(imported.weights[key], value) for key, value in stock.items())
    images = torch.linspace(-2, 2, 2 * 3 * side * side).sin().reshape(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def pth(state: State, tmp_path: Path, inside: str | None = "model") -> Path:
    path = tmp_path / "one.pth"
    torch.save({inside: state, "epoch": 3} if inside else state, path)
    return path


DECODER = {"decoder_embed.weight": torch.zeros(8, 64), "decoder_blocks.0.norm1.weight": torch.ones(8)}


def test_mae(tmp_path: Path) -> None:
    model = fresh("vit_base_patch16_224", **VIT)
    extra = {**DECODER, "decoder_pos_embed": torch.zeros(1, 17, 8), "mask_token": torch.zeros(1, 1, 8)}
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    imported = read_official(pth(state | extra, tmp_path))
    assert imported.layout == "MAE" and set(imported.unused) == extra.keys() and imported.resolution == 64
    assert imported.model_args == {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1}
    assert all(torch.equal(imported.weights[key], value) for key, value in state.items())
    assert any("cannot be seen" in note for note in imported.notes)  # the heads are a guess
    lines = describe(imported)
    assert lines[:3] == [
        "layout: MAE",
        "network: vit_base_patch16_224 (patch_size=16, embed_dim=64, depth=2, num_heads=1), 64 px",
        f"weights: {len(state)} of {len(state)} of the network",
    ]
    assert lines[3].startswith("left out: decoder_embed (1), decoder_blocks (1), decoder_pos_embed (1)")
    told = read_official(pth(state | extra, tmp_path), heads=4)
    assert told.model_args["num_heads"] == 4 and not told.notes


def test_fine_tuned_mae_and_data_parallel(tmp_path: Path) -> None:
    model = fresh("vit_base_patch16_224", **VIT, global_pool="avg")
    imported = read_official(pth({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path))
    assert imported.layout == "MAE or FastMIM (fine-tuned)" and imported.model_args["global_pool"] == "avg"
    back(imported, model, 64)


def test_localmim(tmp_path: Path) -> None:
    model = fresh("vit_base_patch16_224", **VIT)
    state = {re.sub(r"^norm\.", "norm.3.", key): value for key, value in model.state_dict().items()}
    state |= {
        f"norm.{scale}.{kind}": torch.full((64,), float(scale)) for scale in range(3) for kind in ("weight", "bias")
    }
    state |= {f"decoder.{scale}.blocks.0.norm1.weight": torch.ones(8) for scale in range(4)}
    state |= {"hog_enc.0.conv.weight": torch.zeros(2, 1, 3, 3)}
    imported = read_official(pth(state, tmp_path))
    assert imported.layout == "LocalMIM" and "norm.2.bias" in imported.unused and len(imported.unused) == 10
    back(imported, model, 64)


@pytest.mark.parametrize("separate", [False, True])
def test_maskfeat(tmp_path: Path, separate: bool) -> None:
    """pySlowFast keeps q, k and v apart or together, and has no last norm in pre-training."""
    model = fresh("vit_base_patch16_224", **VIT)
    stock = model.state_dict()
    state = {key: value for key, value in stock.items() if not key.startswith(("norm.", "head."))}
    if separate:
        for key in [key for key in state if ".qkv." in key]:
            whole = state.pop(key)
            for row, part in enumerate("qkv"):
                state[key.replace("qkv", part)] = whole[64 * row : 64 * (row + 1)].clone()
        places = state.pop("pos_embed")
        state |= {"pos_embed_class": places[:, :1].clone(), "pos_embed_spatial": places[:, 1:].clone()}
    extra = {"mask_token": torch.zeros(1, 1, 64), "pred_head.projections.0.weight": torch.zeros(108, 64)}
    imported = read_official(pth(state | extra, tmp_path, "model_state"))
    assert imported.layout == "MaskFeat" and imported.missing == ("norm.weight", "norm.bias")
    assert all(torch.equal(value, stock[key]) for key, value in imported.weights.items())
    assert len(imported.weights) == len(stock) - 4
    pooled = {"blocks.0.attn.pool_q.weight": torch.zeros(64, 1, 3, 3, 3)}
    with pytest.raises(UserError, match="only its plain ViT"):
        read_official(pth(state | extra | pooled, tmp_path, "model_state"))


@pytest.mark.parametrize("shared", [False, True])
def test_simmim_vit_is_beit(tmp_path: Path, shared: bool) -> None:
    args = {**VIT, "use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared, "global_pool": "token"}
    model = fresh("beit_base_patch16_224", **args)
    extra = {"decoder.0.weight": torch.zeros(768, 64, 1, 1), "encoder.mask_token": torch.zeros(1, 1, 64)}
    state = {f"encoder.{key}": value for key, value in model.state_dict().items()}
    table = "rel_pos_bias" if shared else "blocks.0.attn"
    extra[f"encoder.{table}.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    imported = read_official(pth(state | extra, tmp_path))
    assert imported.layout == "SimMIM" and set(imported.unused) == {"decoder.0.weight", "mask_token"}
    back(imported, model, 64)
    with pytest.raises(UserError, match="heads: 2 given, but its position biases are of 1"):
        read_official(tmp_path / "one.pth", heads=2)


def swin_by_its_authors(state: State) -> State:
    """Merging at the end of a stage; the buffers that its authors save."""
    theirs = {}
    for key, value in state.items():
        key = key.replace("head.fc.", "head.")
        for stage in range(1, 4):
            if key.startswith(f"layers.{stage}.downsample"):
                key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
                break
        theirs[key] = value
    return theirs | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.int64)}


@pytest.mark.parametrize("encoder", [False, True])
def test_swin(tmp_path: Path, encoder: bool) -> None:
    model = fresh("swin_tiny_patch4_window7_224", **SWIN)
    state = swin_by_its_authors(model.state_dict())
    if encoder:
        state = {f"encoder.{key}": value for key, value in state.items()}
        state |= {"decoder.0.weight": torch.zeros(192, 64, 1, 1), "encoder.mask_token": torch.zeros(1, 1, 32)}
    imported = read_official(pth(state, tmp_path))
    assert imported.layout == ("SimMIM" if encoder else "Swin") and imported.resolution == 64
    assert "window_size" not in imported.model_args
    back(imported, model, 64)


def test_swin_at_another_size_than_its_windows_tell(tmp_path: Path) -> None:
    """The masks of shifted windows tell how many there are: 16 x 16 windows of 2 x 2 tokens of 4 px."""
    model = fresh("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 128})
    state = swin_by_its_authors(model.state_dict())
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(256, 4, 4)
    imported = read_official(pth(state, tmp_path))
    assert imported.resolution == 128 and imported.model_args["window_size"] == 2
    back(imported, model, 128)


def test_pvt(tmp_path: Path) -> None:
    model = fresh("pvt_v2_b2", **PVT)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("mlp.dwconv", "mlp.dwconv.dwconv")
        key = key.replace("patch_embed.", "patch_embed1.")
        for stage in range(4):
            key = key.replace(f"stages.{stage}.downsample", f"patch_embed{stage + 1}")
            key = key.replace(f"stages.{stage}.blocks", f"block{stage + 1}")
            key = key.replace(f"stages.{stage}.norm", f"norm{stage + 1}")
        state[key] = value
    imported = read_official(pth(state, tmp_path, "state_dict"))
    assert imported.layout == "PVTv2" and imported.resolution is None
    back(imported, model, 64)


@pytest.mark.parametrize("architecture", ["convnext_tiny", "convnextv2_tiny"])
def test_convnext(tmp_path: Path, architecture: str) -> None:
    model = fresh(architecture, **CONVNEXT)
    state = {}
    for key, value in model.state_dict().items():
        if ".grn." in key:
            key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            value = value[None, None, None]
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("blocks.", "")
        for stage in range(1, 4):
            key = key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        state[key] = value
    imported = read_official(pth(state, tmp_path))
    assert imported.layout == "ConvNeXt"
    back(imported, model, 64)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_mmpretrain_vit(tmp_path: Path, pool: str) -> None:
    model = fresh("vit_base_patch16_224", **VIT, global_pool=pool, init_values=0.1)
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("head."):
            state[key.replace("head.", "head.layers.head.")] = value
            continue
        key = re.sub(r"^norm", "ln1", key)
        key = re.sub(r"^fc_norm", "ln2", key)
        key = key.replace("patch_embed.proj", "patch_embed.projection").replace("blocks.", "layers.")
        key = key.replace(".norm1", ".ln1").replace(".norm2", ".ln2")
        key = key.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        key = key.replace("ls1.gamma", "attn.gamma1.weight").replace("ls2.gamma", "ffn.gamma2.weight")
        state[f"backbone.{key}"] = value
    imported = read_official(pth(state | {"neck.mask_token": torch.zeros(1, 1, 8)}, tmp_path, "state_dict"))
    assert imported.layout == "mmpretrain" and imported.unused == ("neck.mask_token",)
    back(imported, model, 64)


def test_mmpretrain_swin_merges_in_the_order_of_unfold(tmp_path: Path) -> None:
    """The order is proved by its own operation: a window of 2 x 2 by unfold, norm and reduction give timm's result."""
    model = fresh("swin_tiny_patch4_window7_224", **SWIN)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("patch_embed.proj", "patch_embed.projection")
        if ".downsample." in key:
            key = key.replace("layers.1.", "stages.0.")
            theirs = torch.empty_like(value)
            for channel in range(32):
                for row in range(2):
                    for column in range(2):
                        # timm: column, row, channel; unfold: channel, row, column
                        theirs[..., channel * 4 + row * 2 + column] = value[..., (column * 2 + row) * 32 + channel]
            value = theirs
        key = re.sub(r"^norm\.", "norm3.", key).replace("layers.", "stages.")
        key = (
            key.replace("attn.", "attn.w_msa.").replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        )
        state[key if key.startswith("head") else f"backbone.{key}"] = value
    merge = model.layers[1].downsample
    tokens = torch.linspace(-1, 1, 32 * 64).sin().reshape(1, 32, 8, 8)
    unfolded = nn.functional.unfold(tokens, 2, stride=2).transpose(1, 2)
    weight, bias = (state[f"backbone.stages.0.downsample.norm.{kind}"] for kind in ("weight", "bias"))
    normed = nn.functional.layer_norm(unfolded, (128,), weight, bias)
    expected = nn.functional.linear(normed, state["backbone.stages.0.downsample.reduction.weight"])
    ours = merge(tokens.permute(0, 2, 3, 1)).flatten(1, 2)
    assert torch.allclose(expected, ours, atol=1e-5)
    imported = read_official(pth(state, tmp_path, "state_dict"))
    assert imported.layout == "mmpretrain"
    back(imported, model, 64)


@pytest.mark.parametrize(
    ("architecture", "args", "side"),
    [
        ("vit_base_patch16_224", {**VIT, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}, 64),
        ("vit_base_patch16_224", {**VIT, "class_token": False, "global_pool": "avg", "qkv_bias": False}, 64),
        ("vit_base_patch16_224", {**VIT, "mlp_ratio": 3, "qk_norm": True}, 64),
        ("deit_base_distilled_patch16_224", VIT, 64),
        ("beit_base_patch16_224", VIT, 64),
        ("swin_tiny_patch4_window7_224", SWIN, 64),
        ("pvt_v2_b2", PVT, 64),
        ("convnext_tiny", CONVNEXT, 64),
    ],
)
def test_timms_own(tmp_path: Path, architecture: str, args: dict[str, Any], side: int) -> None:
    model = fresh(architecture, **args)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "one.safetensors")
    imported = read_official(tmp_path / "one.safetensors")
    assert imported.layout == "timm" and imported.architecture == architecture and not imported.unused
    back(imported, model, side)


def test_timm_by_name(tmp_path: Path) -> None:
    """A network that is not recognised needs its name; a name that does not fit says where."""
    model = fresh("resnet18")
    path = pth(dict(model.state_dict()), tmp_path, "state_dict")
    with pytest.raises(UserError, match=r"unknown layout \(its keys begin with conv1.weight.*FastMIM.*timm.*--model"):
        read_official(path)
    back(read_official(path, architecture="resnet18"), model, 64)
    with pytest.raises(UserError, match=r"layer1.0.conv1.weight is \(64, 64, 3, 3\), but \(64, 64, 1, 1\) in resnet50"):
        read_official(path, architecture="resnet50")
    with pytest.raises(UserError, match=r"only 0 of .* --model"):
        read_official(path, architecture="vit_small_patch16_224")
    with pytest.raises(UserError, match="timm has no model 'resnet19'"):
        read_official(path, architecture="resnet19")
    half = {key: value for key, value in model.state_dict().items() if not key.startswith("layer4.1.")}
    imported = read_official(pth(half, tmp_path), architecture="resnet18.a1_in1k")
    assert imported.architecture == "resnet18" and len(imported.missing) == 10
    assert "weights: 90 of 100 of the network and a classifier" in describe(imported)
    assert any("keep their initial values" in note for note in imported.notes)


@pytest.mark.parametrize("architecture", ["eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "convnextv2_atto"])
def test_networks_that_only_resemble_others_are_not_guessed(tmp_path: Path, architecture: str) -> None:
    model = fresh(architecture)
    path = pth(dict(model.state_dict()), tmp_path)
    with pytest.raises(UserError, match="--model"):
        read_official(path)
    imported = read_official(path, architecture=architecture)
    assert imported.model_args == {} and not imported.missing and not imported.unused
    assert all(torch.equal(imported.weights[key], value) for key, value in model.state_dict().items())


def test_a_deeper_network_than_named_is_refused(tmp_path: Path) -> None:
    model = fresh("vit_tiny_patch16_224")
    state = dict(model.state_dict())
    state |= {key.replace("blocks.0", "blocks.12"): value for key, value in state.items() if "blocks.0." in key}
    with pytest.raises(UserError, match=r"blocks.12.norm1.weight.* have no place in vit_tiny_patch16_224"):
        read_official(pth(state, tmp_path), architecture="vit_tiny_patch16_224")


def test_timm_hub_folder(tmp_path: Path) -> None:
    model = fresh("vit_small_patch16_224", img_size=96, num_heads=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 5,
        "model_args": {"img_size": 96, "num_heads": 3},
        "pretrained_cfg": {"input_size": [3, 96, 96]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = read_official(tmp_path)
    assert imported.model_args == {"num_heads": 3} and imported.resolution == 96
    back(imported, model, 96)


def test_our_own_export_of_swin(tmp_path: Path) -> None:
    """It says its windows outright; read again, they follow the size, so that the network can go to another."""
    model = fresh("swin_tiny_patch4_window7_224", img_size=128, window_size=4)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    args = {"img_size": 128, "window_size": [[4, 4]] * 4, "in_chans": 3, "global_pool": "avg"}
    config = {"architecture": "swin_tiny_patch4_window7_224", "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 128, 128]}}))
    imported = read_official(tmp_path)
    assert "window_size" not in imported.model_args and imported.resolution == 128
    back(imported, model, 128)


def test_other_channels(tmp_path: Path) -> None:
    model = fresh("vit_base_patch16_224", **VIT, in_chans=5)
    imported = read_official(pth(dict(model.state_dict()), tmp_path))
    assert imported.model_args["in_chans"] == 5 and imported.weights["patch_embed.proj.weight"].shape[1] == 5
