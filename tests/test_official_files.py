# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, hostile or no checkpoints: one line each, and nothing in them runs."""

import argparse
import json
import os
import struct
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fastmim.backbones.official import read_official
from fastmim.errors import UserError

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}


def state() -> dict[str, Tensor]:
    return dict(timm.create_model("vit_base_patch16_224", num_classes=0, **TINY).state_dict())


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_official(path)
    assert "\n" not in str(caught.value)


class Calls:
    """Says of itself, as a pickle, that it is made by calling something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_by = function, arguments

    def __reduce__(self) -> Any:
        return self.made_by


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["system", "exec", "nested", "in_args", "ordered", "import"])
def test_hostile_pickles_do_not_run(tmp_path: Path, kind: str, zipped: bool) -> None:
    sentinel = tmp_path / "ran"
    command, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    content: dict[str, Any] = {
        "system": {"model": {**state(), "bad": Calls(os.system, command)}},
        "exec": {"model": state(), "epoch": Calls(exec, code)},
        "nested": {"model": state(), "x": [{"y": (Calls(eval, code),)}]},
        "in_args": {"model": state(), "args": argparse.Namespace(lr=Calls(os.system, command))},
        "ordered": {"model": OrderedDict(a=Calls(os.system, command))},
        "import": {"model": state(), "x": Calls(__import__, "this")},
    }[kind]
    path = tmp_path / "bad.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"which could run code, and is not read|no checkpoint of PyTorch")
    assert not sentinel.exists() and "this" not in sys.modules
    # The test is of something: the same file does run where it is trusted.
    if kind == "system" and zipped:
        torch.load(path, weights_only=False)
        assert sentinel.exists()


def test_what_training_code_saves_beside_its_weights(tmp_path: Path) -> None:
    """Arguments, numbers of NumPy, and the configuration of yacs, whose class need not be installed."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):  # pickled by its name: it stands for the class of a package that is not here
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    sys.modules["yacs"], sys.modules["yacs.config"] = types.ModuleType("yacs"), module
    config = CfgNode(MODEL=CfgNode(TYPE="vit"))
    config.__dict__["__frozen__"] = True
    rest = {"config": config, "best": np.float64(83.6), "step": np.int64(3), "args": argparse.Namespace(lr=1e-3)}
    try:
        torch.save({"model": state(), **rest}, tmp_path / "one.pth")
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    assert read_official(tmp_path / "one.pth").resolution == 32


def test_damaged_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"model": state()}, whole)
    content = whole.read_bytes()
    for number, share in enumerate((0.0, 0.1, 0.5, 0.99)):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content[: int(share * len(content))])
        refused(path, "no checkpoint of PyTorch, or a damaged one")
    tensors = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(state(), tensors)
    content = tensors.read_bytes()
    for number, part in enumerate((b"", content[:100], content[:-1], struct.pack("<Q", 1 << 60) + content[8:])):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(part)
        refused(path, "no intact safetensors file")


def test_no_checkpoints(tmp_path: Path) -> None:
    text = tmp_path / "text.pth"
    text.write_text("hello, " * 100)
    refused(text, "no checkpoint of PyTorch")
    refused(tmp_path / "nowhere.pth", "cannot be read")
    refused(tmp_path, "nor a folder with model.safetensors or pytorch_model.bin")
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "neither a checkpoint")
    for content, match in (
        ([1, 2], "holds list, not the weights"),
        ({"model": {}}, "holds no weights"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights .its keys are epoch, lr"),
        (
            {"model": {"a.b": torch.zeros(3)}},
            "unknown layout .its keys begin with a.b.*known: Hugging Face, mmpretrain",
        ),
    ):
        torch.save(content, tmp_path / "one.pth")
        refused(tmp_path / "one.pth", match)
    with tarfile.open(tmp_path / "tar.pth", "w") as tar:
        tar.add(text, "storages")
    refused(tmp_path / "tar.pth", "no checkpoint of PyTorch")


def test_zip_bombs(tmp_path: Path) -> None:
    """torch.save does not compress; an archive that does could say a little and hold a lot."""
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 1 << 15
    refused(bomb, "damaged or hostile")


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    torch.save({"model": state() | {"pos_embed": torch.zeros(1).expand(1 << 40)}}, tmp_path / "one.pth")
    refused(tmp_path / "one.pth", "its weights would fill")
    large = {"x": torch.zeros(1 << 20), "pos_embed": torch.zeros(1).expand(1 << 20)}
    torch.save({"model": state() | large}, tmp_path / "one.pth")
    refused(tmp_path / "one.pth", r"pos_embed of shape .* is larger than what is stored")


def test_many_names_for_one_tensor(tmp_path: Path) -> None:
    one = torch.zeros(1 << 18)
    torch.save({"model": state() | {f"x.{number}": one for number in range(1000)}}, tmp_path / "one.pth")
    refused(tmp_path / "one.pth", "its weights would fill")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("patch_embed.proj.weight", torch.zeros(64, 3, 2, 16, 16), "shapes that are not read"),  # video
        ("pos_embed", torch.zeros(1, 7, 64), "unknown layout"),  # no square
        ("blocks.1000000000.norm1.weight", torch.zeros(64), "1000000001 blocks"),
        ("blocks.0.mlp.fc1.weight", torch.zeros(0, 64), r"fc1.weight is \(0, 64\), but \(64, 64\)"),
    ],
)
def test_strange_shapes(tmp_path: Path, key: str, value: Tensor, match: str) -> None:
    torch.save({"model": state() | {key: value}}, tmp_path / "one.pth")
    refused(tmp_path / "one.pth", match)


def test_configurations(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "model.safetensors")
    for content, match in (
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no configuration"),
        (" " * (1 << 20) + "{}", "larger than 1 MB"),
        (json.dumps({"architecture": "os.system"}), "timm has no model"),
        (json.dumps({"architecture": "vit_base_patch16_224", "model_args": {"embed_dim": "x"}}), "cannot be built"),
        (
            json.dumps({"architecture": "vit_base_patch16_224", "pretrained_cfg": {"input_size": "32"}}),
            r"is \(64,\), but \(768,\)",
        ),
    ):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, match)


def test_wrappers(tmp_path: Path) -> None:
    """Which one is taken is said; averaged weights are mentioned."""
    one = state()
    other = {key: value + 1 for key, value in one.items()}
    path = tmp_path / "one.pth"
    torch.save({"model": one, "model_ema": other}, path)
    imported = read_official(path)
    assert torch.equal(imported.weights["cls_token"], one["cls_token"])
    assert any("model_ema" in note for note in imported.notes)
    torch.save({"student": one, "teacher": {f"module.backbone.{key}": value for key, value in other.items()}}, path)
    imported = read_official(path)
    assert torch.equal(imported.weights["cls_token"], other["cls_token"])
    assert any("'teacher'" in note for note in imported.notes)
