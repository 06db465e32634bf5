# SPDX-License-Identifier: Apache-2.0
"""Learning from labels at its edges: images of every kind, options without effect, several processes, interruptions."""

import csv
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_finetune import PRETRAIN, TINY, VIT, rows_of
from torch import Tensor

import fastmim
import fastmim.transfer
from fastmim.cli import main
from fastmim.comparing.page import _scale
from fastmim.comparing.plan import Cell
from fastmim.comparing.starts import Start
from fastmim.config import Config, FinetuneConfig, update
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.starts import with_start
from fastmim.transfer import cross_validate

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
QUICK: dict[str, Any] = {**TINY, "steps": 2}
FROM: dict[str, Any] = {**QUICK, "model": None, "model_args": {}}
BROKEN = b"\x89PNG\r\n\x1a\n nothing"


def weights_of(run: Run) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run.exported / "model.safetensors")


@pytest.fixture(scope="module")
def before(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = {**PRETRAIN, "model": "vit_tiny_patch16_224", "model_args": VIT, "epochs": 1}
    return fastmim.pretrain(data=str(classes), out=tmp_path_factory.mktemp("before") / "run", **words)


@pytest.fixture(scope="module")
def grey(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learnt from grey images."""
    return fastmim.finetune(str(classes), "scratch", out=tmp_path_factory.mktemp("grey") / "run", **QUICK, channels=1)


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures of five bands of 16 bits."""
    rasterio = pytest.importorskip("rasterio")
    folder = tmp_path_factory.mktemp("bands")
    for place, name in enumerate(("dry", "wet")):
        (folder / name).mkdir()
        for index in range(8):
            values = np.random.default_rng(index).normal(4000 + 3000 * place, 300, (5, 40, 40)).astype(np.uint16)
            profile = {"driver": "GTiff", "count": 5, "height": 40, "width": 40, "dtype": "uint16"}
            with rasterio.open(folder / name / f"{index}.tif", "w", **profile) as file:
                file.write(values)
    return folder


# ---- Images of other kinds


def test_weights_for_colour_learn_from_grey(before: Run, classes: Path, tmp_path: Path) -> None:
    tuned = fastmim.finetune(str(classes), before, out=tmp_path / "run", **{**FROM, "lr": 1e-9}, channels=1)
    one, other = (weights_of(run)["patch_embed.proj.weight"] for run in (before, tuned))
    assert torch.allclose(other, one.sum(1, keepdim=True), atol=1e-5)  # timm's way: what a grey colour image gives
    assert tuned.transfer.data.mean is not None and len(tuned.transfer.data.mean) == 1
    assert fastmim.predict(tuned, str(classes), tmp_path / "p.csv", device="cpu", workers=0).images == 40


def test_weights_for_grey_keep_their_statistics_when_channels_are_named(
    grey: Run, classes: Path, tmp_path: Path
) -> None:
    for words in ({}, {"channels": 1}):
        tuned = fastmim.finetune(str(classes), grey, out=tmp_path / f"run{len(words)}", **FROM, **words)
        assert (tuned.transfer.data.mean, tuned.transfer.data.std) == (grey.transfer.data.mean, grey.transfer.data.std)


def test_bands_from_pretraining_to_predictions(bands: Path, tmp_path: Path) -> None:
    words = {**PRETRAIN, "model": "vit_tiny_patch16_224", "model_args": VIT, "channels": 5, "values": "raw"}
    before = fastmim.pretrain(data=str(bands), out=tmp_path / "before", **words)
    tuned = fastmim.finetune(str(bands), before, out=tmp_path / "run", **{**FROM, "steps": 20})
    assert (tuned.transfer.data.channels, tuned.transfer.data.values) == (5, "raw")
    assert tuned.transfer.data.mean == before.config.data.mean
    assert tuned.read("finetune.json")["accuracy"]["top1"] == 100  # type: ignore[index]
    found = fastmim.predict(tuned, str(bands), tmp_path / "p.csv", device="cpu", workers=0)
    assert found.counts == {"dry": 8, "wet": 8}
    scratch = fastmim.finetune(str(bands), "scratch", out=tmp_path / "s", **QUICK, channels=5, values="raw")
    assert weights_of(scratch)["patch_embed.proj.weight"].shape[1] == 5
    student = fastmim.distill(str(bands), tuned, out=tmp_path / "student", **QUICK)  # the teacher's kind of images
    assert (student.transfer.data.channels, student.transfer.data.values) == (5, "raw")
    again = fastmim.pretrain(data=str(bands), out=tmp_path / "again", init=str(tuned.path), **{
        **PRETRAIN, "channels": 5, "values": "raw", "epochs": 1,
    })  # fmt: skip
    assert again.config.data.mean == before.config.data.mean


def test_a_teacher_of_other_values_is_refused(grey: Run, classes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has learnt from images of 1 channels \(8bit\), but these have 1 \(raw\)"):
        fastmim.distill(str(classes), grey, out=tmp_path / "run", **QUICK, channels=1, values="raw")
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_kind_of_values_are_not_taken(grey: Run) -> None:
    config = update(Config(), {"data": "unused", "init": str(grey.path), "channels": 1})
    assert with_start(config).data.mean == grey.transfer.data.mean
    assert with_start(update(config, {"values": "raw"})).data.mean is None
    chosen = with_start(update(config, {"std": (0.5,)}))  # what is given stays
    assert (chosen.data.mean, chosen.data.std) == (grey.transfer.data.mean, (0.5,))


def test_squares_that_do_not_fit_are_refused(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(classes), "--out", str(tmp_path / "squares"), "--resolution", "32"]) == 0
    try_it = functools.partial(fastmim.finetune, str(tmp_path / "squares"), "scratch", out=tmp_path / "run", **QUICK)
    with pytest.raises(UserError, match="squares of 3 channels"):
        try_it(channels=1)
    with pytest.raises(UserError, match="leave --cache out"):
        try_it(cache="ram")
    with pytest.raises(UserError, match="crop-on device needs squares"):
        fastmim.finetune(str(classes), "scratch", out=tmp_path / "run", **QUICK, crop_on="device")
    assert not (tmp_path / "run").exists()
    assert try_it().status["state"] == "finished"


# ---- What cannot be read


def parts_of(classes: Path, folder: Path, broken: tuple[str, ...]) -> Path:
    """train/ and test/, of which the test images of some classes are broken."""
    for part, numbers in (("train", range(6)), ("test", range(6, 9))):
        for name in ("lying", "upright"):
            (folder / part / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(classes / name / f"{number}.jpg", folder / part / name)
                if part == "test" and name in broken:
                    (folder / part / name / f"{number}.jpg").write_bytes(BROKEN)
    return folder


def test_a_test_part_that_cannot_be_read_is_told_before_training(classes: Path, tmp_path: Path) -> None:
    images = parts_of(classes, tmp_path / "images", ("lying", "upright"))
    with pytest.raises(UserError, match="none of 6 images that were tried"):
        fastmim.finetune(str(images), "scratch", out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_test_images_that_are_lost_on_the_way_lose_no_weights(classes: Path, tmp_path: Path) -> None:
    images = parts_of(classes, tmp_path / "images", ())
    run = fastmim.finetune(str(images), "scratch", out=tmp_path / "run", **QUICK)
    (run.path / "report.html").unlink()
    kept = {path: path.read_bytes() for path in (images / "test").rglob("*.jpg")}
    for path in kept:
        path.write_bytes(BROKEN)
    with pytest.raises(UserError, match=r"none of the 6 test images can be read any more.*fastmim resume"):
        fastmim.resume(run, changes={"allow_data_change": True})
    for path, content in kept.items():
        path.write_bytes(content)
    assert (fastmim.resume(run, changes={"allow_data_change": True}).path / "report.html").exists()


def test_a_class_without_readable_test_images_is_told(classes: Path, tmp_path: Path) -> None:
    images = parts_of(classes, tmp_path / "images", ("lying",))
    run = fastmim.finetune(str(images), "scratch", out=tmp_path / "run", **QUICK)
    result = run.read("finetune.json")
    assert result is not None and (result["test"], result["unreadable"]) == (3, 3)
    assert len(rows_of(run.path / "predictions.csv")) == 3
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "No test image of lying could be read" in page and "3 test images could not be read" in page


# ---- Options that would have no effect


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"model": "resnet18"}, "are of vit_tiny_patch16_224, not of resnet18: leave --model out"),
        ({"heads": 4}, "says how many heads it has"),
        ({"model_args": {"in_chans": 1}}, "in_chans = 1, but images have 3; use --channels"),
        ({"model_args": {"embed_dim": 48, "num_heads": 3}}, "does not fit the network"),
    ],
)
def test_weights_that_say_it_already(
    words: dict[str, Any], says: str, before: Run, classes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        fastmim.finetune(str(classes), before, out=tmp_path / "run", **{**FROM, **words})
    assert not (tmp_path / "run").exists()


def test_a_share_that_holds_nothing_out(classes: Path, tmp_path: Path) -> None:
    images = parts_of(classes, tmp_path / "images", ())
    for path, words in ((images, {}), (classes, {"folds": 2, "fold": 0})):
        with pytest.raises(UserError, match=r"test_share = 0\.5 has no effect"):
            fastmim.finetune(str(path), "scratch", out=tmp_path / "run", **QUICK, test_share=0.5, **words)


def test_arguments_of_the_network_win_over_those_of_a_run(before: Run, classes: Path, tmp_path: Path) -> None:
    words = {**FROM, "model_args": {"proj_drop_rate": 0.2, "depth": 1}}
    tuned = fastmim.finetune(str(classes), before, out=tmp_path / "run", **words)
    assert tuned.transfer.method.model_args["proj_drop_rate"] == 0.2
    assert not any(key.startswith("blocks.1.") for key in weights_of(tuned))


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(8, 1), (7, 4), (1, None)])
def test_one_image_cannot_be_normalised_over(
    global_batch: int, micro_batch: int | None, classes: Path, tmp_path: Path
) -> None:
    words = {**QUICK, "model": "resnet18", "model_args": {}}
    words |= {"global_batch": global_batch, "micro_batch": micro_batch}
    with pytest.raises(UserError, match="resnet18 normalises over the images of a micro-batch"):
        fastmim.finetune(str(classes), "scratch", out=tmp_path / "run", **words)
    assert not (tmp_path / "run").exists()


