# SPDX-License-Identifier: Apache-2.0
"""Folders, files and lists of any kind become the same ordered files everywhere, or one line that says what to do."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw
from PIL import Image

from fastmim.data.labelled import labelled
from fastmim.data.scan import first_look, scan
from fastmim.errors import UserError


def touch(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def relative(files: tuple[str, ...], root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in files]


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tree_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/c/d/e/3.jpeg", "a.jpg", "z.tif", "b-/1.webp", content=b"123")
    touch(tmp_path, "notes.txt", "labels.csv", ".hidden.jpg", ".cache/4.jpg", "jpg", "b/README")
    images = scan([str(tmp_path)])
    assert relative(images.files, tmp_path) == ["a.jpg", "b-/1.webp", "b/2.PNG", "b/c/d/e/3.jpeg", "z.tif"]
    assert all(Path(file).is_absolute() for file in images.files)
    assert images.bytes == 15
    assert images.formats == {"jpeg": 2, "png": 1, "tiff": 1, "webp": 1}


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert scan(["in"]).files == scan([str(tmp_path / "in")]).files == (str(tmp_path / "in" / "a.jpg"),)


def test_fingerprint_is_of_names_and_sizes_only(tmp_path: Path) -> None:
    names = ("a.jpg", "b/c.jpg", "b/d.png")
    first = scan([str(touch(tmp_path / "one", *names))])
    second = scan([str(touch(tmp_path / "two", *reversed(names)))])
    assert first.fingerprint == second.fingerprint and re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    seen = {first.fingerprint}
    touch(tmp_path / "two", "b/c.jpg", content=b"xx")
    seen.add(scan([str(tmp_path / "two")]).fingerprint)
    touch(tmp_path / "two", "b/c.jpg")
    (tmp_path / "two/b/d.png").rename(tmp_path / "two/b/e.png")
    seen.add(scan([str(tmp_path / "two")]).fingerprint)
    (tmp_path / "two/b/e.png").unlink()
    seen.add(scan([str(tmp_path / "two")]).fingerprint)
    assert len(seen) == 4


def test_files_lists_and_folders_together(tmp_path: Path) -> None:
    touch(tmp_path, "in/b.jpg", "in/a.jpg", "in/c.jpg", "other/x.png", "single.gif")
    up_and_down = f"../{tmp_path.name}/in/a.jpg"
    (tmp_path / "list.txt").write_text(f"other/x.png\r\n\n{tmp_path}/in/c.jpg\n{up_and_down}\n")
    listed = scan([str(tmp_path / "list.txt")])
    assert sorted(os.path.realpath(file) for file in listed.files) == [
        str(tmp_path / name) for name in ("in/a.jpg", "in/c.jpg", "other/x.png")
    ]
    both = scan([str(tmp_path / "single.gif"), str(tmp_path / "in"), str(tmp_path / "in/b.jpg"), str(tmp_path / "in")])
    assert relative(both.files, tmp_path) == ["single.gif", "in/a.jpg", "in/b.jpg", "in/c.jpg"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/sub/b.jpg", "outside/c.jpg", "outside/d.jpg")
    inside = tmp_path / "in"
    (inside / "circle").symlink_to(inside, target_is_directory=True)
    (inside / "sub/up").symlink_to("..", target_is_directory=True)
    (inside / "self.jpg").symlink_to(inside / "self.jpg")
    (inside / "self").symlink_to(inside / "self")
    (inside / "dangling.jpg").symlink_to("nowhere.jpg")
    (inside / "to_file.jpg").symlink_to(tmp_path / "outside/c.jpg")
    (inside / "to_folder").symlink_to(tmp_path / "outside", target_is_directory=True)
    os.mkfifo(inside / "pipe.jpg")
    (inside / "folder.jpg").mkdir()
    names = ["a.jpg", "sub/b.jpg", "to_file.jpg", "to_folder/c.jpg", "to_folder/d.jpg"]
    assert relative(scan([str(inside)]).files, inside) == names


def test_any_bytes_are_a_name(tmp_path: Path) -> None:
    names = [b"\xff\xfe.jpg", b"new\nline.jpg", b"-rf.jpg", "\u732b \U0001f408.jpg".encode(), b"%2f.jpg", b"<b>.jpg"]
    names += [b"n" * 251 + b".jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    files = scan([str(tmp_path)]).files
    assert sorted(os.fsencode(file) for file in files) == sorted(os.fsencode(tmp_path) + b"/" + name for name in names)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe.jpg\n")
    assert os.fsencode(scan([str(tmp_path / "list.txt")]).files[0]).endswith(b"/\xff\xfe.jpg")


def test_twenty_thousand_files_take_less_than_a_second(tmp_path: Path) -> None:
    seed = touch(tmp_path, ".seed.jpg") / ".seed.jpg"
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for file in range(1000):
            os.link(seed, f"{tmp_path}/{folder}/{file}.jpg")
    start = time.process_time()
    assert len(scan([str(tmp_path)]).files) == 20_000
    assert time.process_time() - start < 1


def test_errors_say_what_was_found_and_wanted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    touch(data, "train/a.jpg", "notes/a.csv", "notes/b.csv", "notes/.c.jpg")
    (data / "notes/d.jpg").symlink_to("nowhere")
    (data / "empty").mkdir()
    (tmp_path / "bad.txt").write_text("data/train/a.jpg\ndata/train/b.jpg\n")
    (tmp_path / "none.txt").write_text("\n")
    wrong = {
        data / "trian/deeper": r"trian/deeper' does not exist; '.*data' holds 'train'",
        data / "xyz": r"xyz' does not exist; '.*data' holds 'empty', 'notes', 'train'",
        data / "empty": r"no images in '.*empty': found nothing at all; wanted \.jpg, \.jpeg, \.png",
        data / "notes": r"no images in '.*notes': found 2 \.csv, 1 hidden, 1 broken links; wanted \.jpg",
        data / "notes/a.csv": r"a.csv' is no image, folder or \.txt list; wanted \.jpg",
        tmp_path / "bad.txt": r"bad.txt', line 2: 'data/train/b.jpg': No such file",
        tmp_path / "none.txt": r"the list is empty",
    }
    for path, expected in wrong.items():
        assert re.search(expected, message(lambda path=path: scan([str(data / "train"), str(path)])))
    assert "no images given" in message(lambda: scan([]))


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder whose parents anybody may enter, and a process that is not root: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder)


def test_unreadable_folder(as_nobody: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    touch(as_nobody, "a.jpg", "closed/b.jpg")
    (as_nobody / "closed").chmod(0o000)
    os.seteuid(user)
    try:
        assert "closed' cannot be read: Permission denied" in message(lambda: scan([str(as_nobody)]))
    finally:
        os.seteuid(os.getuid())
        (as_nobody / "closed").chmod(0o755)


def test_first_look(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{index:03d}.jpg" for index in range(100)))
    assert re.search(
        r"none of 32 images .* \(of 100\) .* '.*000.jpg': not an image",
        message(lambda: first_look(scan([str(tmp_path)]).files)),
    )
    Image.fromarray(draw(0)).save(tmp_path / "050.jpg")
    first_look(scan([str(tmp_path)]).files)


def test_class_folders_are_split(classes: Path) -> None:
    data = labelled(str(classes), seed=3, val_share=0.25)
    assert data.classes == ("lying", "upright")
    assert len(data.train_files) == 30 and len(data.val_files) == 10
    assert data.train_labels == (0,) * 15 + (1,) * 15 and data.val_labels == (0,) * 5 + (1,) * 5
    assert set(data.train_files) | set(data.val_files) == set(scan([str(classes)]).files)
    pairs = [*zip(data.train_files, data.train_labels, strict=True), *zip(data.val_files, data.val_labels, strict=True)]
    assert all(Path(file).parent.name == data.classes[label] for file, label in pairs)
    assert data == labelled(str(classes), seed=3, val_share=0.25)
    assert data.val_files != labelled(str(classes), seed=4, val_share=0.25).val_files


@pytest.mark.parametrize("val", ["val", "valid", "test"])
def test_train_and_val_folders(val: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/x/1.jpg", "train/b/2.jpg", f"{val}/b/3.jpg")
    data = labelled(str(tmp_path))
    assert data.classes == ("a", "b") and data.train_labels == (0, 0, 1, 1)
    assert data.val_files == (str(tmp_path / val / "b/3.jpg"),) and data.val_labels == (1,)
    assert data.split == f"train/ and {val}/"


def test_train_without_val_is_split(tmp_path: Path) -> None:
    data = labelled(str(touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg")))
    assert data.classes == ("a", "b") and data.train_labels == data.val_labels == (0, 1)


def test_labelled_errors(tmp_path: Path) -> None:
    assert "is not a folder" in message(lambda: labelled(str(tmp_path / "nowhere")))
    assert "but has none" in message(lambda: labelled(str(touch(tmp_path / "flat", "1.jpg", "2.jpg"))))
    assert "but has only 'a'" in message(lambda: labelled(str(touch(tmp_path / "one", "a/1.jpg", "a/2.jpg"))))
    single = touch(tmp_path / "single", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    assert "class 'b' of" in message(lambda: labelled(str(single)))
    names = ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    unknown = touch(tmp_path / "unknown", *(f"train/{name}" for name in names), "val/c/1.jpg")
    assert "class 'c' is not in" in message(lambda: labelled(str(unknown)))
