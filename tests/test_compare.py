# SPDX-License-Identifier: Apache-2.0
"""The comparison of starts, with a small trainer that really trains: it must say yes, and it must say no."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw
from PIL import Image
from tiny_trainer import TinyTrainer, draw_set, pretrained

import fastmim
from fastmim.cli import main
from fastmim.comparing.compare import Comparison
from fastmim.comparing.leakage import check, compare_tables
from fastmim.comparing.measure import Measured, judge
from fastmim.comparing.page import content
from fastmim.comparing.plan import Cell, Plan, label_settings, said
from fastmim.comparing.starts import Start, find_starts
from fastmim.comparing.verdict import sentence
from fastmim.data.sources.scan import scan
from fastmim.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_set(tmp_path_factory.mktemp("stripes"))


def compared(images: Path, out: Path, *inits: object, **words: Any) -> Comparison:
    trainer = words.pop("trainer", None) or TinyTrainer()
    words = {"labels": ["50%"], "leakage": False, "say": lambda line: None, **words}
    return fastmim.compare(str(images), [str(one) for one in inits], out=str(out), trainer=trainer, **words)


# ---- What it says


def test_a_run_that_helps_is_said_to_help(images: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = compared(images, tmp_path / "c", pretrained(tmp_path / "good", 1.0), say=lines.append)
    assert found.verdict.startswith("Pre-training helped: with 50 % of the labels ")
    assert (
        "3 seeds" in found.verdict
        and found.verdict.count(".") == found.verdict.count(".")
        and "\n" not in found.verdict
    )
    assert lines[0].startswith("scratch is added")
    assert lines[1].startswith("[1/6] seed 0, 50 % of the labels, scratch: ") and "left" in lines[1]
    assert lines[-1].startswith("[6/6] seed 2, 50 % of the labels, good: ") and "left" not in lines[-1]

    facts = json.loads((tmp_path / "c" / "comparison.json").read_text(encoding="utf-8"))
    assert facts["verdict"] == found.verdict and facts["test"] == 120 and facts["chance"] == pytest.approx(100 / 3)
    (difference,) = facts["differences"]
    assert (difference["a"], difference["b"], difference["outcome"]) == ("good", "scratch", "helped")
    assert facts["cost"][1]["pretrain_seconds"] == 90 and facts["cost"][0]["pretrain_seconds"] == 0

    with (tmp_path / "c" / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["start"], row["seed"]) for row in rows[:3]] == [("scratch", "0"), ("good", "0"), ("scratch", "1")]
    means = {
        name: np.mean([float(row["top1"]) for row in rows if row["start"] == name]) for name in ("good", "scratch")
    }
    assert difference["points"] == pytest.approx(means["good"] - means["scratch"])


def test_a_run_like_untrained_weights_is_said_not_to_help(images: Path, tmp_path: Path) -> None:
    found = compared(images, tmp_path / "c", pretrained(tmp_path / "same", -1.0))
    assert found.verdict.startswith("Nothing helped")
    assert found.facts["differences"][0]["outcome"] == "unclear"


def test_a_run_that_hurts_is_said_to_hurt(tmp_path: Path) -> None:
    images = draw_set(tmp_path / "many", train=60, val=100)
    blind, good = pretrained(tmp_path / "blind", 0.0), pretrained(tmp_path / "good", 1.0)
    found = compared(images, tmp_path / "c", blind, good, labels=["all"], steps=300)
    assert "good helped: with all labels" in found.verdict and "blind hurt: with all labels" in found.verdict


def test_shuffled_labels_help_nobody(images: Path, tmp_path: Path) -> None:
    trainer = TinyTrainer()
    good = pretrained(tmp_path / "good", 1.0)
    found = compared(images, tmp_path / "c", good, shuffle_labels=True, labels=["all"], seeds=4, trainer=trainer)
    assert found.verdict.startswith("With shuffled labels nothing helped"), found.verdict
    assert all(call["shuffle_labels"] is True for call in trainer.calls)
    assert "--shuffle-labels" in found.facts["command"]


def test_one_seed_shows_nothing(images: Path, tmp_path: Path) -> None:
    found = compared(images, tmp_path / "c", pretrained(tmp_path / "good", 1.0), seeds=1)
    assert found.verdict.startswith("One seed shows nothing: ") and "luck" in found.verdict


def synthetic(accuracies: dict[str, list[list[float]]], tmp_path: Path, images: int = 2000) -> tuple[Measured, Plan]:
    """Predictions at random with these accuracies: start -> label setting -> seed."""
    rng = np.random.default_rng(0)
    kinds = {"scratch": "scratch", "imagenet": "released"}
    starts = tuple(Start(name, name, kinds.get(name, "run"), "net") for name in accuracies)  # type: ignore[arg-type]
    labels = tuple(f"{10**place}%" for place in range(len(accuracies["scratch"])))
    seeds = tuple(range(len(accuracies["scratch"][0])))
    plan = Plan("data", "", starts, labels, seeds, {}, {name: {} for name in accuracies}, tmp_path)
    hard = rng.random(images)
    correct, results = {}, {}
    for name, settings in accuracies.items():
        for label, values in zip(labels, settings, strict=True):
            noisy = [0.7 * hard + 0.3 * rng.random(images) for _ in values]
            correct[label, name] = np.stack([one < np.quantile(one, v) for one, v in zip(noisy, values, strict=True)])
    for cell in plan.cells:
        results[cell] = {"train": 100, "test": images, "steps": 5, "seconds": 1.0}
    truth = tuple(f"class {place % 10}" for place in range(images))
    names = tuple(f"class {place}" for place in range(10))
    return Measured(tuple(map(str, range(images))), truth, names, correct, results), plan


@pytest.mark.parametrize(
    ("accuracies", "begins", "holds"),
    [
        ({"scratch": [[0.4, 0.41, 0.39]], "a": [[0.55, 0.56, 0.54]]}, "Pre-training helped: with 1 % of the", "+15.0"),
        ({"scratch": [[0.4, 0.41, 0.39]], "a": [[0.3, 0.31, 0.29]]}, "Pre-training hurt: ", "-10.0"),
        ({"scratch": [[0.4, 0.41, 0.39]], "a": [[0.4, 0.42, 0.38]]}, "Nothing helped: ", "would have been shown"),
        # Ahead on the mean by much, but not on every seed.
        ({"scratch": [[0.4, 0.5, 0.3]], "a": [[0.6, 0.49, 0.6]]}, "Nothing helped: ", ""),
        (
            {"scratch": [[0.1, 0.1, 0.1]], "a": [[0.101, 0.1, 0.099]]},
            "Nothing helped, and nothing beats chance (10.0 %)",
            "",
        ),
        (
            {"scratch": [[0.4, 0.41, 0.39], [0.7, 0.71, 0.69]], "a": [[0.6, 0.61, 0.59], [0.7, 0.7, 0.7]]},
            "Pre-training helped: with 1 % of the labels 60.0 % against 40.0 % from scratch (+20.0 points",
            "; no difference shown for a with 10 % of the labels (+0.0 points)",
        ),
        (
            {"scratch": [[0.4, 0.41, 0.39]], "imagenet": [[0.8, 0.81, 0.79]], "a": [[0.6, 0.61, 0.59]]},
            "imagenet helped: ",
            "; a is worse than imagenet (-20.0 points)",
        ),
    ],
)
def test_verdicts(accuracies: dict[str, list[list[float]]], begins: str, holds: str, tmp_path: Path) -> None:
    measured, plan = synthetic(accuracies, tmp_path)
    judged = judge(measured, plan, np.ones(2000, bool))
    text = sentence(judged, plan)
    assert text.startswith(begins) and holds in text and text.endswith(".") and "\n" not in text, text
    if len(plan.starts) == 2 and len(plan.labels) == 1:  # and turned round, it is the opposite
        turned = {"scratch": accuracies["a"], "a": accuracies["scratch"]}
        opposite = sentence(judge(*synthetic(turned, tmp_path), np.ones(2000, bool)), plan)
        assert opposite.split(":")[0] == {
            "Pre-training helped": "Pre-training hurt", "Pre-training hurt": "Pre-training helped",
        }.get(text.split(":")[0], opposite.split(":")[0])  # fmt: skip


def test_shuffled_labels_that_help_are_an_alarm(tmp_path: Path) -> None:
    measured, plan = synthetic({"scratch": [[0.1, 0.1, 0.1]], "a": [[0.3, 0.31, 0.29]]}, tmp_path)
    text = sentence(judge(measured, plan, np.ones(2000, bool)), plan, shuffled=True)
    assert "a is shown to help, which must not be" in text and "leak" in text
    measured, plan = synthetic({"scratch": [[0.1, 0.1, 0.1]], "a": [[0.03, 0.031, 0.029]]}, tmp_path)
    text = sentence(judge(measured, plan, np.ones(2000, bool)), plan, shuffled=True)
    assert "nothing helped" in text and "a is behind scratch, by the luck of the labels" in text and "leak" not in text


def test_scores_leave_images_out(tmp_path: Path) -> None:
    measured, plan = synthetic({"scratch": [[0.4, 0.5, 0.3]], "a": [[0.6, 0.5, 0.4]]}, tmp_path)
    kept = np.arange(2000) % 3 > 0
    judged = judge(measured, plan, kept)
    plain = [100 * sum(row[i] for i in range(2000) if kept[i]) / kept.sum() for row in measured.correct["1%", "a"]]
    assert judged.score("1%", "a").accuracies == pytest.approx(plain)
    assert judged.images == kept.sum()


# ---- Leaks


def save(folder: Path, indices: range, **options: Any) -> Path:
    folder.mkdir()
    for index in indices:
        Image.fromarray(draw(index, 64)).save(folder / f"{index:03d}.jpg", quality=95, **options)
    return folder


def test_leaks_are_found_exactly(tmp_path: Path) -> None:
    """Of 60 test images, two are copied, three are encoded anew, brighter or larger; 40 others are different."""
    test, others = save(tmp_path / "test", range(60)), save(tmp_path / "others", range(100, 140))
    for index in (3, 17):
        shutil.copy(test / f"{index:03d}.jpg", others / f"copy {index}.jpg")
    changed = {
        5: lambda image: image,
        20: lambda image: image.point(lambda value: min(255, int(value * 1.1))),
        33: lambda image: image.resize((128, 128)),
    }
    for index, change in changed.items():
        change(Image.open(test / f"{index:03d}.jpg")).save(others / f"near {index}.png")
    leak = compare_tables("others", scan([str(others)]), scan([str(test)]), 3, False)
    assert (leak.exact, leak.near, leak.images) == ((3, 17), (5, 20, 33), 45)
    assert leak.examples[0] == (f"{test}/003.jpg", f"{others}/copy 3.jpg", "exact")
    assert leak.examples[-1] == (f"{test}/033.jpg", f"{others}/near 33.png", "near")
    some = compare_tables("others", scan([str(others)]), scan([str(test)]), 3, False, most=10)
    assert some.exact == (3, 17) and some.opened == 10 and "10 of them" in some.note


def test_leaked_images_are_left_out_and_said(tmp_path: Path) -> None:
    images = draw_set(tmp_path / "set")
    # Pre-trained on its training images, which is fair, and on nine of its test images, which is not.
    seen = tmp_path / "seen"
    shutil.copytree(images / "train", seen)
    test = sorted((images / "val").rglob("*.png"))
    for path in test[:9]:
        shutil.copy(path, seen / f"again {path.parent.name} {path.name}")
    # One labelled training image is a test image too, which is worse.
    shutil.copy(test[50], images / "train" / "slanted" / "again.png")
    run = pretrained(tmp_path / "good", 1.0, paths=(str(seen),))
    lines: list[str] = []
    found = compared(images, tmp_path / "c", run, leakage=True, say=lines.append)
    by_name = {leak["of"]: leak for leak in found.facts["leakage"]}
    assert by_name["good"]["exact"] == tuple(range(9)) and by_name["labelled training images"]["exact"] == (50,)
    assert sum(line.startswith("leak: ") for line in lines) == 2
    assert found.facts["left_out"] >= 10 and found.facts["images"] == 120 - found.facts["left_out"]
    assert f"(without {found.facts['left_out']} leaked test images)" in found.verdict
    page = found.page.read_text(encoding="utf-8")
    assert "the same byte for byte" in page and "With them" in page


def test_what_cannot_be_checked_is_said(images: Path, tmp_path: Path) -> None:
    gone = Start("gone", str(pretrained(tmp_path / "gone", 1.0, ("nowhere",))), "run", "net")
    own = Start("own", str(pretrained(tmp_path / "own", 1.0, (str(images / "train"),))), "run", "net")
    hub = Start("imagenet", "vit_tiny_patch16_224", "released", "net")
    test = [str(path) for path in sorted((images / "val").rglob("*.png"))]
    training, first, second, third = check(str(images), test, [gone, own, hub])
    assert not training.exact and training.images == 60
    assert not first.checked and "gone" in first.note
    assert second.checked and not second.exact and "60 are training images of this set, which is fair" in second.note
    assert not third.checked and "not known" in third.note
    with pytest.raises(UserError, match="not among the test images"):
        check(str(images), ["elsewhere.png"], [])


# ---- The grid


def test_everything_is_the_same_for_every_start(images: Path, tmp_path: Path) -> None:
    trainer = TinyTrainer()
    run = pretrained(tmp_path / "good", 1.0)
    compared(images, tmp_path / "c", run, labels=["5/class", "all"], seeds=2, steps=20, lr=0.1, trainer=trainer)
    keys = [(call["seed"], call["labels"], call["start"]) for call in trainer.calls]
    starts = ("scratch", str(run))
    assert keys == [(seed, labels, start) for seed in (0, 1) for labels in ("5/class", None) for start in starts]
    assert all(call["label_seed"] == call["seed"] for call in trainer.calls)
    shared = {(call["steps"], call["lr"], call["resolution"], call["data"]) for call in trainer.calls}
    assert shared == {(20, 0.1, 24, str(images))}
    assert [call.get("model") for call in trainer.calls[:2]] == ["vit_tiny_patch16_224", None]


def test_an_interrupted_comparison_goes_on(images: Path, tmp_path: Path) -> None:
    run, out = pretrained(tmp_path / "good", 1.0), tmp_path / "c"
    nothing = compared(images, out, run, trainer=TinyTrainer(stop_after=1))
    assert nothing.interrupted and not (out / "comparison.html").exists()
    some = compared(images, out, run, trainer=TinyTrainer(stop_after=4))  # one and a half further rounds
    assert some.interrupted and some.facts["seeds"] == [0, 1]
    assert any("2 of 3 seeds are complete" in note for note in some.facts["notes"])
    last, again = TinyTrainer(), TinyTrainer()
    whole = compared(images, out, run, trainer=last)
    assert not whole.interrupted and len(last.calls) == 1 and whole.facts["seeds"] == [0, 1, 2]
    assert not list((out / "runs").rglob("half.txt"))
    # In one go, and with another seed, which adds two runs.
    assert compared(images, tmp_path / "d", run).facts["scores"] == whole.facts["scores"]
    compared(images, out, run, seeds=4, trainer=again)
    assert len(again.calls) == 2


def test_runs_of_other_options_are_not_mixed(images: Path, tmp_path: Path) -> None:
    run, out = pretrained(tmp_path / "good", 1.0), tmp_path / "c"
    compared(images, out, run, seeds=1, steps=20)
    with pytest.raises(UserError, match="holds runs with other steps"):
        compared(images, out, run, seeds=1, steps=30)
    shutil.rmtree(run)
    pretrained(run, 0.5)  # other weights in the same place
    with pytest.raises(UserError, match="holds runs with other weights"):
        compared(images, out, run, seeds=1, steps=20)


def test_other_test_images_are_refused(images: Path, tmp_path: Path) -> None:
    run, out = pretrained(tmp_path / "good", 1.0), tmp_path / "c"
    compared(images, out, run, seeds=1)
    file = next((out / "runs").glob("good-*/predictions.csv"))
    file.write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="tested on other images"):
        compared(images, out, run, seeds=1)


@pytest.mark.parametrize(
    ("inits", "model", "message"),
    [
        (["scratch"], None, "weights beside scratch"),
        (["RUN", "RUN"], None, "twice"),
        (["imagenet"], None, "needs --model"),
        (["vit_tiny_patch16_242"], None, "nearest: vit_tiny_patch16_224"),
        (["no/such/run"], "resnet18", "no run folder, no file"),
        (["FOLDER"], "resnet18", "is not a run folder"),
        (["notes.txt"], "resnet18", "holds no weights that are known"),
    ],
)
def test_starts_that_do_not_fit(
    inits: list[str], model: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello", encoding="utf-8")
    Path("FOLDER").mkdir()
    pretrained(Path("RUN"), 1.0)
    with pytest.raises(UserError, match=message):
        find_starts(inits, model)


def test_starts_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        pretrained(Path(folder) / "run", 1.0)
    shutil.copy("a/run/export/timm/model.safetensors", "w.safetensors")
    inits = ["a/run", "b/run", "imagenet", "resnet18", "w.safetensors", "local-dir:a/run/export/timm"]
    found = find_starts(inits, None)
    assert [start.name for start in found.all] == [
        "scratch", "a/run", "b/run", "imagenet", "resnet18", "w.safetensors", "export/timm",
    ]  # fmt: skip
    assert [start.kind for start in found.all] == ["scratch", "run", "run", *["released"] * 2, "file", "released"]
    assert found.model == "vit_tiny_patch16_224" and found.all[3].start == "vit_tiny_patch16_224"
    assert found.all[1].weights == found.all[5].weights != ""
    assert "resnet18" in [start.name for start in found.others]


def test_label_settings() -> None:
    assert label_settings(["1 %", "10.0%", "5/class", "all"]) == ("1%", "10%", "5/class", "100%")
    assert [said(one) for one in ("10%", "1/class", "100%")] == ["10 % of the labels", "1 label a class", "all labels"]
    for wrong in (["0%"], ["101%"], ["ten"], ["0/class"], [], ["all", "100%"]):
        with pytest.raises(UserError, match="--labels"):
            label_settings(wrong)


def test_names_of_folders_are_plain() -> None:
    cell = Cell(Start("../r <b>", "x", "run", "net"), "5/class", 2)
    assert re.fullmatch(r"\.\._r__b_-[0-9a-f]{8}-5-a-class-2", cell.name) and "/" not in cell.name


# ---- The page and the command


def test_the_page_escapes_names_and_has_no_scripts(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    images = draw_set(tmp_path / "set", names={"lying": "<img src=x>"})
    run = pretrained(tmp_path / "<b>&run\u202e", 1.0)
    found = compared(images, tmp_path / "c", run, labels=["10%", "50%", "all"], comment=evil, leakage=True)
    page = found.page.read_text(encoding="utf-8")
    assert "<script" not in page and "<b>&run" not in page and "\u202e" not in page and "<img src=x>" not in page
    assert "&lt;script&gt;" in page and "&lt;b&gt;&amp;run" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<h3>") >= 6 and "Accuracy, %" in page and found.facts["command"].split()[0] in page
    # The page follows from the JSON alone.
    facts = json.loads((tmp_path / "c" / "comparison.json").read_text(encoding="utf-8"))
    assert content(facts)["verdict"] == found.verdict


def test_the_command_line(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("fastmim.comparing.compare._finetune", TinyTrainer)
    good, same = pretrained(tmp_path / "good", 1.0), pretrained(tmp_path / "same", -1.0)
    words = ["compare", str(images), "--inits", f"{good},{same}", "--labels", "50%,all", "--out", str(tmp_path / "c")]
    assert main([*words, "--no-leakage", "--steps", "50"]) == 0
    output = capsys.readouterr().out
    assert "[18/18]" in output and "good helped: " in output and f"{tmp_path / 'c' / 'comparison.html'}" in output
    assert main(["compare", str(images)]) == 2
    assert "compare needs START,..." in capsys.readouterr().err


def test_folders_and_seeds_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    run = pretrained(tmp_path / "good", 1.0)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written to"):
        compared(images, tmp_path / "file", run)
    with pytest.raises(UserError, match="at least one is needed"):
        compared(images, tmp_path / "c", run, seeds=0)


def test_a_budget_that_is_not_the_same_is_said(images: Path, tmp_path: Path) -> None:
    run, out = pretrained(tmp_path / "good", 1.0), tmp_path / "c"
    compared(images, out, run)
    file = next((out / "runs").glob("good-*-1/finetune.json"))
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "steps": 999}), encoding="utf-8")
    notes = compared(images, out, run).facts["notes"]
    assert "Not the same for all: steps, 200 (scratch) and 999 (good)." in notes
    options = next((out / "runs").glob("good-*-0/config.yaml"))
    options.write_text(
        options.read_text(encoding="utf-8").replace("weight_decay: 0.05", "weight_decay: 0.3"), encoding="utf-8"
    )
    notes = compared(images, out, run).facts["notes"]
    assert "Not the same for all: weight decay, 0.05 (scratch), 0.3 (good)." in notes


def test_a_comparison_of_hints_asks_for_more_seeds(tmp_path: Path) -> None:
    """All seeds agree and by more than their spread, yet chance cannot be excluded: that is no plain no."""
    measured, plan = synthetic({"scratch": [[0.4, 0.48]], "a": [[0.5, 0.53]]}, tmp_path)
    text = sentence(judge(measured, plan, np.ones(2000, bool)), plan)
    assert text.startswith("Nothing is shown, for too few seeds: ") and "more seeds may show it" in text