def test_one_image_cannot_be_mixed(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {**QUICK, "micro_batch": 1, "mixup": 0.8}
    fastmim.finetune(str(classes), "scratch", out=tmp_path / "run", **words)
    assert "mixup and cutmix have none to mix it with" in "".join(capsys.readouterr())


def test_folds_are_not_taken_over_from_other_options(classes: Path, before: Run, tmp_path: Path) -> None:
    words = {**QUICK, "folds": 2, "data": str(classes), "start": "scratch", "out": str(tmp_path / "folds")}
    config = update(FinetuneConfig(), words)
    _, summary = cross_validate(config=config)
    assert cross_validate(config=config)[1] == summary
    for change in ({"steps": 3}, {"labels": "5/class"}, {"seed": 1}):
        with pytest.raises(UserError, match=f"fold-0 was made with other {next(iter(change))};"):
            cross_validate(config=update(config, change))
    with pytest.raises(UserError, match="holds another run"):
        cross_validate(config=update(config, {"out": str(before.path)}))


def test_export_of_a_tuned_run_says_where_it_is(grey: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(grey.path)]) == 2
    error = capsys.readouterr().err
    assert "its weights are exported when it ends" in error and error.count("\n") == 1


def test_init_needs_weights_and_one_kind_of_them(photos: Path, before: Run, tmp_path: Path) -> None:
    for words, says in (
        ({"init": "scratch"}, "scratch is no weights"),
        ({"init": str(before.path), "pretrained": True}, "both name weights"),
    ):
        with pytest.raises(UserError, match=says):
            fastmim.pretrain(data=str(photos), out=tmp_path / "run", **{**PRETRAIN, **words})


