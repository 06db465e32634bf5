# SPDX-License-Identifier: Apache-2.0
"""Folders, files and lists of any kind become the same ordered files everywhere, or one line that says what to do."""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw
from PIL import Image

from fastmim.data.labelled import labelled
from fastmim.data.sources.scan import first_look, scan
from fastmim.data.table import ImageTable
from fastmim.errors import UserError


def touch(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def paths(table: ImageTable) -> list[str]:
    return [table.path(row) for row in range(len(table))]


def relative(table: ImageTable, root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in paths(table)]


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tree_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/c/d/e/3.jpeg", "b/1.jPg", "a.jpg", "z.tif", "b-/1.webp", "ct.dcm", content=b"123")
    touch(tmp_path, "notes.txt", "labels.csv", ".hidden.jpg", "._a.jpg", ".cache/4.jpg", "jpg", "b/README")
    images = scan([str(tmp_path)])
    names = ["a.jpg", "b-/1.webp", "b/1.jPg", "b/2.PNG", "b/c/d/e/3.jpeg", "ct.dcm", "z.tif"]
    assert relative(images, tmp_path) == [images.name(row) for row in range(len(images))] == names
    assert all(Path(file).is_absolute() for file in paths(images))
    assert images.bytes == 21 and images.read(4) == b"123"
    assert images.formats == {"dicom": 1, "jpeg": 3, "png": 1, "tiff": 1, "webp": 1}


def test_order_is_that_of_names(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ["".join(rng.choices("a-./ b~", k=rng.randint(1, 9))).strip("/. ") + ".jpg" for _ in range(300)]
    names = sorted({re.sub("/[./ ]*", "/x", name) for name in names if not name.startswith(".")}, key=os.fsencode)
    tables = []
    for order in (sorted, lambda names: list(reversed(names)), lambda names: rng.sample(names, len(names))):
        root = touch(tmp_path / str(len(tables)), *order(names))
        tables.append(scan([str(root)]))
        assert relative(tables[-1], root) == names
    assert len({table.fingerprint for table in tables}) == 1
    assert max(name.count("/") for name in names) > 1


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert paths(scan(["in"])) == paths(scan([str(tmp_path / "in")])) == [str(tmp_path / "in" / "a.jpg")]
    assert paths(scan(["in/a.jpg"])) == [str(tmp_path / "in" / "a.jpg")]


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
    assert sorted(os.path.realpath(file) for file in paths(listed)) == [
        str(tmp_path / name) for name in ("in/a.jpg", "in/c.jpg", "other/x.png")
    ]
    both = scan([str(tmp_path / "single.gif"), str(tmp_path / "in"), str(tmp_path / "in/b.jpg"), str(tmp_path / "in")])
    assert relative(both, tmp_path) == ["single.gif", "in/a.jpg", "in/b.jpg", "in/c.jpg"]


def test_overlapping_paths_give_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/b.jpg", "in/deep/c.png", "more/d.jpg")
    (tmp_path / "link").symlink_to("in", target_is_directory=True)
    (tmp_path / "list.txt").write_text(f"link/a.jpg\n{tmp_path}/in/b.jpg\nin/../in/deep/c.png\nmore/d.jpg\n")
    inside = [str(tmp_path / "in" / name) for name in ("a.jpg", "b.jpg", "deep/c.png")]
    whole, deep, link, listed = (str(tmp_path / name) for name in ("in", "in/deep", "link", "list.txt"))
    assert paths(scan([whole, deep])) == paths(scan([whole, link])) == inside
    assert sorted(paths(scan([deep, whole]))) == inside and scan([deep, whole]).name(0) == "c.png"
    both = scan([whole, listed])
    assert paths(both) == [*inside, str(tmp_path / "more/d.jpg")] and both.formats == {"jpeg": 3, "png": 1}
    assert paths(scan([*reversed(inside), *inside])) == inside[::-1]
    assert len(scan([listed, whole])) == 4


def test_a_folder_that_holds_only_itself(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    assert "found nothing at all" in message(lambda: scan([str(tmp_path)]))
    assert "found nothing at all" in message(lambda: scan([str(tmp_path), str(tmp_path)]))


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
    assert relative(scan([str(inside)]), inside) == names


def test_any_bytes_are_a_name(tmp_path: Path) -> None:
    names = [b"\xff\xfe.jpg", b"new\nline.jpg", b"-rf.jpg", "\u732b \U0001f408.jpg".encode(), b"%2f.jpg", b"<b>.jpg"]
    names += [b"n" * 251 + b".jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    table = scan([str(tmp_path)])
    assert [os.fsencode(file) for file in paths(table)] == [
        os.fsencode(tmp_path) + b"/" + name for name in sorted(names)
    ]
    assert {table.read(row) for row in range(len(table))} == {b"x"}
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe.jpg\n")
    assert os.fsencode(paths(scan([str(tmp_path / "list.txt")]))[0]).endswith(b"/\xff\xfe.jpg")
    (tmp_path / "list.csv").write_bytes(b'path\n"new\nline.jpg"\n\xff\xfe.jpg\n\xe7\x8c\xab \xf0\x9f\x90\x88.jpg\n')
    listed = paths(scan([str(tmp_path / "list.csv")]))
    assert [os.fsencode(Path(file).name) for file in listed] == sorted(names[i] for i in (0, 1, 3))


def test_very_deep_folders(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    depth = (4096 - len(str(folder)) - 20) // 2  # as deep as a path can be
    assert depth > sys.getrecursionlimit()
    try:
        number = os.open(folder, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d", dir_fd=number)
            number, above = os.open("d", os.O_RDONLY, dir_fd=number), number
            os.close(above)
        os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=number))
        os.close(number)
        table = scan([str(folder)])
        assert [table.name(row) for row in range(len(table))] == ["d/" * depth + "x.jpg"]
    finally:
        subprocess.run(["rm", "-r", folder], check=True)  # shutil.rmtree and pytest cannot


def test_many_files_take_little_time_and_memory(tmp_path: Path) -> None:
    seed = touch(tmp_path, ".seed.jpg") / ".seed.jpg"
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for file in range(1000):
            os.link(seed, f"{tmp_path}/{folder}/{file}.jpg")
    script = """if True:
        import resource, sys, time
        from fastmim.data.sources.scan import scan
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        table = scan(sys.argv[1:])
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(len(table), seconds, grown, "torch" in sys.modules)
    """
    call = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
    count, seconds, grown, torch = done.stdout.split()
    assert (count, torch) == ("20000", "False")
    assert float(seconds) < 0.5
    assert int(grown) < 5e6  # 44 bytes for each row, the name, and the names of one folder


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
        message(lambda: first_look(scan([str(tmp_path)]))),
    )
    Image.fromarray(draw(0)).save(tmp_path / "050.jpg")
    first_look(scan([str(tmp_path)]))


def test_class_folders_are_split(classes: Path) -> None:
    data = labelled(str(classes), seed=3, val_share=0.25)
    assert data.classes == ("lying", "upright")
    train, val = paths(data.train), paths(data.val)
    assert len(train) == 30 and len(val) == 10
    assert data.train_labels == (0,) * 15 + (1,) * 15 and data.val_labels == (0,) * 5 + (1,) * 5
    assert set(train) | set(val) == set(paths(scan([str(classes)])))
    pairs = [*zip(train, data.train_labels, strict=True), *zip(val, data.val_labels, strict=True)]
    assert all(Path(file).parent.name == data.classes[label] for file, label in pairs)
    again, other = (labelled(str(classes), seed=seed, val_share=0.25) for seed in (3, 4))
    assert (paths(again.train), paths(again.val), again.split) == (train, val, data.split)
    assert paths(other.val) != val


@pytest.mark.parametrize("val", ["val", "valid", "test"])
def test_train_and_val_folders(val: str, tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/a/1.jpg",
        "train/a/2.jpg",
        "train/b/x/1.jpg",
        "train/b/2.jpg",
        f"{val}/b/3.jpg",
        f"{val}/a/4.jpg",
    )
    data = labelled(str(tmp_path))
    assert data.classes == ("a", "b") and data.train_labels == (0, 0, 1, 1)
    assert paths(data.val) == [str(tmp_path / val / name) for name in ("a/4.jpg", "b/3.jpg")]
    assert data.val_labels == (0, 1)
    assert data.split == f"train/ and {'test' if val == 'test' else 'val'}/"


def test_train_without_val_is_split(tmp_path: Path) -> None:
    data = labelled(str(touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg")))
    assert data.classes == ("a", "b") and data.train_labels == data.val_labels == (0, 1)


def test_labelled_errors(tmp_path: Path) -> None:
    assert "nowhere' does not exist" in message(lambda: labelled(str(tmp_path / "nowhere")))
    assert "but has none" in message(lambda: labelled(str(touch(tmp_path / "flat", "1.jpg", "2.jpg"))))
    assert "but has only 'a'" in message(lambda: labelled(str(touch(tmp_path / "one", "a/1.jpg", "a/2.jpg"))))
    single = touch(tmp_path / "single", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    assert "class 'b' of" in message(lambda: labelled(str(single)))
    names = ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    unknown = touch(tmp_path / "unknown", *(f"train/{name}" for name in names), "val/c/1.jpg")
    assert "class 'c' of val is not in train" in message(lambda: labelled(str(unknown)))
