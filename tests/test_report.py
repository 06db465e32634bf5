# SPDX-License-Identifier: Apache-2.0
"""The report: it comes out whatever the run folder lacks, shows what is true, lets nothing in, and fits any screen."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_run import build
from pages import CHROMIUM, ELEMENTS, HOSTILE, Page, browse
from PIL import Image
from safetensors.numpy import load_file

from fastmim.config import validate
from fastmim.errors import UserError
from fastmim.report import write_comparison, write_report
from fastmim.report.folder import USES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("run") / "a")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


# ---- What it says


def test_a_whole_run_is_told(run: Path, page: Page) -> None:
    probe = json.loads((run / "probe.json").read_text(encoding="utf-8"))
    assert "vit_tiny_patch16_224 was pre-trained from scratch on 2,062 unlabelled images from signs-96 at" in page.text
    assert "for 40 epochs, which took 1 min 19 s on NVIDIA H200." in page.text
    assert probe["verdict"] in page.text
    for method in ("knn", "linear"):
        for mean, spread in probe["summary"][method].values():
            assert f"{mean:.1f} \N{PLUS-MINUS SIGN} {spread:.1f} %" in page.text
        (trained, _), (untrained, _) = probe["summary"][method]["trained"], probe["summary"][method]["untrained"]
        assert f"{trained - untrained:+.1f}" in page.text
    assert "Nearest neighbours (kNN): raw pixels do better" in page.text
    assert "The device often stood idle" in page.text
    assert "photos/broken.jpg truncated JPEG" in page.text
    assert "This run" not in page.text
    assert "What is missing" not in page.text


def test_a_change_within_the_spread_is_not_called_a_gain(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    probe = json.loads((run / "probe.json").read_text(encoding="utf-8"))
    probe["rows"] = [
        {"weights": weights, "method": "knn", "subset": subset, "labels": 100, "accuracy": accuracy}
        for weights, accuracies in {"trained": (31.0, 29.0), "untrained": (30.0, 29.5)}.items()
        for subset, accuracy in enumerate(accuracies)
    ]
    probe["summary"] = {"knn": {"trained": [30.0, 1.41], "untrained": [29.75, 0.35]}}
    (tmp_path / "run" / "probe.json").write_text(json.dumps(probe), encoding="utf-8")
    text = Page(write_report(tmp_path / "run")).text
    assert "What did not improve" in text
    assert "no clear change (+0.2 points" in text


def test_the_command_gives_the_same_config(tmp_path: Path) -> None:
    """The shell splits the printed command, and the command line itself reads it."""
    options = {
        "paths": ("it's $HOME `id`", "-dash", "a=b", "sp ace\nnewline", "caf\u00e9"), "flip": False,
        "mean": (0.5, 0.5, 0.5), "model_args": {"drop_path_rate": 0.1}, "clip_grad": 1.0, "seed": 7, "epochs": 12.5,
        "target": "pixels", "tensorboard": False,
    }  # fmt: skip
    run = build(tmp_path / "run", options=options, steps=3, target="pixels")
    (command,) = [text for text in Page(write_report(run)).words if text.startswith("fastmim pretrain \\\n")]
    shell = f'fastmim() {{ {shlex.quote(sys.executable)} -m fastmim "$@"; }}'
    script = f"set -e; {shell}; {command.replace('pretrain', 'pretrain --print-config', 1)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    again = validate(yaml.safe_load(done.stdout))
    before = validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    assert again == before.model_copy(update={"system": before.system.model_copy(update={"out": None})})


def test_loss_that_is_not_a_number(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records[600:]:
        record["loss" if record["kind"] == "train" else "val_loss"] = float("nan")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = Page(write_report(tmp_path / "run"))
    lost = sum(record["kind"] == "train" for record in records[600:])
    assert f"not a number in {lost} of 1200 readings" in made.text
    assert "nan" not in " ".join(value for name, value in made.attributes if name == "d")


# ---- What may be absent


def test_a_run_that_was_killed_early_has_only_metrics(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:50]) + b'{"kind": "train", "st')
    made = Page(write_report(tmp_path))
    assert "This run left no word of how it ended." in made.text
    assert "Whether it helped has not been measured" in made.text
    assert "Samples seen 3,200" in made.text
    assert all(f"No {name} :" in made.text for name in USES if name != "metrics.jsonl")


@pytest.mark.parametrize("name", [*USES, "bad_images.csv"])
def test_every_single_file_may_be_absent(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    made = Page(write_report(tmp_path / "run", tmp_path / "else" / "where.html"))
    assert (f"No {name} :" in made.text) == (name in USES)
    assert set(made.elements) <= ELEMENTS


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_a_run_that_did_not_finish_says_so(run: Path, tmp_path: Path, state: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    status = {"state": state, "step": 300, "steps": 1200, "samples": 19200, "message": "disk full"}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status), encoding="utf-8")
    text = Page(write_report(tmp_path / "run")).text
    assert "at step 300 of 1,200. It said: disk full" in text
    assert f"fastmim resume {tmp_path}/run" in text


def test_what_is_no_run_folder_or_damaged_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="two runs or more"):
        write_comparison([run], tmp_path / "out.html")
    shutil.copytree(run, tmp_path / "run")
    for name in ("probe.json", "metrics.jsonl", "config.yaml"):
        kept = (run / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(b"{[\n" + kept)
        with pytest.raises(UserError, match=f"{name} is damaged") as caught:
            write_report(tmp_path / "run")
        assert "\n" not in str(caught.value)
        (tmp_path / "run" / name).write_bytes(kept)


# ---- What may not get in


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every text that comes from outside is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    everything = " ".join(HOSTILE)
    options = {"paths": tuple(HOSTILE), "model": everything, "eval_data": everything}
    run = build(folder / "<b>run</b>", bad=[(name, f"reason {name}") for name in HOSTILE], options=options, steps=40)
    for name in ("environment.json", "probe.json", "status.json"):
        content = json.loads((run / name).read_text(encoding="utf-8"))
        content |= {key: everything for key, value in content.items() if isinstance(value, str)}
        (run / name).write_text(json.dumps({**content, everything: everything}), encoding="utf-8")
    (run / "data.json").write_text(json.dumps({"images": 3, "formats": {everything: 3}}), encoding="utf-8")
    return run


def pages(*runs: Path, out: Path) -> Iterator[Page]:
    yield from (Page(write_report(run)) for run in runs)
    yield Page(write_comparison(runs, out))


def test_hostile_names_stay_text(hostile: Path, run: Path, tmp_path: Path) -> None:
    for made in pages(hostile, run, out=tmp_path / "both.html"):
        assert set(made.elements) <= ELEMENTS
        assert not [name for name, _ in made.attributes if name.startswith("on") or name == "href"]
    text = Page(hostile / "report.html").text
    assert "<script>alert(1)</script>.jpg" in text
    assert "not-utf8-\\udcff\\udc80.jpg" in text
    assert "{{ 7 * 7 }}{% include 'x' %}.jpg" in text
    assert "\\x1b[31m \\u202egpj.exe" in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_the_page_asks_for_nothing(hostile: Path, run: Path, tmp_path: Path) -> None:
    for made in pages(hostile, run, out=tmp_path / "both.html"):
        attributes = made.attributes
        assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in attributes
        assert all(value.startswith("data:image/webp;base64,") for name, value in attributes if name == "src")
        assert not {"srcset", "background", "action", "data", "poster"} & {name for name, _ in attributes}
        assert not re.search(r"https?://|url\(|@import", made.source)


def test_pictures_carry_no_metadata_and_the_page_stays_small(run: Path, page: Page, tmp_path: Path) -> None:
    assert len(page.images()) == 6 * 4 + 5 * 7
    for content in page.images():
        with Image.open(io.BytesIO(content)) as picture:
            assert not {"exif", "xmp", "icc_profile"} & set(picture.info)
    assert all(value for name, value in page.attributes if name == "alt")
    noise = np.random.default_rng(0).integers(0, 255, (24, 3, 256, 256), dtype=np.uint8)
    assert write_report(build(tmp_path / "large", images=noise, steps=20_000)).stat().st_size < 3_000_000


# ---- What was hidden


def blocks_of(picture: np.ndarray) -> np.ndarray:
    """The 36 blocks of a sample, each as a row of pixels: (36, pixels, 3)."""
    side = len(picture) // 6
    return picture.reshape(6, side, 6, side, 3).transpose(0, 2, 1, 3, 4).reshape(36, -1, 3)


@pytest.mark.parametrize("target", ["hog", "pixels", "pixels_norm"])
def test_hidden_cells_stand_out_in_the_prediction(tmp_path: Path, target: str) -> None:
    run = build(tmp_path / "run", target=target, steps=3)
    made = Page(write_report(run)).images()
    image, saw, drawn, predicted = (np.asarray(Image.open(io.BytesIO(one)).convert("RGB"), float) for one in made[:4])
    hidden = load_file(run / "images" / "reconstruction.safetensors")["mask"][0].reshape(-1)
    cover = np.median(np.abs(blocks_of(saw) - [122, 124, 130]).mean(axis=2), axis=1)
    change = np.median(np.abs(blocks_of(saw) - blocks_of(image)).mean(axis=2), axis=1)
    assert cover[hidden].max() < 4
    assert change[~hidden].max() < 4
    blocks, wanted = blocks_of(predicted), blocks_of(drawn)
    if target == "hog":
        ground, warmth = np.median(blocks.mean(axis=2), axis=1), (blocks[..., 0] - blocks[..., 2]).max(axis=1)
        assert ground[hidden].max() < ground[~hidden].min() - 20
        assert np.median(warmth[hidden]) > warmth[~hidden].max() + 60
    else:
        error = np.abs(blocks - wanted).mean(axis=(1, 2))
        assert error[hidden].max() < error[~hidden].min()
    if target == "pixels":
        assert np.abs(drawn - image).mean() < 6


# ---- Several runs


def test_a_comparison_shows_what_differs_and_only_that(run: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "b", target="pixels", options={"epochs": 80}, seed=3)
    (tmp_path / "killed").mkdir()
    shutil.copy(run / "metrics.jsonl", tmp_path / "killed")
    made = Page(write_comparison([run, other, tmp_path / "killed"], tmp_path / "out.html"))
    differences = made.text.partition("What differs")[2].partition("Training")[0]
    assert "target hog pixels -" in differences
    assert "epochs 40.0 80.0 -" in differences
    assert "mask_ratio" not in differences
    assert "cannot be compared with each other, because they differ in cell, target." in made.text
    assert "killed: no config.yaml" in made.text
    assert made.source.count('class="raw c') == 3


# ---- On a screen


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("kind", ["report", "hostile", "comparison"])
def test_nothing_leaves_the_screen(run: Path, hostile: Path, tmp_path: Path, kind: str) -> None:
    if kind == "comparison":
        write_comparison([run, hostile], tmp_path / "page.html")
    else:
        write_report(run if kind == "report" else hostile, tmp_path / "page.html")
    for width in (390, 820, 1400):
        found = re.search(r"<p>(\[.*?\])</p>", browse(tmp_path, width, 1200, "--dump-dom"))
        assert found
        assert json.loads(found[1]) == [width, width, []]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_the_page_is_drawn_in_light_and_dark(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "page.html")
    grounds = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        browse(tmp_path, 820, 1600, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        with Image.open(shot) as picture:
            grey = np.asarray(picture.convert("L"), float)
        ground = float(np.median(grey))
        grounds.append(ground)
        # Text and curves are there, and far from the ground in brightness.
        assert (np.abs(grey - ground) > 100).mean() > 0.01
    assert grounds[0] < 40 < 215 < grounds[1]
