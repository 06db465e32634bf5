# SPDX-License-Identifier: Apache-2.0
"""Lists, tar files and datasets: each row's bytes are those of its image, and whatever is wrong is one line."""

import gzip
import io
import os
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import draw
from PIL import Image

from fastmim.data.prepared.prepare import prepare_images
from fastmim.data.sources.archives import tar_members
from fastmim.data.sources.scan import first_look, scan
from fastmim.data.table import WHOLE, ImageTable
from fastmim.errors import UserError


def names(table: ImageTable) -> list[str]:
    return [table.name(row) for row in range(len(table))]


def contents(table: ImageTable) -> list[bytes]:
    return [table.read(row) for row in range(len(table))]


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(*paths: Path) -> str:
    return message(lambda: scan([str(path) for path in paths]))


# ---- Lists


@pytest.fixture
def three(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg", "c,d;e.png"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        'id,path,label\n1,in/b.jpg,cat\n2,in/a.jpg,dog\n3,"in/c,d;e.png",\n4,in/a.jpg,again\n',
        '\ufeffFile;x\r\nin/a.jpg;1,5\r\nin/b.jpg;2\r\n\r\n"in/c,d;e.png";3\r\n',
        "label\tfilename\n1\tin/a.jpg\n2\tin/b.jpg\n3\tin/c,d;e.png\n",
        'picture\nin/a.jpg\n"in/c,d;e.png"\nin/b.jpg',
        'image,path\nnothing.jpg,in/a.jpg\n,in/b.jpg\n,"in/c,d;e.png"\n',
    ],
)
def test_csv_lists(three: Path, text: str) -> None:
    (three / "list.csv").write_text(text, encoding="utf-8")
    table = scan([str(three / "list.csv")])
    assert names(table) == ["in/a.jpg", "in/b.jpg", "in/c,d;e.png"]
    assert contents(table) == [b"a.jpg", b"b.jpg", b"c,d;e.png"]
    assert table.formats == {"jpeg": 2, "png": 1} and table.bytes == 19


def test_csv_errors(three: Path) -> None:
    wrong = {
        "a,b\n1,2\n": r"has no column of paths: found 'a', 'b'; wanted one called path, file, filename, image",
        "in/a.jpg\nin/b.jpg\n": "the first row must name the columns, such as path, but holds an image",
        "path,label\nin/a.jpg,1\nin/z.jpg,2\n": "line 3: 'in/z.jpg': No such file or directory; lines are paths",
        "label,path\n1,in/a.jpg\n2\n": "line 3: nothing in column 'path'",
        'path\n"in/a.jpg\n': "line 2: unexpected end of data; wanted comma-separated values",
        "path\nin/notes.txt\n": "line 2: 'in/notes.txt' is no image; wanted .jpg",
        "path\nin\0.jpg\n": "embedded null byte",
        "": "has no column of paths: found nothing at all",
        "path\n": "the list is empty",
    }
    for text, expected in wrong.items():
        (three / "list.csv").write_text(text)
        assert expected in refused(three / "list.csv")


def test_lists_of_absolute_paths(three: Path) -> None:
    (three / "elsewhere").mkdir()
    (three / "elsewhere/list.txt").write_text(f"../in/a.jpg\n{three}/in/b.jpg\n../in/a.jpg\n")
    table = scan([str(three / "elsewhere/list.txt")])
    assert sorted(contents(table)) == [b"a.jpg", b"b.jpg"]
    assert f"{three}/in/b.jpg" in [table.path(row) for row in range(2)]


# ---- Tar files


def members(seed: int = 0) -> dict[str, bytes]:
    """Names that each format of tar files writes in another way, and data of all lengths around a block's."""
    rng = random.Random(seed)
    long = "/".join("folder" * 5 for _ in range(9))
    found = ["a.jpg", "n" * 95 + ".jpg", f"{long}/x.png", "猫 🐈.jpg", "bytes\udcff.webp", "new\nline.jpg", "f/b.TIF"]
    return {name: rng.randbytes(size) for name, size in zip(found, (1, 511, 512, 513, 5000, 0, 1024), strict=True)}


