# SPDX-License-Identifier: Apache-2.0
"""The main job, end to end, on real files: what a user gets, and what a user's mistakes get."""

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import draw
from PIL import Image
from torch import Tensor, nn

import fastmim
from fastmim import runs
from fastmim.backbones.adapter import build
from fastmim.cli import main
from fastmim.config import Config, update
from fastmim.data.sources.scan import scan
from fastmim.errors import UserError
from fastmim.run_images import split
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.engine import NotLearningError

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resolution": 32, "decoder_dim": 32, "global_batch": 16, "lr": 1e-3, "epochs": 4, "log_every": 1, "device": "cpu",
    "workers": 0, "tensorboard": False,
}  # fmt: skip
FLAGS = [f"{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in TINY.items()]


def test_from_a_folder_to_weights_and_a_report(classes: Path, tmp_path: Path) -> None:
    words = {**TINY, "tensorboard": True, "holdout": 0.2, "epochs": 30, "lr": 3e-3}
    run = fastmim.pretrain(data=str(classes), out=tmp_path / "run", eval_data=str(classes), **words)
    there = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "environment.json", "data.json", "status.json", "metrics.jsonl", "probe.json", "report.html",
        "export/timm/config.json", "export/timm/model.safetensors", "export/timm/README.md",
        "images/reconstruction.safetensors", "images/neighbours.safetensors",
    } <= there  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in there)
    losses = [line["loss"] for line in run.metrics if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    looks = [line for line in run.metrics if line["kind"] == "eval"]
    assert looks[0]["step"] == 0 and looks[-1]["step"] == run.status["steps"]
    assert all({"val_loss", "effective_rank", "knn", "linear"} <= set(line) for line in looks)
    assert looks[-1]["val_loss"] < looks[0]["val_loss"]
    assert run.config.optim.micro_batch == 16 and run.config.method.block == 8
    net = run.load(num_classes=5)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    found, _ = Checkpoints(run.path / "checkpoints").latest()
    assert found is not None
    stored = found.tensors["model"]["mim.backbone.backbone.model.blocks.0.attn.qkv.weight"]
    assert torch.equal(net.blocks[0].attn.qkv.weight, stored)


@pytest.mark.parametrize("target", ["hog", "pixels", "pixels_norm"])
@pytest.mark.parametrize("hide", ["pixels", "tokens", "drop"])
@pytest.mark.parametrize("decoder", ["linear", "transformer"])
def test_every_target_with_every_way_of_hiding(
    target: str, hide: str, decoder: str, photos: Path, tmp_path: Path
) -> None:
    words = {**TINY, "target": target, "hide": hide, "decoder": decoder, "loss": "l1" if decoder == "linear" else "l2"}
    if decoder == "linear" and hide == "drop":
        with pytest.raises(UserError, match="linear decoder sees nothing of blocks that hide=drop leaves out"):
            fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
        return
    run = fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
    losses = [line["loss"] for line in run.metrics if line["kind"] == "train"]
    assert run.status["state"] == "finished" and np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("model", "arguments", "size"),
    [("resnet10t", {}, 64), ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}, 64)],
)
def test_networks_of_other_families(
    model: str, arguments: dict[str, Any], size: int, photos: Path, tmp_path: Path
) -> None:
    words = {**TINY, "model": model, "model_args": arguments, "resolution": size, "epochs": 1}
    run = fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
    assert run.config.method.block == 32 and run.config.method.decoder_depth == 4
    features = run.load()(torch.zeros(1, 3, size, size))
    assert features.ndim == 2 and features.isfinite().all()


