# SPDX-License-Identifier: Apache-2.0
"""Copies of shards: one download however many processes ask, never a damaged one, never more than fits."""

import hashlib
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmim.data.prepared import shard_cache
from fastmim.data.prepared.plan import Options
from fastmim.data.prepared.prepare import prepare
from fastmim.data.prepared.records import FileSum
from fastmim.data.prepared.shard_cache import ShardCache
from fastmim.data.prepared.shards import decode_square, is_prepared, load_prepared, load_sums
from fastmim.data.read import read_range
from fastmim.data.sources import remote
from fastmim.data.table import from_names
from fastmim.errors import UserError

s3fs = pytest.importorskip("s3fs")
FORK = multiprocessing.get_context("fork")


class Store:
    """An object store that speaks enough of S3, counts requests, and fails when told to."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail = 0
        """So many requests fail."""
        self.pause = 0.0
        """Seconds that each takes."""
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> tuple[str, FileSum]:
        self.objects[f"/shards/{name}"] = content
        return f"s3://shards/{name}", FileSum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            with here.lock:
                failing = body and here.fail > 0
                here.fail -= failing
                if body:
                    here.requests.append(path)
            time.sleep(here.pause)
            content = here.objects.get(path)
            if failing or content is None:
                self.send_response(403 if failing else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size, part = len(content), content
            if found := self.headers.get("Range"):
                first, _, last = found.removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Store(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_store(monkeypatch, here.url)
    monkeypatch.setattr(shard_cache, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(shard_cache, "PIECE", 1 << 16)
    yield here
    server.shutdown()
    server.server_close()


def use_store(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    # A store's client is kept, and asks the end point that it was made for.
    s3fs.S3FileSystem.clear_instance_cache()
    remote._store.cache_clear()


def noise(seed: int, size: int = 200_000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def age(path: str | Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_shard_is_downloaded_once_in_pieces(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    cache = ShardCache(tmp_path, 10**9, {url: total})
    path = cache.local(url)
    assert Path(path).read_bytes() == noise(0)
    assert store.requests == ["/shards/a.tar"] * 4
    assert cache.local(url) == cache.fetch(url, total.bytes, total.sha256) == path
    assert ShardCache(tmp_path, 10**9, {url: total}).local(url) == path
    assert len(store.requests) == 4
    assert [one.name for one in tmp_path.iterdir()] == [Path(path).name]


def ask(cache: ShardCache, url: str, answers: Any) -> None:
    answers.put(Path(cache.local(url)).read_bytes())


def test_processes_and_threads_share_one_download(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    cache, answers = ShardCache(tmp_path, 10**9, {url: total}), FORK.SimpleQueue()
    store.pause = 0.05
    cache.prefetch([url, url])
    processes = [FORK.Process(target=ask, args=(cache, url, answers), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    assert all(answers.get() == noise(0) for _ in processes)
    for process in processes:
        process.join()
    assert len(store.requests) == 4 and len(copies(tmp_path)) == 1


def test_least_recently_used_copies_go_first(store: Store, tmp_path: Path) -> None:
    pairs = [store.put(f"{number}.tar", noise(number)) for number in range(4)]
    cache = ShardCache(tmp_path, 450_000, dict(pairs))
    paths = [cache.local(url) for url, _ in pairs[:2]]
    age(paths[0], 100)
    age(paths[1], 200)
    third = cache.local(pairs[2][0])
    assert copies(tmp_path) == sorted(map(Path, (paths[0], third)))
    # What was just used stays, even if all together are too many.
    age(paths[0], 5)
    fourth = cache.local(pairs[3][0])
    assert copies(tmp_path) == sorted(map(Path, (paths[0], third, fourth)))


def test_a_removed_copy_takes_no_room_even_while_it_is_open(store: Store, tmp_path: Path) -> None:
    (first, _), (second, _) = pairs = [store.put(f"{number}.tar", noise(number)) for number in range(2)]
    cache = ShardCache(tmp_path, 300_000, dict(pairs))
    path = cache.local(first)
    with Path(path).open("rb") as file:
        age(path, 100)
        cache.local(second)
        assert os.fstat(file.fileno()).st_blocks == 0
    again = ShardCache(tmp_path, 600_000, dict(pairs)).local(first)
    assert again != path, "a reader of the old name would read the old, emptied file"
    assert read_range(again, 0, 200_000) == noise(0)


def test_a_copy_that_is_found_is_marked_as_used(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    path = ShardCache(tmp_path, 10**9, {url: total}).local(url)
    age(path, 100)
    ShardCache(tmp_path, 10**9, {url: total}).local(url)
    assert time.time() - Path(path).stat().st_mtime < 50


def test_what_a_dead_download_left_does_not_count(store: Store, tmp_path: Path) -> None:
    (first, total), (second, _) = pairs = [store.put(f"{number}.tar", noise(number)) for number in range(2)]
    cache = ShardCache(tmp_path, 300_000, dict(pairs))
    digest = Path(cache.local(first)).name.partition(".")[0]
    copies(tmp_path)[0].unlink()
    scratch = tmp_path / f"{digest}.tmp"
    scratch.write_bytes(noise(0)[:50_000])
    assert Path(cache.fetch(first, total.bytes, total.sha256)).read_bytes() == noise(0)
    assert not scratch.exists()
    other = tmp_path / "0123.tmp"
    other.write_bytes(bytes(200_000))
    age(other, 100)
    age(copies(tmp_path)[0], 50)
    cache.local(second)
    assert not other.exists()


def test_errors_that_pass_are_outlived(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    store.fail = 2
    assert Path(ShardCache(tmp_path, 10**9, {url: total}).local(url)).read_bytes() == noise(0)


def test_errors_that_stay_are_one_line(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    cache = ShardCache(tmp_path, 10**9, {url: total})
    store.fail = 10**6
    with pytest.raises(UserError, match=r"^'s3://shards/a.tar' cannot be downloaded: unreadable \(from byte 0 on\)"):
        cache.local(url)
    assert not list(tmp_path.iterdir())
    store.fail = 0
    assert Path(cache.local(url)).read_bytes() == noise(0)
    with pytest.raises(UserError, match=r"'s3://shards/none.tar' cannot be downloaded: missing"):
        cache.fetch("s3://shards/none.tar", 10, None)


def test_a_damaged_shard_is_asked_for_again_and_then_refused(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    store.objects["/shards/a.tar"] = noise(1)
    cache = ShardCache(tmp_path, 10**9, {url: total})
    with pytest.raises(UserError, match=r"'s3://shards/a.tar' is damaged: its SHA-256 is"):
        cache.local(url)
    assert len(store.requests) == 4 * 4 and not list(tmp_path.iterdir())
    store.objects["/shards/a.tar"] = noise(0)[:-1]
    with pytest.raises(UserError, match=r"'s3://shards/a.tar' cannot be downloaded: truncated"):
        cache.local(url)
    assert not list(tmp_path.iterdir())


def test_a_changed_set_meets_no_old_copy(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    ShardCache(tmp_path, 10**9, {url: total}).local(url)
    url, total = store.put("a.tar", noise(1))
    assert Path(ShardCache(tmp_path, 10**9, {url: total}).local(url)).read_bytes() == noise(1)


def test_prefetched_shards_are_there_before_they_are_asked_for(store: Store, tmp_path: Path) -> None:
    pairs = [store.put(f"{number}.tar", noise(number, 1000)) for number in range(10)]
    cache = ShardCache(tmp_path, 10**9, dict(pairs))
    cache.prefetch([*(url for url, _ in pairs), "s3://shards/unknown.tar"])
    until = time.monotonic() + 20
    while len(copies(tmp_path)) < 10:
        assert time.monotonic() < until
        time.sleep(0.01)
    asked = len(store.requests)
    cache.prefetch(url for url, _ in pairs)
    assert all(Path(cache.local(url)).stat().st_size == 1000 for url, _ in pairs)
    assert len(store.requests) == asked == 10


def test_a_folder_that_cannot_be_written_to_is_one_line(store: Store, tmp_path: Path) -> None:
    url, total = store.put("a.tar", noise(0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the shard cache .* cannot be written to: "):
        ShardCache(tmp_path / "file", 10**9, {url: total}).local(url)


def test_a_set_in_an_object_store_is_read(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole set on moto's S3: index, sizes, squares and copies, in forked processes too."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        use_store(monkeypatch, f"http://127.0.0.1:{port}")
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="shards")
        names = sorted(path.name for path in photos.iterdir())
        table = from_names(str(photos), names, [(photos / name).stat().st_size for name in names])
        prepare(table, tmp_path / "set", Options(size=32, shard_images=16), workers=0, quiet=True)
        for path in (tmp_path / "set").iterdir():
            client.upload_file(str(path), "shards", f"some/set/{path.name}")
        check_remote("s3://shards/some/set", tmp_path, names)
        client.delete_object(Bucket="shards", Key="some/set/shard-00001.tar")
        with pytest.raises(UserError, match=r"damaged: shard-00001.tar is missing"):
            load_prepared("s3://shards/some/set")
        assert not is_prepared("s3://shards/some")
    finally:
        server.stop()


def check_remote(place: str, folder: Path, names: list[str]) -> None:
    assert is_prepared(place)
    there, here = load_prepared(place + "/"), load_prepared(str(folder / "set"))
    assert there.fingerprint == here.fingerprint and there.source == here.source
    assert [there.name(row) for row in range(40)] == names
    assert there.containers[1] == f"{place}/shard-00001.tar" and there.read(20) == here.read(20)
    cache, answers = ShardCache(folder / "cache", 10**9, load_sums(there)), FORK.SimpleQueue()
    cache.prefetch(there.containers[:1])
    processes = [FORK.Process(target=ask, args=(cache, url, answers), daemon=True) for url in there.containers]
    for process in processes:
        process.start()
    sizes = {len(answers.get()) for _ in processes}
    for process in processes:
        process.join()
    assert sizes == {Path(path).stat().st_size for path in here.containers}
    shard = there.containers[there.container[39]]
    copy = read_range(cache.local(shard), int(there.offset[39]), int(there.size[39]))
    assert here.squares is not None and decode_square(copy, here.squares).shape == (3, 32, 32)
    shutil.rmtree(folder / "cache")
