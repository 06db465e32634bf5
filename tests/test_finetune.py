# SPDX-License-Identifier: Apache-2.0
"""From labels and any start to a measured classifier, end to end on real files; and what a user's mistakes get."""

import csv
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_resume import child, digest_of, saved_step, wait_for
from torch import nn

import fastmim
from fastmim.cli import main
from fastmim.config import FinetuneConfig
from fastmim.errors import UserError
from fastmim.recipes import finetune as recipes
from fastmim.run_folder import Run

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": VIT, "resolution": 32, "global_batch": 8, "steps": 60, "lr": 3e-3,
    "log_every": 5, "device": "cpu", "workers": 0, "tensorboard": False, "mixup": 0, "cutmix": 0, "erase": 0,
    "rand_augment": None, "crop_scale": (0.5, 1.0),
}  # fmt: skip
PRETRAIN: dict[str, Any] = {
    "resolution": 32, "decoder_dim": 32, "global_batch": 16, "lr": 1e-3, "epochs": 2, "device": "cpu", "workers": 0,
    "tensorboard": False, "holdout": 0,
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tuned(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fastmim.finetune(str(classes), "scratch", out=tmp_path_factory.mktemp("tuned") / "run", **TINY)


def test_it_learns_and_tells_everything(tuned: Run, classes: Path) -> None:
    result = tuned.read("finetune.json")
    assert result is not None and result["classes"] == ["lying", "upright"]
    assert result["train"] == 32 and result["test"] == 8
    assert result["accuracy"]["top1"] == 100  # upright and lying stripes are easily told apart
    assert result["accuracy"]["low"] < 100 == result["accuracy"]["high"] and result["accuracy"]["majority"] == 50
    assert result["confusion"] == [[4, 0], [0, 4]] and result["mistakes"] == []
    rows = rows_of(tuned.path / "predictions.csv")
    assert len(rows) == 8 and list(rows[0]) == ["path", "label", "predicted", "p_true", "p:lying", "p:upright"]
    for row in rows:
        assert Path(row["path"]).is_file() and Path(row["path"]).parent.name == row["label"] == row["predicted"]
        assert float(row["p:lying"]) + float(row["p:upright"]) == pytest.approx(1, abs=1e-4)
        assert float(row["p_true"]) == float(row[f"p:{row['label']}"])
    assert tuned.task == "finetune" and tuned.transfer.optim.layer_decay == 1
    assert [line["step"] for line in tuned.metrics if line["kind"] == "train"] == list(range(5, 61, 5))
    assert all("accuracy" in line for line in tuned.metrics if line["kind"] == "eval")
    with pytest.raises(UserError, match="is a run of 'fastmim finetune'; a pre-training run is needed here"):
        _ = tuned.config


def test_the_export_answers_as_the_run_does(tuned: Run, classes: Path) -> None:
    network = timm.create_model(f"local-dir:{tuned.exported}", pretrained=True).eval()
    assert network.pretrained_cfg["num_classes"] == 2
    assert json.loads((tuned.exported / "config.json").read_text())["label_names"] == ["lying", "upright"]
    row = rows_of(tuned.path / "predictions.csv")[0]
    pixels = torch.from_numpy(np.array(Image.open(row["path"]).resize((32, 32), Image.Resampling.BICUBIC)))
    images = pixels.permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    answer = network((images - mean) / std).softmax(1)[0].detach()
    assert float(answer[0]) == pytest.approx(float(row["p:lying"]), abs=0.05)  # resized by another library here
    assert timm.create_model(f"local-dir:{tuned.exported}", pretrained=True, num_classes=0)(images).shape == (1, 32)


def test_predict_says_what_the_test_said(tuned: Run, classes: Path, tmp_path: Path) -> None:
    found = fastmim.predict(tuned, str(classes), tmp_path / "p.csv", device="cpu", workers=0)
    rows = {row["path"]: row for row in rows_of(found.path)}
    assert found.images == len(rows) == 40 and sum(found.counts.values()) == 40 and found.bad == {}
    for row in rows_of(tuned.path / "predictions.csv"):
        again = rows[row["path"]]
        assert again["predicted"] == row["predicted"]
        assert float(again["p:lying"]) == pytest.approx(float(row["p:lying"]), abs=1e-5)


@pytest.mark.parametrize(
    ("model", "args", "side", "larger"),
    [
        ("vit_tiny_patch16_224", VIT, 32, 48),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}, 64, 96),
        ("pvt_v2_b0", {"depths": [1, 1, 1, 1]}, 64, 96),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}, 64, 96),
        ("resnet18", {}, 64, 96),
    ],
)
def test_from_a_pretrained_run_at_another_size(
    model: str, args: dict[str, Any], side: int, larger: int, classes: Path, tmp_path: Path
) -> None:
    words = {**PRETRAIN, "model": model, "model_args": args, "resolution": side, "block": 32 if side == 64 else None}
    before = fastmim.pretrain(data=str(classes), out=tmp_path / "pre", **words)
    words = {**TINY, "resolution": larger, "steps": 3, "model": None, "model_args": {}}
    if "vit" in model or model == "pvt_v2_b0":
        words["drop_path"] = 0.1
    tuned = fastmim.finetune(str(classes), before, out=tmp_path / "run", **words)
    config = tuned.transfer
    assert config.method.model == model and config.optim.layer_decay == 0.75
    if "swin" in model:
        assert config.method.model_args["window_size"][0] == [larger // 32, larger // 32]
    assert tuned.read("finetune.json")["test"] == 8  # type: ignore[index]
    # What was learnt before is where it began: the first convolution has hardly moved in three steps.
    one, other = (safetensors.torch.load_file(run.exported / "model.safetensors") for run in (before, tuned))
    fresh = timm.create_model(model, num_classes=0, **{**args, **({"img_size": side} if "vit" in model else {})})
    first = fresh.pretrained_cfg["first_conv"] + ".weight"
    assert (one[first] - other[first]).abs().max() < 0.05 < (one[first] - fresh.state_dict()[first]).abs().max()


def test_a_tuned_run_is_a_start_too(tuned: Run, classes: Path, tmp_path: Path) -> None:
    again = fastmim.finetune(str(classes), tuned, out=tmp_path / "run", **{**TINY, "steps": 2, "model": None})
    assert again.transfer.method.model == "vit_tiny_patch16_224"
    probe = fastmim.probe(tuned, str(classes), device="cpu", workers=0)
    assert probe["summary"]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_killed_again_and_again_it_ends_with_the_same_bits(ema: float | None, classes: Path, tmp_path: Path) -> None:
    words = {
        **TINY, "steps": 20, "checkpoint_every": 1e-6, "log_every": 1, "mixup": 0.8, "cutmix": 1.0, "erase": 0.5,
        "rand_augment": "rand-m9-mstd0.5-inc1", "ema": ema, "drop_path": 0.1, "balance": "sampler", "micro_batch": 4,
    }  # fmt: skip

    def start(out: Path, workers: int = 0) -> Run:
        return fastmim.finetune(str(classes), "scratch", out=out, **{**words, "workers": workers})

    whole = start(tmp_path / "whole")
    out, rng, kills = tmp_path / "run", random.Random(3), 0
    while saved_step(out) < 20:
        before = saved_step(out)
        begun = (out / "config.yaml").exists()
        number = child(lambda: fastmim.resume(out, changes={"workers": 2})) if begun else child(lambda: start(out, 2))
        goal, done = before + rng.randint(2, 7), 0
        while saved_step(out) < min(goal, 20) and not done:
            done = os.waitpid(number, 1)[0]
            time.sleep(0.002)
        if not done:
            os.kill(number, 9)
            wait_for(number)
            kills += 1
    assert kills >= 3
    last = fastmim.resume(out, changes={"workers": 0})
    assert last.status["state"] == "finished"
    assert digest_of(last.path, 20) == digest_of(whole.path, 20)
    assert last.read("finetune.json")["accuracy"] == whole.read("finetune.json")["accuracy"]  # type: ignore[index]
    assert [line["step"] for line in last.metrics if line["kind"] == "train"] == list(range(1, 21))


def test_folds_test_every_image_once(classes: Path, tmp_path: Path) -> None:
    words = {**TINY, "steps": 2, "folds": 4, "out": str(tmp_path / "folds")}
    folder, summary = fastmim.cross_validate(str(classes), "scratch", **words)
    assert len(summary["folds"]) == 4 and json.loads((folder / "folds.json").read_text()) == summary
    tested = [row["path"] for fold in range(4) for row in rows_of(folder / f"fold-{fold}" / "predictions.csv")]
    assert len(tested) == len(set(tested)) == 40


def test_distillation_follows_the_teacher(tuned: Run, classes: Path, tmp_path: Path) -> None:
    words = {**TINY, "model_args": {**VIT, "depth": 1}, "steps": 80, "resolution": 24}
    student = fastmim.distill(str(classes), tuned, out=tmp_path / "run", **words)
    result = student.read("finetune.json")
    assert student.task == "distill" and result is not None and result["accuracy"]["top1"] >= 75
    assert "teacher" not in str(sorted(safetensors.torch.load_file(student.exported / "model.safetensors")))
    found = fastmim.predict(student, str(classes), tmp_path / "p.csv", device="cpu", workers=0)
    assert found.images == 40


def test_shuffled_labels_teach_nothing(classes: Path, tmp_path: Path) -> None:
    words = {**TINY, "steps": 5, "shuffle_labels": True}
    run = fastmim.finetune(str(classes), "scratch", out=tmp_path / "run", **words)
    assert "training labels shuffled" in run.read("finetune.json")["split"]  # type: ignore[index]


def lists(folder: Path, classes: Path, change: str = "") -> Path:
    """A list with labels and a split; ``change`` spoils it."""
    rows = [["path", "label", "split"]]
    for name in ("lying", "upright"):
        rows += [[str(classes / name / f"{i}.jpg"), name, "train" if i < 12 else "test"] for i in range(20)]
    if change == "missing":
        rows.append([str(classes / "lying" / "99.jpg"), "lying", "train"])
    elif change == "twice":
        rows.append([rows[1][0], "upright", "train"])
    elif change == "label":
        rows[3][1] = ""
    elif change == "column":
        rows[0][1] = "nothing"
    elif change == "split":
        rows[2][2] = "training?"
    elif change == "absent":
        rows = [row for row in rows if row[1:] != ["lying", "test"]]
    elif change == "unknown":
        rows[-1][1] = "other"
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_from_a_list_with_labels(classes: Path, tmp_path: Path) -> None:
    run = fastmim.finetune(str(lists(tmp_path, classes)), "scratch", out=tmp_path / "run", **{**TINY, "steps": 2})
    result = run.read("finetune.json")
    assert result is not None and (result["train"], result["test"]) == (24, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "line 42: '/"),
        ("twice", "has two labels or splits"),
        ("label", "line 4: no label; wanted a label"),
        ("column", "has no column of labels: found 'path', 'nothing', 'split'"),
        ("split", "line 3: split 'training?'"),
        ("absent", "class 'lying' has no image in test"),
        ("unknown", "class 'other' of test is not in train; training knows 'lying', 'upright'"),
    ],
)
def test_bad_lists_are_refused_in_one_line(
    change: str, says: str, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lists(tmp_path, classes, change)
    code = main(["finetune", str(path), "scratch", "--model", "resnet18", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scratch"], "start = scratch needs --model"),
        (["nowhere"], "timm has no model 'nowhere'"),
        (["scratch", "--model", "vit_tiny_patch16_224", "--resolution", "100"], "nearest that work: 96, 112"),
        (["scratch", "--model", "resnet18", "--labels", "half"], "should be a share as 10%, or a number as 5/class"),
        (["scratch", "--model", "resnet18", "--labels", "30/class"], "class 'lying' has only 16 training images"),
        (["scratch", "--model", "resnet18", "--rand-augment", "strong"], "is not in timm's words"),
        (["scratch", "--model", "resnet18", "--pool", "token"], "pool = 'token' is for plain ViTs"),
        (["scratch", "--model", "resnet18", "--folds", "30"], "needs at least 30"),
        (["scratch", "--model", "resnet18", "--fold", "1"], "fold 1 is not one of folds: None"),
        (["scratch", "--model", "resnet18", "--crop-on", "device", "--cache", "ram"], "goes with --rand-augment none"),
        (["scratch", "--model", "resnet18", "--smothing", "0"], "nearest: smoothing"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    words: list[str], says: str, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["finetune", str(classes), *words, "--out", str(tmp_path / "run"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_one_class_and_class_without_test_images(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "lying").symlink_to(classes / "lying")
    with pytest.raises(UserError, match="needs at least two classes to learn from, but has only 'lying'"):
        fastmim.finetune(str(tmp_path / "one"), "scratch", **TINY)
    for part, names in (("train", ["lying", "upright"]), ("test", ["lying"])):
        (tmp_path / "two" / part).mkdir(parents=True)
        for name in names:
            shutil.copytree(classes / name, tmp_path / "two" / part / name)
    with pytest.raises(UserError, match="class 'upright' has no image in test"):
        fastmim.finetune(str(tmp_path / "two"), "scratch", **TINY)


def test_changed_labels_stop_a_resume(classes: Path, tmp_path: Path) -> None:
    path = lists(tmp_path, classes)
    run = fastmim.finetune(str(path), "scratch", out=tmp_path / "run", **{**TINY, "steps": 2})
    (run.path / "report.html").unlink()
    path.write_text(path.read_text().replace("/0.jpg,lying", "/0.jpg,upright", 1))
    with pytest.raises(UserError, match="have changed since"):
        fastmim.resume(run)


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_tell_what_they_reproduce(name: str) -> None:
    config, text = recipes.load(name), getattr(recipes, name).__doc__
    assert name == "default" or (config.method.recipe == name and "Command:" in text and "Expected cost:" in text)
    assert isinstance(config, FinetuneConfig)


def test_help_and_dry_run(classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scratch", "--model", "resnet18", "--resolution", "32", "--dry-run", "--device", "cpu"]
    assert main(["finetune", str(classes), *words]) == 0
    said = capsys.readouterr().out
    assert "32 to learn from, 8 for the result (20% of each class held out, seed 0)" in said and "resnet18" in said
    assert main(["finetune", "--recipe", "swin_base", "--print-config"]) == 0
    assert "layer_decay: 0.8" in capsys.readouterr().out


def test_every_parameter_learns_once(classes: Path) -> None:
    from fastmim.tasks.classify import Classify

    network: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT, img_size=32)
    task = Classify(
        network, FinetuneConfig().method, torch.tensor([0, 1]), 2, mean=(0.5,) * 3, std=(0.5,) * 3, layer_decay=0.5
    )
    groups = task.param_groups(0.05)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in network.parameters())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    names = dict(network.named_parameters())
    # Head 1, then one factor for each block and one for the embedding, by hand.
    assert scale[id(names["head.weight"])] == 1
    assert scale[id(names["blocks.1.attn.qkv.weight"])] == 0.5
    assert scale[id(names["blocks.0.attn.qkv.weight"])] == 0.25
    assert scale[id(names["patch_embed.proj.weight"])] == 0.125
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(names["blocks.0.attn.qkv.weight"])] == 0.05
    assert decay[id(names["pos_embed"])] == decay[id(names["norm.bias"])] == 0
