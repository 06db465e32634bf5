# SPDX-License-Identifier: Apache-2.0
"""The report of fine-tuned runs: it says what was measured, comes out whatever is absent, and lets nothing in."""

import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_run import build
from pages import CHROMIUM, ELEMENTS, HOSTILE, Page, browse
from PIL import Image
from safetensors.numpy import load_file

import fastmim
from fastmim.config import FinetuneConfig, validate
from fastmim.data.splits import splits
from fastmim.errors import UserError
from fastmim.outcome import measure, write_outcome
from fastmim.report import write_comparison, write_report
from fastmim.report.caveats import caveats
from fastmim.report.confusion import shaded_shapes, shaded_table, worst_pairs
from fastmim.report.folder import TRANSFER_USES, Answers, TransferFolder, read_run
from fastmim.report.transfer import sure_rows
from fastmim.run_folder import Run
from fastmim.transfer import finetune
from fastmim.transfer_setup import begin, read_splits

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
ALLOWED = ELEMENTS | {"bdi", "details", "summary"}


@pytest.fixture(scope="module")
def tuned(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a few steps."""
    out = tmp_path_factory.mktemp("tuned") / "a"
    words = {"model": "vit_tiny_patch16_224", "model_args": TINY, "resolution": 32, "steps": 6, "global_batch": 8}
    return finetune(classes, "scratch", **words, out=str(out), workers=0, log_every=2, device="cpu").path


@pytest.fixture
def copy(tuned: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(tuned, tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, name: str, **values: Any) -> None:
    content = json.loads((run / name).read_text(encoding="utf-8"))
    (run / name).write_text(json.dumps({**content, **values}), encoding="utf-8")


def pretend(run: Path, data: Path, names: tuple[str, ...], seed: int = 0) -> None:
    """Replaces the result of a run by answers to images of other classes."""
    noise = torch.Generator().manual_seed(seed)
    found = dataclasses.replace(splits(str(data)), classes=names)
    places = torch.arange(len(found.test)).repeat(50)
    labels = torch.arange(len(places)) % len(names)
    logits = torch.randn(len(places), len(names), generator=noise)
    logits[torch.arange(len(places)), labels] += 2.0
    write_outcome(Run(run), measure(logits, labels, places, found), {"split": "by hand", "unreadable": 2}, found)
    counts = {"train": [10 + place for place in range(len(names))], "test": [1] * len(names)}
    change(run, "data.json", classes=list(names), counts=counts)


# ---- What it says


def test_a_whole_run_is_told(tuned: Path) -> None:
    made, outcome = Page(tuned / "report.html"), json.loads((tuned / "finetune.json").read_text(encoding="utf-8"))
    rates = outcome["accuracy"]
    sentence = (
        f"{rates['top1']:.1f} % of 8 test images are named rightly (95 % interval {rates['low']:.1f} to "
        f"{rates['high']:.1f}); always naming the most frequent class would get 50.0 %."
    )
    assert sentence in made.text
    assert made.text.index(sentence) < made.text.index("was trained from scratch on 32 labelled images of 2 classes")
    for part in ("20% of each class held out, seed 0", "for 6 steps (1.5 epochs)", "There are only 8 test images"):
        assert part in made.text
    assert "measured on the test images too" in made.text
    assert f"{outcome['nll']:.3f}" in made.text
    assert "model_args" in made.text.partition("Options")[2]
    assert "What is missing" not in made.text
    assert set(made.elements) <= ALLOWED


def test_mistakes_are_shown_in_their_order(tuned: Path) -> None:
    named = json.loads((tuned / "finetune.json").read_text(encoding="utf-8"))["mistakes"]
    thumbs = load_file(tuned / "images" / "mistakes.safetensors")["thumbs"]
    assert thumbs.shape == (len(named), 3, 96, 96)
    assert named
    for one, thumb in zip(named, thumbs, strict=True):
        with Image.open(one["path"]) as picture:
            wanted = np.asarray(picture.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC), float)
        assert np.abs(thumb.transpose(1, 2, 0) - wanted).mean() < 4
    drawn = Page(write_report(tuned)).images()
    assert len(drawn) == len(named)
    for content, thumb in zip(drawn, thumbs, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            assert np.abs(np.asarray(picture, float) - thumb.transpose(1, 2, 0)).mean() < 8


def test_the_command_gives_the_same_config(tuned: Path, tmp_path: Path) -> None:
    change_config(tuned, tmp_path / "run", rand_augment=None, flip=False, labels="50%")
    (command,) = [text for text in Page(write_report(tmp_path / "run")).words if text.startswith("fastmim finetune \\")]
    shell = f'fastmim() {{ {shlex.quote(sys.executable)} -m fastmim "$@"; }}'
    script = f"set -e; {shell}; {command.replace('finetune', 'finetune --print-config', 1)}"
    root = Path(fastmim.__file__).parents[1]
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    again, before = validate(yaml.safe_load(done.stdout), schema=FinetuneConfig), Run(tmp_path / "run").transfer
    assert again == before.model_copy(update={"system": before.system.model_copy(update={"out": None})})


def change_config(run: Path, out: Path, **words: Any) -> None:
    shutil.copytree(run, out)
    config = fastmim.config.update(Run(run).transfer, words)
    (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")


def test_a_run_again_pools_as_before(classes: Path) -> None:
    words = {"path": str(classes), "start": "scratch", "model": "vit_tiny_patch16_224", "model_args": TINY}
    config = fastmim.config.update(FinetuneConfig(), {**words, "pool": "token"})
    found = read_splits(config)
    once = begin(config, found).config
    assert once.method.model_args["global_pool"] == "token"
    assert begin(once, found).config == once


def test_the_snippet_names_a_class(tuned: Path, classes: Path) -> None:
    (code,) = [text for text in Page(write_report(tuned)).words if text.startswith("import timm")]
    picture = sorted((classes / "lying").iterdir())[0]
    code = code.replace('"image.jpg"', repr(str(picture)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"lying", "upright"}


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ({"top1": 40.0, "low": 30.0, "majority": 50.0}, "nothing useful was learnt"),
        ({"top1": 60.0, "low": 45.0, "majority": 50.0}, "not certain that anything useful"),
    ],
)
def test_an_accuracy_that_is_worth_nothing_is_called_so(copy: Path, rates: dict[str, float], wanted: str) -> None:
    outcome = json.loads((copy / "finetune.json").read_text(encoding="utf-8"))
    change(copy, "finetune.json", accuracy={**outcome["accuracy"], **rates})
    assert wanted in Page(write_report(copy)).text


def test_caveats_come_only_where_they_hold(copy: Path, classes: Path) -> None:
    pretend(copy, classes, ("a", "b"))
    change(copy, "data.json", shown="val")
    change(copy, "finetune.json", unreadable=0)
    assert caveats(labelled(copy)) == []
    change(copy, "finetune.json", unreadable=1)
    change(copy, "data.json", counts={"train": [10, 50], "test": [4, 4]}, shown="test")
    told = " ".join(caveats(labelled(copy)))
    assert "very unequal (10 to 50 images)" in told
    assert "--balance loss" in told
    assert "1 test image could not be read, and is not counted" in told
    assert "test images too" in told
    outcome = json.loads((copy / "finetune.json").read_text(encoding="utf-8"))
    outcome["per_class"][1]["recall"] = 0.0
    change(copy, "finetune.json", per_class=outcome["per_class"])
    assert "This class was never named rightly: b." in caveats(labelled(copy))


def labelled(run: Path) -> TransferFolder:
    found = read_run(run)
    assert isinstance(found, TransferFolder)
    return found


def test_a_distilled_run_names_its_teacher(copy: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8"))
    config["task"], config["method"]["teacher"] = "distill", "runs/teacher"
    config["method"]["recipe"] = "distill"
    (copy / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    made = Page(write_report(copy))
    assert "fastmim distillation report" in made.text
    assert "was taught by runs/teacher on 32 labelled images" in made.text
    (command,) = [text for text in made.words if text.startswith("fastmim distill \\")]
    assert command.endswith(" runs/teacher")


# ---- What is taken for what


@pytest.fixture
def counts() -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, 9, (7, 7))
    drawn[3] = 0
    return drawn * (np.random.default_rng(1).random((7, 7)) < 0.6)


def test_shades_are_shares_of_the_row(counts: np.ndarray) -> None:
    names = list("abcdefg")
    for row, cells in enumerate(shaded_table(counts, names)):
        total = sum(int(count) for count in counts[row])
        for column, cell in enumerate(cells):
            assert cell.count == counts[row, column]
            assert cell.shade == (round(14 + 36 * (cell.count / total) ** 0.5) if cell.count else 0)


def test_shapes_lie_where_the_counts_are(counts: np.ndarray) -> None:
    drawn = {}
    for one in shaded_shapes(counts):
        for column, row in re.findall(r"M(\d+) (\d+)h1v1h-1z", one.path):
            drawn[int(row), int(column)] = (one.right, one.opacity)
    filled = {(row, column) for row in range(7) for column in range(7) if counts[row, column]}
    assert set(drawn) == filled
    for (row, column), (right, opacity) in drawn.items():
        assert right == (row == column)
        share = (counts[row, column] / counts[row].sum()) ** 0.5
        assert share <= opacity + 1e-9 < share + 1 / 8 + 1e-9


def test_the_worst_pairs_by_a_plain_loop(counts: np.ndarray) -> None:
    names = list("abcdefg")
    every = [
        (-int(counts[row, column]), row, column, int(counts[row].sum()))
        for row in range(7) for column in range(7) if row != column and counts[row, column]
    ]  # fmt: skip
    wanted = [(names[row], names[column], -count, images) for count, row, column, images in sorted(every)[:5]]
    assert [dataclasses.astuple(pair) for pair in worst_pairs(counts, names, 5)] == wanted


def test_sure_answers_are_counted() -> None:
    answers = Answers(np.array([0.4, 0.6, 0.9, 0.95]), np.array([False, True, False, True]))
    assert sure_rows(answers)[:2] == [("any", "4 (100 %)", "50.0 %"), ("at least 50 %", "3 (75 %)", "66.7 %")]
    assert [name for name, _, _ in sure_rows(answers)][-1] == "at least 95 %"


@pytest.mark.parametrize("many", [2, 30, 60, 301])
def test_any_number_of_classes(copy: Path, classes: Path, many: int) -> None:
    names = tuple(f"class {place:03d}" for place in range(many))
    pretend(copy, classes, names)
    made = Page(write_report(copy))
    assert set(made.elements) <= ALLOWED
    assert made.elements.count("th") > many
    matrix = 'class="matrix"' in made.source
    assert (matrix, 'class="cells"' in made.source) == (many <= 30, 30 < many <= 300)
    assert ("The most frequent mistakes" in made.text) == (many > 4)
    assert ("details" in made.elements) == (many > 40)
    assert ("Top-5" in made.text) == (many > 5)
    assert all(f"{name} " in made.text for name in names)


# ---- What may be absent


@pytest.mark.parametrize("name", [*TRANSFER_USES, "bad_images.csv"])
def test_every_single_file_may_be_absent(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    made = Page(write_report(copy, copy / "else.html"))
    assert (f"No {name} :" in made.text) == (name in TRANSFER_USES)
    assert set(made.elements) <= ALLOWED
    if name != "finetune.json":
        assert "of 8 test images are named rightly" in made.text


def test_a_run_that_did_not_finish_says_so(copy: Path) -> None:
    for name in ("finetune.json", "predictions.csv", "images/mistakes.safetensors", "export/timm/model.safetensors"):
        (copy / name).unlink()
    change(copy, "status.json", state="interrupted", step=3, message="")
    text = Page(write_report(copy)).text
    assert "This run was interrupted at step 3 of 6." in text
    assert "How good it is has not been measured" in text
    assert f"fastmim resume {copy}" in text


def test_what_is_damaged_is_one_clear_line(copy: Path) -> None:
    for name in ("finetune.json", "predictions.csv", "config.yaml"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(kept[: len(kept) // 2] + b"\n{[,\n" + kept[len(kept) // 2 :])
        with pytest.raises(UserError, match=f"{name} is damaged") as caught:
            write_report(copy)
        assert "\n" not in str(caught.value)
        (copy / name).write_bytes(kept)
    (copy / "config.yaml").write_text("task: dance\n", encoding="utf-8")
    with pytest.raises(UserError, match="unknown task 'dance'"):
        write_report(copy)


# ---- What may not get in


@pytest.fixture
def hostile(copy: Path, classes: Path) -> Path:
    """A run in which every text that comes from outside is hostile."""
    everything = " ".join(HOSTILE).replace("\udcff\udc80", "\u200f\u05d0")
    pretend(copy, classes, (*(name.replace("\udcff\udc80", "\u200f\u05d0") for name in HOSTILE), everything))
    outcome = json.loads((copy / "finetune.json").read_text(encoding="utf-8"))
    for one in outcome["mistakes"]:
        one["path"] = everything
    change(copy, "finetune.json", mistakes=outcome["mistakes"], split=everything, start=everything)
    change(copy, "data.json", paths=[everything], split=everything, formats={everything: 3})
    change(copy, "environment.json", **{everything: everything})
    change(copy, "status.json", state="failed", message=everything)
    config = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["path"] = config["method"]["start"] = config["method"]["model"] = everything
    (copy / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return copy


def test_hostile_names_stay_text(hostile: Path, tuned: Path, tmp_path: Path) -> None:
    for made in (Page(write_report(hostile)), Page(write_comparison([hostile, tuned], tmp_path / "both.html"))):
        assert set(made.elements) <= ALLOWED
        assert not [name for name, _ in made.attributes if name.startswith("on") or name == "href"]
        assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in made.attributes
        assert all(value.startswith("data:image/webp;base64,") for name, value in made.attributes if name == "src")
        assert not re.search(r"https?://|url\(|@import|<script", made.source)
        assert not {"\x1b", "\u202e", "\u200f"} & set(made.source)
    text = Page(hostile / "report.html").text
    assert "<script>alert(1)</script>.jpg" in text
    assert "{{ 7 * 7 }}{% include 'x' %}.jpg" in text


# ---- Several runs


def test_a_comparison_of_fine_tuned_runs(tuned: Path, tmp_path: Path) -> None:
    change_config(tuned, tmp_path / "b", epochs=7)
    made = Page(write_comparison([tuned, tmp_path / "b"], tmp_path / "out.html"))
    rates = json.loads((tuned / "finetune.json").read_text(encoding="utf-8"))["accuracy"]
    assert made.text.count(f"{rates['top1']:.1f} ({rates['low']:.1f} to {rates['high']:.1f})") == 2
    assert "epochs 100.0 7.0" in made.text
    assert "cannot be compared" not in made.text
    assert "Accuracy on the way" in made.text
    change_config(tuned, tmp_path / "c", label_seed=3)
    made = Page(write_comparison([tuned, tmp_path / "c"], tmp_path / "out.html"))
    assert "The accuracies of these runs cannot be compared with each other, because they differ in label_seed." in (
        made.text
    )


def test_kinds_are_not_mixed(tuned: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "pretrained", steps=3)
    with pytest.raises(UserError, match="compare runs of one kind") as caught:
        write_comparison([tuned, other], tmp_path / "out.html")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("kind", ["few", "many", "hostile"])
def test_nothing_leaves_the_screen(kind: str, copy: Path, classes: Path, request: pytest.FixtureRequest) -> None:
    if kind == "hostile":
        request.getfixturevalue("hostile")
    else:
        pretend(copy, classes, tuple(f"a rather long name {place}" for place in range(12 if kind == "few" else 60)))
    folder = copy.parent
    write_report(copy, folder / "page.html")
    for width in (390, 1400):
        found = re.search(r"<p>(\[.*?\])</p>", browse(folder, width, 1200, "--dump-dom"))
        assert found
        assert json.loads(found[1]) == [width, width, []]