def write_tar(path: Path, content: dict[str, bytes], form: int, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_tar_files(form: str, tmp_path: Path) -> None:
    content = members()
    if form == "ustar":  # it has no room for this one
        content = {name: data for name, data in content.items() if len(name) < 250}
    path = write_tar(tmp_path / "some.tar", content | {"notes.txt": b"x", "._a.jpg": b"x"}, FORMATS[form])
    table = scan([str(path)])
    assert names(table) == list(content)
    assert [table.containers[number] for number in table.container] == [str(path)] * len(content)
    assert table.path(0) == f"{path}::a.jpg"
    for row, (name, data) in enumerate(content.items()):
        assert table.size[row] == len(data) and (not data or table.read(row) == data), name
    with tarfile.open(path) as tar:
        theirs = [(os.fsencode(member.name), member.offset_data, member.size) for member in tar]
    assert list(tar_members(str(path))) == theirs


def test_everything_but_regular_files_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    (tmp_path / "x.jpg").write_bytes(b"x" * 700)
    (tmp_path / "z.jpg").write_bytes(b"z" * 700)
    os.link(tmp_path / "x.jpg", tmp_path / "y.jpg")
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("device.jpg", tarfile.CHRTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.add(tmp_path / "x.jpg", "./f/x.jpg")
        tar.add(tmp_path / "y.jpg", "y.jpg")  # a hard link to the one before
        header = tarfile.TarInfo("sparse.jpg")
        header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        block[482] = 1  # the map of holes goes on in another block
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        tar.fileobj.write(block + bytes(512) + b"s" * 512)
        tar.offset += 3 * 512
        info = tarfile.TarInfo("sparse2.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        tar.addfile(info)
        tar.add(tmp_path / "z.jpg", "last.jpg")
    table = scan([str(path)])
    assert names(table) == ["f/x.jpg", "last.jpg"]
    assert contents(table) == [b"x" * 700, b"z" * 700]


def test_hostile_names_are_only_names(tmp_path: Path) -> None:
    content = {"../../up.jpg": b"1", "/etc/absolute.jpg": b"2", "a/../../b.jpg": b"3", "..%2f.jpg": b"4"}
    path = write_tar(tmp_path / "in.tar", content, tarfile.PAX_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    table = scan([str(path)])
    # The last one begins with a dot, so it is hidden.
    assert names(table) == list(content)[:3] and contents(table) == [b"1", b"2", b"3"]
    assert table.path(1) == f"{path}::/etc/absolute.jpg"
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_shards(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b/001.tar", {"000.jpg": b"3", "000.json": b"{}"}, tarfile.USTAR_FORMAT)
    write_tar(tmp_path / "000.tar", {"001.jpg": b"1", "000.jpg": b"2"}, tarfile.USTAR_FORMAT)
    (tmp_path / "000.parquet").write_bytes(b"labels, not images")
    table = scan([str(tmp_path)])
    assert names(table) == ["001.jpg", "000.jpg", "000.jpg"] and contents(table) == [b"1", b"2", b"3"]
    twice = scan([str(tmp_path), str(tmp_path / "b/001.tar")])
    assert contents(twice) == [b"1", b"2", b"3"] and twice.formats == {"jpeg": 3}
    (tmp_path / "plain.jpg").write_bytes(b"0")
    assert contents(scan([str(tmp_path)])) == [b"0", b"1", b"2", b"3"]


def test_damaged_tar_files(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", members(), tarfile.GNU_FORMAT).read_bytes()
    first = tarfile.TarInfo("a.jpg")

    def header(**changes: Any) -> bytes:
        block = bytearray(first.tobuf(tarfile.GNU_FORMAT))
        for place, value in changes.values():
            block[place : place + len(value)] = value
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        return bytes(block)

    wrong = {
        b"": "it is empty",
        whole[:1500]: "it ends inside of",
        whole[:512]: "it ends inside of",
        whole[:512] + b"\xff" * 512 + whole[1024:]: None,  # the data of the first member may be anything
        whole[:1024] + b"\xff" * 512 + whole[1536:]: "no header at byte 1024",
        b"\xff\xd8\xff" * 1000: "no header at byte 0",
        header(size=(124, b"\xff" * 12)) + bytes(1024): "it ends inside of what begins at byte 0",
        header(size=(124, b"\x80" + b"\xff" * 11)) + bytes(1024): "it ends inside of what begins at byte 0",
        header(size=(124, b"77777777777\0"), kind=(156, b"L")) + bytes(1024): "it ends inside of",
        header(size=(124, b"00000000020\0"), kind=(156, b"x")) + b"99 path=x.jpg\n\0\0" + bytes(2000): "makes no sense",
        header(size=(124, b"00000000020\0"), kind=(156, b"x")) + b"16 size=-999999\n" + bytes(2000): "makes no sense",
        gzip.compress(whole): "is compressed, so that no image in it can be read alone; unpack it",
    }
    bad = tmp_path / "in" / "bad.tar"
    bad.parent.mkdir()
    for content, reason in wrong.items():
        bad.write_bytes(content)
        if reason is None:
            assert len(scan([str(bad)])) == 7
            continue
        for path in (bad, bad.parent):
            assert f"{str(bad)!r} is" in refused(path) and reason in refused(path)
    bad.write_bytes(bytes(10240))
    assert "no images in" in refused(bad) and "found 1 .tar" in refused(bad.parent)
    write_tar(bad, {"a.txt": b"", "b.txt": b"", ".c.jpg": b""}, tarfile.PAX_FORMAT)
    assert "found 2 .txt, 1 hidden; wanted .jpg" in refused(bad)


def test_any_bytes_end_as_a_list_or_one_line(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "whole.tar", members(), tarfile.PAX_FORMAT).read_bytes())
    rng = random.Random(1)
    bad = tmp_path / "bad.tar"
    good = 0
    for _ in range(400):
        content = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
        for _ in range(rng.randrange(1, 4)):
            if content:
                begin = rng.randrange(len(content)) // 512 * 512 + rng.randrange(512)
                content[begin : begin + rng.choice((1, 8, 12))] = rng.randbytes(8)
        bad.write_bytes(content)
        try:
            good += all(offset + size <= len(content) for _, offset, size in tar_members(str(bad)))
        except UserError as error:
            assert "\n" not in str(error)
    assert 10 < good < 390


# ---- datasets


@pytest.fixture
def pictures() -> list[bytes]:
    """Encoded images of several formats and sizes."""
    found = []
    for index in range(30):
        file = io.BytesIO()
        Image.fromarray(draw(index, 16 + index)).save(file, ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")[index % 6])
        found.append(file.getvalue())
    return found


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of what it imports
        module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


def make(datasets: Any, rows: list[dict[str, Any] | None], **columns: list[Any]) -> Any:
    features = datasets.Features({"image": datasets.Image()} | {name: datasets.Value("int64") for name in columns})
    return datasets.Dataset.from_dict({"image": rows, **columns}, features=features)


def test_saved_datasets(datasets: Any, pictures: list[bytes], tmp_path: Path) -> None:
    rows = [{"bytes": content, "path": f"{row}.jpeg" if row % 2 else None} for row, content in enumerate(pictures)]
    data = make(datasets, rows, label=list(range(30)))
    # Several files, and small batches in them.
    data.save_to_disk(tmp_path / "one", num_shards=3)
    table = scan([str(tmp_path / "one")])
    assert contents(table) == pictures
    assert len(table.containers) == 3 and all(file.endswith(".arrow") for file in table.containers)
    assert names(table)[:5] == [f"data/{row:08d}.{s}" for row, s in enumerate(("jpg", "jpeg", "webp", "jpeg", "tif"))]
    assert table.formats == {"jpeg": 20, "tiff": 5, "webp": 5}
    first_look(table)
    # A choice of rows in another order is written out by save_to_disk.
    data.shuffle(seed=1).select(range(20)).save_to_disk(tmp_path / "mixed")
    assert sorted(contents(scan([str(tmp_path / "mixed")]))) == sorted(
        pictures[label] for label in data.shuffle(seed=1)["label"][:20]
    )


def test_all_splits_are_taken(datasets: Any, pictures: list[bytes], tmp_path: Path) -> None:
    rows = [{"bytes": content, "path": None} for content in pictures]
    parts = {"train": make(datasets, rows[:20]), "test": make(datasets, rows[20:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    table = scan([str(tmp_path / "both")])
    assert contents(table) == pictures[20:] + pictures[:20]
    assert names(table)[0].startswith("test/00000000.") and names(table)[29].startswith("train/00000019.")
    assert contents(scan([str(tmp_path / "both/train")])) == pictures[:20]
    assert len(scan([str(tmp_path / "both"), str(tmp_path / "both/test")])) == 30


def test_rows_without_image_and_compressed_files(datasets: Any, pictures: list[bytes], tmp_path: Path) -> None:
    import pyarrow as pa

    rows: list[Any] = [{"bytes": content, "path": None} for content in pictures]
    rows[3] = rows[7] = None
    make(datasets, rows).save_to_disk(tmp_path / "some")
    (file,) = (tmp_path / "some").glob("*.arrow")
    kept = [content for row, content in enumerate(pictures) if row not in (3, 7)]
    assert contents(scan([str(tmp_path / "some")])) == kept
    assert "data/00000004" in names(scan([str(tmp_path / "some")]))[3]
    rows[7] = {"bytes": None, "path": None}
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    for compression, batch in ((None, 7), ("zstd", 100)):
        table = pa.table({"image": image})
        with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table, max_chunksize=batch)
        if compression is None:
            assert contents(scan([str(tmp_path / "some")])) == kept
        else:
            assert "are compressed in the Arrow file; load it with datasets" in refused(tmp_path / "some")


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_parquet_files(kind: str, datasets: Any, pictures: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "there.jpg").write_bytes(pictures[0])
    rows: list[Any] = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(pictures)]
    rows[5] = {"bytes": None, "path": str(tmp_path / "there.jpg")}
    for part in range(3):
        import pyarrow as pa
        import pyarrow.parquet

        image = pa.array(
            rows[part * 10 : part * 10 + 10], pa.struct({"bytes": getattr(pa, kind)(), "path": pa.string()})
        )
        pa.parquet.write_table(pa.table({"image": image, "n": list(range(10))}), folder / f"{part}.parquet")
    wanted = [*pictures[:5], pictures[0], *pictures[6:]]
    table = scan([str(folder)])
    assert contents(table) == wanted and (table.offset == WHOLE).tolist() == [row == 5 for row in range(30)]
    assert table.path(5) == str(tmp_path / "there.jpg") and names(table)[29] == "data/00000029.png"
    assert contents(scan([str(folder / "1.parquet")])) == pictures[10:20]
    (tmp_path / "there.jpg").unlink()
    assert "row data/00000005 of" in refused(folder) and "No such file" in refused(folder)
    (folder / "1.parquet").write_bytes(b"PAR1 no more")
    assert "the .parquet files in" in refused(folder) and "cannot be read" in refused(folder)


def test_columns_of_images(datasets: Any, pictures: list[bytes], tmp_path: Path) -> None:
    row = {"bytes": pictures[0], "path": None}
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), "n": datasets.Value("int64")})
    two = datasets.Dataset.from_dict({"left": [row], "right": [row], "n": [1]}, features=features)
    two.save_to_disk(tmp_path / "two")
    assert "has 2 columns of images: found 'left' (Image), 'right' (Image), 'n' (Value)" in refused(tmp_path / "two")
    two.rename_column("right", "image").save_to_disk(tmp_path / "named")
    assert contents(scan([str(tmp_path / "named")])) == pictures[:1]
    two.remove_columns(["left", "right"]).save_to_disk(tmp_path / "none")
    assert "has no columns of images: found 'n' (Value); wanted one of the type Image" in refused(tmp_path / "none")
    (tmp_path / "named/dataset_info.json").write_text("{")
    assert "the datasets folder" in refused(tmp_path / "named") and "cannot be read" in refused(tmp_path / "named")


# ---- Prepared sets


def test_prepared_sets_stand_alone(photos: Path, tmp_path: Path) -> None:
    prepare_images([str(photos)], tmp_path / "in/small", resolution=16, workers=0, quiet=True)
    (tmp_path / "in/more").mkdir()
    (tmp_path / "in/more/x.jpg").write_bytes(b"x")
    table = scan([str(tmp_path / "in/small")])
    assert table.squares is not None and table.squares.side == 32 and len(table) == 40
    first_look(table)
    alone = "is a prepared set, which cannot be mixed with others; give it alone"
    assert alone in refused(tmp_path / "in/small", photos) and alone in refused(photos, tmp_path / "in/small")
    assert "small', inside of" in refused(tmp_path / "in") and "is a prepared set; give it alone" in refused(
        tmp_path / "in"
    )
    (tmp_path / "in/more/prepared-by.json").write_text("{}")  # the name alone makes no set
    assert names(scan([str(tmp_path / "in/more")])) == ["x.jpg"]