class OwnNetwork(nn.Module):
    """Somebody's own: the three members, and nothing of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.body = nn.Conv2d(16, 32, 2, stride=2)
        self.stages = (fastmim.Stage(16, 4), fastmim.Stage(32, 8))

    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.stem(images)
        return [shallow, self.body(shallow.relu())]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}


def test_a_module_of_ones_own(photos: Path, tmp_path: Path) -> None:
    words = {name: value for name, value in TINY.items() if name not in ("model", "model_args")}
    network = OwnNetwork()
    before = network.body.weight.detach().clone()
    run = fastmim.pretrain(data=str(photos), model=network, out=tmp_path / "run", **words)
    assert not torch.equal(network.body.weight, before)
    from safetensors.torch import load_file

    stored = load_file(run.exported / "model.safetensors")
    assert torch.equal(stored["body.weight"], network.body.weight)
    with pytest.raises(UserError, match="no export that timm can load"):
        run.load()
    with pytest.raises(UserError, match=r"stages|weights"):
        fastmim.pretrain(data=str(photos), model=nn.Conv2d(3, 8, 3), out=tmp_path / "other", **words)


def test_options_that_a_module_of_ones_own_cannot_follow_are_refused(photos: Path, tmp_path: Path) -> None:
    words = {name: value for name, value in TINY.items() if name not in ("model", "model_args")}
    for scales in ("localmim", "0,1"):
        with pytest.raises(UserError, match=r"scales.*--scales stages"):
            fastmim.pretrain(data=str(photos), model=OwnNetwork(), out=tmp_path / scales, **words, scales=scales)


def test_a_network_that_was_built_beforehand_goes_to_the_run_s_sizes(photos: Path, tmp_path: Path) -> None:
    words = {name: value for name, value in TINY.items() if name not in ("model", "model_args", "resolution")}

    def network() -> nn.Module:
        return build("vit_tiny_patch16_224", 32, model_args={"patch_size": 8, "embed_dim": 48, "depth": 2})

    for number, more in enumerate(
        [
            {"phases": "48:0.5,32:0.5"},
            {"phases": "32:0.5,48:0.5"},
            {"resolution": 32, "hide": "compact", "masking": "grid"},
        ]
    ):
        run = fastmim.pretrain(data=str(photos), model=network(), out=tmp_path / str(number), **{**words, **more})
        assert runs.export(run, model=network(), out=str(tmp_path / f"exported-{number}"))[1] < 1e-5
    with pytest.raises(UserError, match="cannot take images of 36 px"):
        fastmim.pretrain(
            data=str(photos), model=network(), out=tmp_path / "refused", **words, phases="32:0.5,36:0.5", block=4
        )


def test_a_module_of_ones_own_may_have_a_resolution(photos: Path, tmp_path: Path) -> None:
    words = {name: value for name, value in TINY.items() if name not in ("model", "model_args")}
    network = OwnNetwork()
    network.resolution = 99  # type: ignore[assignment]
    fastmim.pretrain(data=str(photos), model=network, out=tmp_path / "run", **words)


def test_bad_images_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(30):
        Image.fromarray(draw(index)).save(images / f"{index:02d}.jpg")
    whole = (images / "00.jpg").read_bytes()
    (images / "empty.jpg").write_bytes(b"")
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("no image")
    Image.fromarray(draw(40)).convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(draw(41)[..., 0].astype(np.uint16) * 257).save(images / "deep.png")
    Image.fromarray(draw(42)).save(images / "moving.gif", save_all=True, append_images=[Image.fromarray(draw(43))])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(draw(44)).save(images / "turned.jpg", exif=turned)
    run = fastmim.pretrain(data=str(images), out=tmp_path / "run", max_bad=0.2, holdout=0.0, **TINY)
    with (run.path / "bad_images.csv").open(newline="") as file:
        bad = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert bad == {"empty.jpg": "empty", "cut.jpg": "truncated", "text.png": "not an image"}
    assert (
        "bad_images.csv" in (run.path / "report.html").read_text()
        or "empty.jpg" in (run.path / "report.html").read_text()
    )
    with pytest.raises(UserError, match=r"of 37 images \(.*cannot be read; first"):
        fastmim.pretrain(data=str(images), out=tmp_path / "strict", max_bad=0.01, holdout=0.0, **TINY)


def test_a_held_out_image_that_cannot_be_read_costs_only_its_loss(photos: Path, tmp_path: Path) -> None:
    images = shutil.copytree(photos, tmp_path / "images")
    config = update(Config(), {**TINY, "data": str(images)})
    table = scan([str(images)])
    _, held_out = split(config, table)
    assert len(held_out) == 1
    Path(table.path(held_out[0])).write_bytes(b"")
    run = fastmim.pretrain(config, out=tmp_path / "run")
    assert run.status["state"] == "finished" and {line["kind"] for line in run.metrics} == {"train"}


def run_words(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Exit code 2 and exactly one line; returns it."""
    assert main(["pretrain", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastmim: ")
    return lines[0]


def test_mistakes_get_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'run'}"
    line = run_words(capsys, str(photos.parent / "photo"), out, *FLAGS)
    assert "photo" in line and photos.name in line  # the nearest name
    (tmp_path / "empty").mkdir()
    assert "empty" in run_words(capsys, str(tmp_path / "empty"), out, *FLAGS)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    assert ".txt" in run_words(capsys, str(tmp_path / "texts"), out, *FLAGS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"")
    assert "a.jpg" in run_words(capsys, str(tmp_path / "broken"), out, *FLAGS)
    assert "vit_small_patch16_224" in run_words(capsys, str(photos), out, "model=vit_smal_patch16_224")
    line = run_words(capsys, str(photos), out, *FLAGS, "resolution=100")
    assert "96" in line and "104" in line
    assert "mask_ratio" in run_words(capsys, str(photos), out, *FLAGS, "block=16", "mask_ratio=0.95")
    assert "micro_batch" in run_words(capsys, str(photos), out, *FLAGS, "micro_batch=5")
    assert "cuda" in run_words(capsys, str(photos), out, *FLAGS, "device=cuda:7")
    (tmp_path / "file").write_text("")
    assert "is a file" in run_words(capsys, str(photos), f"out={tmp_path / 'file'}", *FLAGS)
    line = run_words(capsys, str(photos), f"out={tmp_path / 'texts'}", *FLAGS)
    assert "not empty" in line
    assert "holds no run" in run_words(capsys, str(photos), f"out={tmp_path / 'texts'}", "overwrite=true", *FLAGS)
    assert (tmp_path / "texts" / "a.txt").read_text() == "hello"


def test_a_second_run_needs_a_word_to_replace_the_first(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(photos), f"out={tmp_path / 'run'}", *FLAGS, "epochs=1"]
    assert main(["pretrain", *words]) == 0
    capsys.readouterr()
    assert "fastmim resume" in run_words(capsys, *words)
    assert main(["pretrain", *words, "--overwrite"]) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(photos: Path, tmp_path: Path) -> None:
    words = {**TINY, "lr": 1e30, "warmup": 0.0, "epochs": 20, "checkpoint_every": 1e-6}
    with pytest.raises(NotLearningError, match="not finite at step"):
        fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
    assert fastmim.Run(tmp_path / "run").status["state"] == "failed"
    found, damage = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert damage == []
    assert found is None or all(value.isfinite().all() for value in found.tensors["model"].values())


def test_the_same_seed_gives_the_same_start_and_another_does_not(photos: Path, tmp_path: Path) -> None:
    def first_loss(name: str, seed: int) -> float:
        words = {**TINY, "epochs": 0.5, "seed": seed, "holdout": 0.0}
        return fastmim.pretrain(data=str(photos), out=tmp_path / name, **words).metrics[-1]["loss"]

    assert first_loss("a", 1) == first_loss("b", 1) != first_loss("c", 2)


def test_an_export_can_be_the_start_of_another_run(photos: Path, tmp_path: Path) -> None:
    first = fastmim.pretrain(data=str(photos), out=tmp_path / "a", **TINY)
    words = {name: value for name, value in TINY.items() if name != "model_args"} | {
        "model": f"local-dir:{first.exported}"
    }
    second = fastmim.pretrain(data=str(photos), out=tmp_path / "b", **words)
    losses = [[line["loss"] for line in run.metrics if line["kind"] == "train"] for run in (first, second)]
    assert losses[1][-1] < losses[0][-1]
    assert isinstance(second.load(), type(timm.create_model("vit_tiny_patch16_224", num_classes=0)))
    folder, difference = runs.export(second, out=str(tmp_path / "again"))
    assert folder == tmp_path / "again" and difference < 1e-5


def test_more_bad_images_can_be_allowed_when_going_on(photos: Path, tmp_path: Path) -> None:
    images = shutil.copytree(photos, tmp_path / "images")
    for name in ("003.jpg", "004.jpg", "005.jpg"):
        (images / name).write_bytes(b"")
    words = {**TINY, "data": str(images), "out": tmp_path / "run", "holdout": 0.0}
    with pytest.raises(UserError, match=r"cannot be read; .* or allow more with --max-bad"):
        fastmim.pretrain(**words, max_bad=0.01)
    run = fastmim.resume(tmp_path / "run", changes={"max_bad": 0.2})
    assert run.status["state"] == "finished" and run.config.data.max_bad == 0.2


def test_training_on_many_channels_of_raw_values(tmp_path: Path) -> None:
    """From GeoTIFFs of five bands of 16 bits to an export that timm builds for five channels."""
    rasterio = pytest.importorskip("rasterio")
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these pictures lie nowhere on Earth
        for index in range(16):
            bands = rng.normal(3000, 500, (5, 40, 40)) * np.arange(1, 6)[:, None, None]
            shape = {"height": 40, "width": 40, "count": 5, "dtype": "uint16"}
            with rasterio.open(folder / f"{index}.tif", "w", driver="GTiff", **shape) as file:
                file.write(bands.clip(0, 65535).astype(np.uint16))
    words = {**TINY, "channels": 5, "values": "raw"}
    for target in ("hog", "pixels"):
        run = fastmim.pretrain(data=str(folder), out=tmp_path / target, target=target, **words)
        assert run.status["state"] == "finished" and run.config.data.mean is not None
        assert run.config.data.mean[4] == pytest.approx(15000, rel=0.1)
        assert run.load()(torch.zeros(1, 5, 32, 32)).shape[0] == 1
        assert (run.path / "report.html").exists()
    fastmim.prepare_images(
        [str(folder)], tmp_path / "set", resolution=32, channels=5, values="raw", workers=0, quiet=True
    )
    again = fastmim.pretrain(data=str(tmp_path / "set"), out=tmp_path / "prepared", **words)
    assert again.status["state"] == "finished"
    with pytest.raises(UserError, match="train on them with --channels 5 --values raw"):
        fastmim.pretrain(data=str(tmp_path / "set"), out=tmp_path / "wrong", **TINY)