# ---- Nothing is lost


def test_a_mistake_empties_no_folder(before: Run, grey: Run, classes: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(grey.path, out)
    known = sorted(out.rglob("*"))
    other = tmp_path / "other"
    for name in ("lying", "slanted"):
        shutil.copytree(classes / "lying", other / name)
    words = {**QUICK, "out": out, "overwrite": True}
    with pytest.raises(UserError, match="tells 2 classes apart"):
        fastmim.distill(str(other), grey, **words)
    with pytest.raises(UserError, match="goes with --rand-augment none"):
        fastmim.finetune(
            str(classes), "scratch", **{**words, "rand_augment": "rand-m9", "cache": "ram", "crop_on": "device"}
        )
    with pytest.raises(UserError, match="--overwrite would delete"):
        fastmim.finetune(str(classes), out, **{**words, "model": None, "model_args": {}})
    with pytest.raises(UserError, match="--overwrite would delete"):
        fastmim.finetune(str(classes), f"local-dir:{out}/export/timm", **{**words, "model": None, "model_args": {}})
    with pytest.raises(UserError, match="holds none of the network's weights"):
        fastmim.pretrain(
            data=str(photos), model="resnet18", init=str(before.path), out=out, overwrite=True,
            **{**PRETRAIN, "resolution": 64},
        )  # fmt: skip
    assert sorted(path for path in out.rglob("*") if path.name != ".lock") == [
        path for path in known if path.name != ".lock"
    ]


@pytest.mark.parametrize("kind", ["scratch", "run", "export", "architecture"])
def test_killed_before_the_first_checkpoint_or_the_report(
    kind: str, before: Run, classes: Path, tmp_path: Path
) -> None:
    start = {"run": str(before.path), "export": f"local-dir:{before.exported}"}.get(kind, "scratch")
    words = {**(QUICK if kind == "scratch" else FROM), "resolution": 48, "drop_path": 0.2}
    if kind == "architecture":
        words["model"] = f"local-dir:{before.exported}"
    run = fastmim.finetune(str(classes), start, out=tmp_path / "run", **words)
    whole, options = weights_of(run), (run.path / "config.yaml").read_text()
    for lost in (("report.html", "finetune.json"), ("report.html", "finetune.json", "status.json", "metrics.jsonl")):
        for name in lost:
            (run.path / name).unlink()
        shutil.rmtree(run.exported)
        if "status.json" in lost:
            shutil.rmtree(run.path / "checkpoints")
        again = fastmim.resume(run)
        assert (run.path / "report.html").exists() and (run.path / "config.yaml").read_text() == options
        now = weights_of(again)
        assert now.keys() == whole.keys() and all(torch.equal(now[key], whole[key]) for key in whole)


def test_stopped_while_measuring(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name in ("steps", "resolution")]
    words += ["--model", "vit_tiny_patch16_224", "--model-args", json.dumps(VIT), "--device", "cpu", "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(fastmim.transfer, "measure", functools.partial(_interrupt))
        assert main(["finetune", str(classes), "scratch", *words, "--out", str(tmp_path / "run")]) == 130
    assert f"'fastmim resume {tmp_path / 'run'}' measures them" in capsys.readouterr().err
    assert not (tmp_path / "run" / "finetune.json").exists()
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "finetune.json").exists() and (tmp_path / "run" / "report.html").exists()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# ---- Several processes


def test_two_processes_learn_what_one_learns(classes: Path, tmp_path: Path) -> None:
    words = {**QUICK, "ema": 0.9, "balance": "sampler", "drop_path": 0, "steps": 4, "flip": True}
    one = fastmim.finetune(str(classes), "scratch", out=tmp_path / "one", **words)
    code = (
        "import json, sys; import fastmim\n"
        "words = json.loads(sys.argv[3])\n"
        "run = fastmim.finetune(sys.argv[1], 'scratch', out=sys.argv[2], **words)\n"
        "from fastmim.cli_output import finished; sys.exit(finished(run.path))\n"
    )
    (tmp_path / "two.py").write_text(code)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        str(tmp_path / "two.py"), str(classes), str(tmp_path / "two"), json.dumps(words),
    ]  # fmt: skip
    here = str(Path(fastmim.__file__).parents[1])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report:") == 1 and "fastmim predict" in done.stdout  # only the first one speaks
    first, second = weights_of(one), weights_of(Run(tmp_path / "two"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


# ---- Names


def test_classes_of_any_name(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["with, comma", "\"quoted' <b>", "עברית", "new\nline", os.fsdecode(b"bad\xe9")]
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            shutil.copy(classes / "lying" / f"{number}.jpg", tmp_path / "images" / name)
    run = fastmim.finetune(str(tmp_path / "images"), "scratch", out=tmp_path / "run", **QUICK)
    assert run.read("finetune.json")["classes"] == sorted(names)  # type: ignore[index]
    assert "quoted' <b>" not in (run.path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    code = main(["predict", str(run.path), str(tmp_path / "images"), "--out", str(tmp_path / "p.csv"), "--workers=0"])
    said = capsys.readouterr().out
    assert code == 0 and len(said.splitlines()) == len(names) + 1 and said.encode("utf-8")
    with (tmp_path / "p.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.reader(file)) == ["path", "predicted", *(f"p:{name}" for name in sorted(names))]


def test_starts_whose_names_differ_in_letters_only_have_folders_of_their_own() -> None:
    def cells(*names: str) -> set[str]:
        return {Cell(Start(name, name, "run", "net"), "10%", 0).name for name in names}

    assert len(cells("é", "à", "_", "a b", "a_b")) == 5
    assert cells("out/pre") == {"out_pre-10pct-0"} and cells("vit_small.augreg") == {"vit_small.augreg-10pct-0"}


def test_a_scale_has_two_ends() -> None:
    for values in ([100.0], [100.0, 100.0], [0.0], [99.6]):
        low, high = _scale(values, 100.0)
        assert low < high and all(low <= value <= high for value in values)


def test_public_names_stay_what_they_are() -> None:
    # A module below fastmim that has the name of a function takes its place as soon as somebody imports it.
    folder = Path(fastmim.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not modules.intersection(fastmim.__all__)
