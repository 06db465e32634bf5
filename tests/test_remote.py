# SPDX-License-Identifier: Apache-2.0
"""Object stores: the same images as in a folder, read by any process, over real HTTP."""

import io
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from buckets import upload

from fastmim.data.prepared.prepare import prepare_images
from fastmim.data.read import BadImage
from fastmim.data.sources import remote
from fastmim.data.sources.scan import first_look, scan
from fastmim.data.table import ImageTable
from fastmim.errors import UserError

# Of botocore and of moto's server, both about their own insides.
pytestmark = [
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def contents(table: ImageTable) -> list[bytes]:
    return [table.read(row) for row in range(len(table))]


def names(table: ImageTable) -> list[str]:
    return [table.name(row) for row in range(len(table))]


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reason(*arguments: Any) -> str:
    with pytest.raises(BadImage) as caught:
        remote.read_object(*arguments)
    return caught.value.reason


def tar(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name in ("b/2.png", "b/1.jpg", "a.jpg", "b-/3.jpg", "c/d/猫 🐈.jpg", "c/a::b.jpg", "c/50%25?x=1#y.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 3)
    for name in ("notes.md", ".hidden.jpg", "b/._1.jpg", "c/.d/x.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_a_bucket_is_like_a_folder(s3: str, tree: Path) -> None:
    upload(tree, "like")
    here, there = scan([str(tree)]), scan(["s3://like/"])
    assert names(there) == names(here) and contents(there) == contents(here) and len(there) == 7
    assert (there.fingerprint, there.formats, there.bytes) == (here.fingerprint, here.formats, here.bytes)
    assert there.path(0) == "s3://like/a.jpg"
    part = scan(["s3://like/c"])
    assert names(part) == [name.removeprefix("c/") for name in names(here) if name.startswith("c/")]
    assert contents(part) == [(tree / "c" / name).read_bytes() for name in names(part)]
    assert contents(scan(["s3://like/b/1.jpg", "s3://like/b", "s3://like/c/d"])) == [
        (tree / name).read_bytes() for name in ("b/1.jpg", "b/2.png", "c/d/猫 🐈.jpg")
    ]


def test_lists_name_objects(s3: str, tree: Path, tmp_path: Path) -> None:
    (tree / "list.csv").write_text("path\nb/1.jpg\ns3://lists/a.jpg\n")
    upload(tree, "lists")
    assert sorted(contents(scan(["s3://lists/list.csv"]))) == [b"a.jpg" * 3, b"b/1.jpg" * 3]
    (tmp_path / "list.txt").write_text("s3://lists/a.jpg\ntree/b/2.png\n")
    table = scan([str(tmp_path / "list.txt")])
    assert contents(table) == [b"a.jpg" * 3, b"b/2.png" * 3] and table.bytes == 36
    (tmp_path / "list.txt").write_text("s3://lists/a.jpg\ns3://lists/none.jpg\n")
    assert "none.jpg" in message(lambda: scan([str(tmp_path / "list.txt")]))


def test_tar_files_in_a_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    content = {f"{index:03d}.jpg": bytes([index]) * 300_000 for index in range(8)}
    (folder / "0.tar").write_bytes(tar(content | {"notes.txt": b"x"}))
    (folder / "1.tar").write_bytes(tar({"x/y.png": b"small", ".z.png": b"hidden"}))
    upload(folder, "shards")
    read = []
    import s3fs

    theirs = s3fs.core.S3File._fetch_range
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", lambda self, a, b: read.append(b - a) or theirs(self, a, b))
    table = scan(["s3://shards"])
    assert names(table) == [*content, "x/y.png"]
    # Headers alone: a small part of the 2.4 MB.
    assert 0 < sum(read) < 0.4 * (folder / "0.tar").stat().st_size
    assert contents(table) == [*content.values(), b"small"]
    assert table.path(8) == "s3://shards/1.tar::x/y.png"
    assert contents(scan(["s3://shards/1.tar"])) == [b"small"]
    (folder / "2.tar").write_bytes((folder / "0.tar").read_bytes()[:1_000_000])
    upload(folder, "cut")
    assert "'s3://cut/2.tar' is a damaged tar file: it ends inside of" in message(lambda: scan(["s3://cut"]))


def _read_in_child(table: ImageTable, sender: Any) -> None:
    sender.send(contents(table))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read(method: str, s3: str, tree: Path) -> None:
    """The parent has connections open when it forks, and goes on using them."""
    upload(tree, f"for-{method}")
    table = scan([f"s3://for-{method}"])
    wanted = contents(table)
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    children = [context.Process(target=_read_in_child, args=(table, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    assert contents(table) == wanted
    for receiver, _ in pipes:
        assert receiver.poll(60) and receiver.recv() == wanted
    for child in children:
        child.join(60)
        assert child.exitcode == 0


def test_what_is_wrong_with_an_object(s3: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "ten.jpg").write_bytes(b"0123456789")
    upload(tmp_path, "wrong")
    assert remote.read_object("s3://wrong/ten.jpg") == b"0123456789"
    assert remote.read_object("s3://wrong/ten.jpg", 3, 4) == b"3456"
    assert reason("s3://wrong/none.jpg") == reason("s3://none-such/x.jpg") == "missing"
    assert reason("s3://wrong/empty.jpg") == "empty"
    assert reason("s3://wrong/ten.jpg", 8, 4) == reason("s3://wrong/ten.jpg", 100, 4) == "truncated"


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/many/x.jpg", b"x" * 100)
    monkeypatch.setattr(remote, "MAX_BYTES", 99)
    assert reason("memory://many/x.jpg") == "too many bytes"
    monkeypatch.setattr(remote, "MAX_BYTES", 100)
    assert len(remote.read_object("memory://many/x.jpg")) == 100


def test_a_moment_of_trouble_is_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/trouble/x.jpg", b"x")
    left = [OSError("reset"), TimeoutError("slow")]
    theirs = type(store).cat_file

    def cat_file(self: Any, *arguments: Any, **options: Any) -> bytes:
        if left:
            raise left.pop()
        return theirs(self, *arguments, **options)

    monkeypatch.setattr(type(store), "cat_file", cat_file)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    assert remote.read_object("memory://trouble/x.jpg") == b"x"
    left[:] = [OSError("reset")] * 3
    assert reason("memory://trouble/x.jpg") == "unreadable"


def test_errors_of_a_bucket_are_one_line(s3: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(tree, "errors")
    assert "'s3://none-such' does not exist" in message(lambda: scan(["s3://none-such"]))
    assert "'s3://errors/trian' does not exist" in message(lambda: scan(["s3://errors/trian"]))
    assert "'s3://errors/x.jpg' does not exist" in message(lambda: scan(["s3://errors/x.jpg"]))
    assert "is compressed" in message(lambda: scan(["s3://errors/x.tar.gz"]))
    assert "s3x://b' is no store that fsspec knows: Protocol not known: s3x" in message(lambda: scan(["s3x://b"]))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        remote._store.cache_clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert "check end point and credentials" in message(lambda: scan(["s3://errors"]))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    script = """if True:
        import sys
        sys.modules["s3fs"] = sys.modules["gcsfs"] = None
        from fastmim.data.sources.scan import scan
        from fastmim.errors import UserError
        for url in ("s3://bucket/x", "gs://bucket/x.jpg"):
            try:
                scan([url])
            except UserError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert "pip install 'fastmim[s3]'" in first and "pip install 'fastmim[gs]'" in second


def test_prepared_sets_in_a_bucket(s3: str, photos: Path, tmp_path: Path) -> None:
    prepare_images([str(photos)], tmp_path / "set/small", resolution=16, workers=0, quiet=True)
    upload(tmp_path / "set", "prepared")
    here, there = scan([str(tmp_path / "set/small")]), scan(["s3://prepared/small"])
    assert there.squares == here.squares and there.squares is not None
    assert contents(there) == contents(here) and there.fingerprint == here.fingerprint
    first_look(there)
    assert "small', inside of 's3://prepared', is a prepared set; give" in message(lambda: scan(["s3://prepared"]))
    assert "mixed with others" in message(lambda: scan(["s3://prepared/small", str(photos)]))


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_stores(protocol: str, tree: Path, photos: Path) -> None:
    shutil.copy(photos / "000.jpg", tree / "b/1.jpg")
    (tree / "c/a::b.jpg").unlink()  # fsspec's own store in memory cannot find it again
    url = f"file://{tree}"
    if protocol == "memory":
        url = f"memory://other{os.getpid()}"
        fsspec.filesystem("memory").put(f"{tree}/", f"/other{os.getpid()}/", recursive=True)
    here, there = scan([str(tree)]), scan([url])
    assert names(there) == names(here) and contents(there) == contents(here)
    first_look(there)
    assert dict(remote.list_objects(url))["b/1.jpg"] == (tree / "b/1.jpg").stat().st_size
    assert [name for name, _ in remote.list_objects(url)] == sorted(name for name, _ in remote.list_objects(url))
