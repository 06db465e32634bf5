# SPDX-License-Identifier: Apache-2.0
"""Labelled images are cut into parts that share nothing, as a pure function of the seed."""

import shutil
from pathlib import Path

import pytest

from fastmim.data.splits import Part, splits
from fastmim.errors import UserError


def names(part: Part) -> set[str]:
    return {part.table.path(row) for row in range(len(part))}


def tree(folder: Path, classes: Path, **parts: slice) -> Path:
    for part, chosen in parts.items():
        for name in ("lying", "upright"):
            (folder / part / name).mkdir(parents=True)
            for path in sorted((classes / name).iterdir())[chosen]:
                shutil.copy(path, folder / part / name)
    return folder


def test_class_folders_are_held_out_from(classes: Path) -> None:
    found = splits(str(classes), seed=1)
    assert found.classes == ("lying", "upright") and len(found.train) == 32 and len(found.test) == 8
    assert not names(found.train) & names(found.test) and found.shown is not None
    assert all(Path(found.test.table.path(row)).parent.name == found.classes[label]
               for row, label in enumerate(found.test.labels))  # fmt: skip
    assert splits(str(classes), seed=1).fingerprint == found.fingerprint != splits(str(classes), seed=2).fingerprint


@pytest.mark.parametrize(
    ("parts", "shown", "test", "how"),
    [
        ({"train": slice(0, 10), "val": slice(10, 15), "test": slice(15, 20)}, "val", "test", "train/, val/ and test/"),
        ({"train": slice(0, 10), "valid": slice(10, 15)}, "valid", "valid", "train/ and val/"),
        ({"train": slice(0, 10), "test": slice(10, 12)}, "test", "test", "train/ and test/"),
    ],
)
def test_parts_of_the_users_own(
    parts: dict[str, slice], shown: str, test: str, how: str, classes: Path, tmp_path: Path
) -> None:
    found = splits(str(tree(tmp_path, classes, **parts)))
    assert {Path(path).parts[-3] for path in names(found.shown)} == {shown}
    assert {Path(path).parts[-3] for path in names(found.test)} == {test}
    assert found.how == how and len(found.train) == 20


def test_some_labels_are_nested_and_spread_over_classes(classes: Path) -> None:
    few, more = (splits(str(classes), labels=words, seed=3, label_seed=1) for words in ("10%", "50%"))
    assert names(few.train) != names(splits(str(classes), labels="10%", seed=3, label_seed=2).train)
    assert few.train.labels.count(0) == few.train.labels.count(1) == 2  # of 16
    assert len(more.train) == 16 and names(few.train) < names(more.train)
    assert names(few.test) == names(more.test) == names(splits(str(classes), seed=3).test)
    assert splits(str(classes), labels="3/class").train.labels == (0, 0, 0, 1, 1, 1)
    assert len(splits(str(classes), labels="0.1%").train) == 2


@pytest.mark.parametrize("words", ["0%", "101%", "x", "0/class", "1..2%", "5"])
def test_other_words_for_labels(words: str, classes: Path) -> None:
    with pytest.raises(UserError, match="should be a share as 10%"):
        splits(str(classes), labels=words)


def test_folds_cover_everything_once(classes: Path) -> None:
    parts = [splits(str(classes), folds=3, fold=fold) for fold in range(3)]
    tested = [path for part in parts for path in names(part.test)]
    assert len(tested) == len(set(tested)) == 40
    for part in parts:
        assert not names(part.train) & names(part.test) and len(part.train) + len(part.test) == 40


def test_shuffled_labels_keep_their_counts_and_the_test(classes: Path) -> None:
    plain, shuffled = splits(str(classes)), splits(str(classes), shuffle=True)
    assert sorted(plain.train.labels) == sorted(shuffled.train.labels) and plain.train.labels != shuffled.train.labels
    assert plain.test.labels == shuffled.test.labels and names(plain.train) == names(shuffled.train)


def test_a_folder_of_its_own_parts_has_no_folds(classes: Path, tmp_path: Path) -> None:
    folder = tree(tmp_path, classes, train=slice(0, 10), test=slice(10, 12))
    with pytest.raises(UserError, match="has a test part of its own; leave --folds out"):
        splits(str(folder), folds=3, fold=0)


def test_a_list_below_the_home_folder(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [f"{classes / name}/{index}.jpg,{name}" for name in ("lying", "upright") for index in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    assert splits("~/labels.csv").fingerprint == splits(str(tmp_path / "labels.csv")).fingerprint
