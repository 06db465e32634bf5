# SPDX-License-Identifier: Apache-2.0
"""Features in files: what they hold, that no kill changes a bit of them, and what is refused."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from test_resume import child, wait_for
from torch import Tensor, nn

import fastmim
from fastmim.cli import main
from fastmim.contact_sheet import tiled
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.data.sources.scan import scan
from fastmim.embedding import embed as embedding
from fastmim.embedding import map as mapping
from fastmim.embedding.embed import Interrupted, weights_sum
from fastmim.embedding.folders import class_folders
from fastmim.embedding.parts import Parts
from fastmim.embedding.pictures import evenly, neighbours
from fastmim.errors import UserError
from fastmim.run_network import trained_network
from fastmim.tasks.features import features, tokens

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resolution": 32, "decoder_dim": 32, "global_batch": 16, "epochs": 1, "device": "cpu", "workers": 0,
    "tensorboard": False,
}  # fmt: skip
PLAIN: dict[str, Any] = {"pictures": False, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> fastmim.Run:
    return fastmim.pretrain(data=str(photos), out=tmp_path_factory.mktemp("runs") / "run", **TINY)


@pytest.fixture(scope="module")
def other(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> fastmim.Run:
    return fastmim.pretrain(data=str(photos), out=tmp_path_factory.mktemp("runs") / "run", seed=1, **TINY)


@pytest.fixture(scope="module")
def odd(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, two that cannot be read (one batch of two is nothing else), and names that files must survive."""
    folder = tmp_path_factory.mktemp("odd")
    for index in range(12):
        name = {3: 'a, "3"', 4: "b\n4", 5: os.fsdecode(b"c\xff5"), 6: "d;6 "}.get(index, f"{index:02d}")
        Image.fromarray(draw(index)).save(folder / f"{name}.png")
    for name in ("02.png", "03.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def expected(run: fastmim.Run, data: Path, batch: int = 64, pooling: Any = None) -> tuple[list[str], Tensor]:
    """What `features` says of the images, with their paths."""
    config, table = run.config, scan([str(data)])
    assert config.data.mean is not None and config.data.std is not None
    loader = EvalLoader(Pictures(table), resolution=32, batch_size=batch)
    network = trained_network(run, None, 32)
    words = {} if pooling is None else {"pooling": pooling}
    found, _ = features(network, loader, torch.device("cpu"), config.data.mean, config.data.std, **words)
    rows = [row for row in range(len(table)) if table.path(row) not in loader.bad]
    return [table.path(row) for row in rows], found


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["embed", *argv]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err.strip().removeprefix("fastmim: ")


# ---- What the files hold


def test_npz_holds_what_features_says_in_the_order_of_paths(run: fastmim.Run, photos: Path, tmp_path: Path) -> None:
    done = fastmim.embed(run, str(photos), out=tmp_path / "a.npz", **PLAIN)
    paths, found = expected(run, photos)
    file = load(tmp_path / "a.npz")
    assert file["paths"].tolist() == paths == sorted(paths) and len(paths) == 40
    assert file["features"].dtype == np.float32 and np.array_equal(file["features"], found.numpy())
    assert (done.images, done.dim, done.bad, done.pictures, done.complete) == (40, 32, 0, (), False)
    meta = json.loads(str(file["meta"]))
    assert (meta["resolution"], meta["pool"], meta["count"], meta["dim"], meta["bad"]) == (32, "mean", 40, 32, 0)
    assert meta["weights"] == weights_sum(trained_network(run, None, 32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"], "nothing else is left"


def test_formats_agree_and_odd_names_come_back(run: fastmim.Run, odd: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    for ending in ("npz", "csv", "parquet"):
        done = fastmim.embed(run, str(odd), out=tmp_path / f"a.{ending}", batch_size=2, **PLAIN)
        assert (done.images, done.bad) == (11, 2)
    file = load(tmp_path / "a.npz")
    paths, found = expected(run, odd, batch=2)
    assert file["paths"].tolist() == paths and np.array_equal(file["features"], found.numpy())
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        head, *rows = csv.reader(text)
    assert head == ["path", *(f"f{number}" for number in range(32))]
    assert [row[0] for row in rows] == paths
    assert np.array_equal(np.array([row[1:] for row in rows], dtype=np.float32), found.numpy())
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["path", "feature"]
    shown = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
    assert table["path"].to_pylist() == shown
    assert np.array_equal(np.array(table["feature"].to_pylist(), dtype=np.float32), found.numpy())
    metas = [
        json.loads(str(file["meta"])),
        json.loads((tmp_path / "a.csv.json").read_text()),
        json.loads(table.schema.metadata[b"fastmim"]),
    ]
    assert metas[0] == metas[1] == metas[2]


def test_bad_images_are_listed(run: fastmim.Run, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.npz"
    argv = ["embed", str(run.path), str(odd), "--out", str(out), "--batch-size", "2", "--no-pictures"]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"features: 11 images of 32 numbers in {out}",
        f"left out: 2 that cannot be read, listed in {out}.bad.csv",
    ]
    with (tmp_path / "a.npz.bad.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "reason"], *([str(odd / name), "not an image"] for name in ("02.png", "03.png"))]
    clean = tmp_path / "clean"
    shutil.copytree(odd, clean, ignore=shutil.ignore_patterns("02*", "03*"))
    assert fastmim.embed(run, str(clean), out=out, overwrite=True, **PLAIN).bad == 0
    assert not (tmp_path / "a.npz.bad.csv").exists()


def test_tokens_are_all_positions(run: fastmim.Run, photos: Path, tmp_path: Path) -> None:
    done = fastmim.embed(run, str(photos), out=tmp_path / "a.npz", pool="tokens", **PLAIN)
    assert done.dim == 32 * 4 * 4
    found = load(tmp_path / "a.npz")["features"]
    assert np.array_equal(found, expected(run, photos, pooling=tokens)[1].numpy())
    mean = expected(run, photos)[1].numpy()
    np.testing.assert_allclose(found.reshape(40, 32, 16).mean(2), mean, atol=1e-5)


def test_labels_where_images_lie_in_class_folders(run: fastmim.Run, classes: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    fastmim.embed(run, str(classes), out=tmp_path / "a.npz", **PLAIN)
    file = load(tmp_path / "a.npz")
    assert file["classes"].tolist() == ["lying", "upright"]
    folders = [Path(path).parent.name for path in file["paths"].tolist()]
    assert [file["classes"][label] for label in file["labels"]] == folders
    fastmim.embed(run, str(classes), out=tmp_path / "a.parquet", **PLAIN)
    assert pq.read_table(tmp_path / "a.parquet")["label"].to_pylist() == folders


def test_class_folders(tmp_path: Path) -> None:
    def made(*names: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(0)).save(folder / name)
        return folder

    def found(*paths: Path) -> tuple[str, ...] | None:
        classes = class_folders(scan([str(path) for path in paths]))
        return None if classes is None else tuple(classes.names[label] for label in classes.labels)

    plain = made("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    assert found(plain) == found(plain / "a", plain / "b") == ("a", "a", "b", "b")
    assert found(plain / "a") is None
    split = made("train/x/1.png", "train/y/1.png", "val/x/1.png", "val/y/1.png")
    assert found(split) == ("x", "y", "x", "y") and found(split / "train") is None  # a folder for each image
    assert found(made("a/1.png", "a/2.png", "b/1.png", "b/2.png", "3.png")) is None
    assert found(made("a/c/1.png", "a/d/2.png", "b/1.png", "b/2.png")) == ("a", "a", "b", "b")


# ---- Interrupted


def parts_of(out: Path) -> list[Path]:
    return sorted(out.with_name(out.name + ".parts").glob("*.safetensors"))


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_killed_again_and_again_it_ends_with_the_same_bits(
    ending: str, run: fastmim.Run, odd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    data, whole, out = [str(odd), str(photos)], tmp_path / f"whole.{ending}", tmp_path / f"a.{ending}"
    words = {**PLAIN, "batch_size": 2}
    fastmim.embed(run, data, out=whole, **words)
    monkeypatch.setattr(embedding, "SECONDS", 0.0)  # a part for each batch
    kills = 0
    while not out.exists():
        before = len(parts_of(out))
        number = child(lambda: fastmim.embed(run, data, out=out, **words))
        done = 0
        while len(parts_of(out)) < before + 4 and not done and not out.exists():
            done = os.waitpid(number, os.WNOHANG)[0]
            time.sleep(0.001)
        if done or out.exists():
            assert done or wait_for(number) == 0
            break
        os.killpg(number, signal.SIGKILL)
        wait_for(number)
        kills += 1
        assert len(parts_of(out)) >= before + 4, "what was done is kept"
    assert kills >= 3
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.bad.csv").read_bytes() == Path(f"{whole}.bad.csv").read_bytes()
    assert not Path(f"{out}.parts").exists()


def test_damaged_and_foreign_parts_are_computed_again(
    run: fastmim.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "a.npz"
    fastmim.embed(run, str(photos), out=whole, **PLAIN, batch_size=4)
    interrupted(run, photos, out, monkeypatch, after=5)
    files = parts_of(out)
    assert len(files) == 5
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    files[3].write_bytes(b"no part")
    (files[0].parent / ".000000000020-000000000024.safetensors.1").write_bytes(b"half")
    fastmim.embed(run, str(photos), out=out, **PLAIN, batch_size=4)
    assert out.read_bytes() == whole.read_bytes()


def interrupted(
    run: fastmim.Run, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int, **words: Any
) -> None:
    """Leaves ``after`` parts behind, as Ctrl-C in the middle would."""
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "SECONDS", 0.0)
        add, seen = Parts.add, []

        def stopping(self: Parts, *arguments: Any) -> None:
            add(self, *arguments)
            seen.append(1)
            if len(seen) == after - 1:
                os.kill(os.getpid(), signal.SIGINT)  # the next batch is the last

        patch.setattr(Parts, "add", stopping)
        with pytest.raises(Interrupted, match=rf"after {4 * after} of 40 images; to go on, run the same command"):
            fastmim.embed(run, str(data), out=out, **{**PLAIN, "batch_size": 4, **words})


def test_a_signal_to_the_whole_group_keeps_what_is_done(run: fastmim.Run, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "many"
    data.mkdir()
    for index in range(3000):
        (data / f"{index:04d}.jpg").symlink_to(photos / f"{index % 40:03d}.jpg")
    out, words = tmp_path / "a.npz", {**PLAIN, "workers": 2, "batch_size": 4}

    def work() -> None:
        try:
            fastmim.embed(run, str(data), out=out, **words)
        except Interrupted:
            os._exit(130)

    process = child(work)
    while not (tmp_path / "a.npz.parts" / "options.json").exists():
        time.sleep(0.002)
    time.sleep(0.5)
    os.killpg(process, signal.SIGTERM)
    assert wait_for(process) == 130
    (part,) = parts_of(out)
    assert 0 < int(part.stem.partition("-")[2]) < 3000
    assert fastmim.embed(run, str(data), out=out, **words).images == 3000
    whole = load(out)["features"]
    np.testing.assert_allclose(whole, np.tile(whole[:40], (75, 1)), atol=1e-5)


def test_what_is_complete_is_left_as_it_is(
    run: fastmim.Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    for ending in ("npz", "csv", "parquet"):
        out = tmp_path / f"a.{ending}"
        argv = ["embed", str(run.path), str(photos), "--out", str(out), "--no-pictures", "--workers", "0"]
        assert main(argv) == 0
        before = out.stat().st_mtime_ns
        capsys.readouterr()
        assert main(argv) == 0
        said = f"features: 40 images of 32 numbers in {out}; all there already, --overwrite computes them again\n"
        assert capsys.readouterr().out == said and out.stat().st_mtime_ns == before
        assert main([*argv, "--overwrite"]) == 0
        assert out.stat().st_mtime_ns > before


def test_other_weights_images_and_options_are_refused(
    run: fastmim.Run, other: fastmim.Run, photos: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    changes: list[tuple[fastmim.Run, Path, dict[str, Any], str]] = [
        (other, photos, {}, "weights"),
        (run, classes, {}, "images"),
        (run, photos, {"pool": "tokens"}, "pool"),
        (run, photos, {"batch_size": 8}, "batch size"),
        (run, photos, {"resolution": 64}, "weights and network and resolution"),
    ]
    interrupted(run, photos, out, monkeypatch, after=2)
    for _ in range(2):  # begun, then complete
        for target, data, words, named in changes:
            with pytest.raises(UserError, match=rf"with other {named}; --overwrite") as caught:
                fastmim.embed(target, str(data), out=out, **{**PLAIN, "batch_size": 4, **words})
            assert "\n" not in str(caught.value)
        fastmim.embed(run, str(photos), out=out, **PLAIN, batch_size=4)
    done = fastmim.embed(other, str(photos), out=out, **PLAIN, batch_size=4, overwrite=True)
    assert not done.complete
    assert np.array_equal(load(out)["features"], expected(other, photos, batch=4)[1].numpy())


def test_an_interrupted_overwrite_goes_on_without_the_word(
    run: fastmim.Run, other: fastmim.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    fastmim.embed(run, str(photos), out=out, **PLAIN, batch_size=4)
    before = out.read_bytes()
    interrupted(other, photos, out, monkeypatch, after=3, overwrite=True)
    assert out.read_bytes() == before, "the old one is there until the new one is whole"
    fastmim.embed(other, str(photos), out=out, **PLAIN, batch_size=4)
    assert np.array_equal(load(out)["features"], expected(other, photos, batch=4)[1].numpy())


def test_mistakes_are_one_line(
    run: fastmim.Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(out: Path | str) -> str:
        return refusal(capsys, str(run.path), str(photos), "--out", str(out))

    assert "must end in one of: .npz, .parquet, .csv" in said(tmp_path / "a.txt")
    assert "there is no folder" in said(tmp_path / "none" / "a.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in said(tmp_path / "folder.npz")
    (tmp_path / "mine.npz").write_bytes(b"mine")
    assert "not by fastmim embed; --overwrite replaces it" in said(tmp_path / "mine.npz")
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"
    assert "cannot be written: " in said("/proc/a.npz")
    assert "embed needs DATA..." in refusal(capsys, str(run.path))
    assert "timm has no model" in refusal(capsys, "nonsense", str(photos), "--out", str(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="pool is 'max'"):
        fastmim.embed(run, str(photos), pool="max", out=tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install 'fastmim[eval]'" in said(tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.parts"))


def test_two_processes_cannot_write_one_file(run: fastmim.Run, photos: Path, tmp_path: Path) -> None:
    from fastmim.run_folder import locked

    (tmp_path / "a.npz.parts").mkdir()

    def hold() -> None:
        with locked(tmp_path / "a.npz.parts"):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    try:
        with pytest.raises(UserError, match="in use by another process"):
            fastmim.embed(run, str(photos), out=tmp_path / "a.npz", **PLAIN)
    finally:
        os.killpg(process, signal.SIGKILL)
        wait_for(process)


def test_a_module_of_the_users_own(photos: Path, tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 8, 8)
            self.stages = (fastmim.Stage(8, 8),)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.stem(images)]

        def weights(self) -> dict[str, Tensor]:
            return self.state_dict()

    words = {name: value for name, value in TINY.items() if name not in ("model", "model_args")}
    trained = fastmim.pretrain(data=str(photos), out=tmp_path / "run", model=Own(), **words)
    done = fastmim.embed(trained, str(photos), model=Own(), out=tmp_path / "a.npz", **PLAIN)
    assert (done.images, done.dim) == (40, 8)


# ---- Pictures


def vectors(count: int, dim: int = 12, seed: int = 0) -> Tensor:
    return 3 + torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_neighbours_equal_a_plain_loop() -> None:
    found = vectors(57).numpy()
    rows, cosines = neighbours(torch.from_numpy(found), queries=5, count=4)
    assert rows[:, 0].tolist() == [0, 14, 28, 42, 56]
    centred = found - found.mean(0)
    for row, told in zip(rows.tolist(), cosines.tolist(), strict=True):
        one = centred[row[0]]
        cosine = [float(one @ two / np.linalg.norm(one) / np.linalg.norm(two)) for two in centred]
        nearest = sorted((place for place in range(57) if place != row[0]), key=lambda place: -cosine[place])[:4]
        assert row[1:] == nearest
        assert told == pytest.approx([1.0, *(cosine[place] for place in nearest)], abs=1e-5)


def test_evenly() -> None:
    assert evenly(5, 10) == [0, 1, 2, 3, 4]
    assert evenly(101, 3) == [0, 50, 100]
    assert len(set(evenly(3001, 3000))) == 3000


def test_a_map_is_a_function_of_its_seed_and_keeps_neighbours() -> None:
    pytest.importorskip("sklearn")
    centres = 4 * vectors(3, 20, seed=1)
    found = torch.cat([centre + vectors(30, 20, seed=2 + place) for place, centre in enumerate(centres)])
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first, again = (mapping.lay_out(found, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]
    assert first.method == "t-SNE" and np.array_equal(first.points, again.points)
    assert first.points.min() == 0 and first.points.max() == 1
    label = np.arange(90) // 30
    for place, point in enumerate(first.points):
        distance = np.linalg.norm(first.points - point, axis=1)
        distance[place] = np.inf
        assert label[distance.argmin()] == label[place]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_of_a_few_images_a_map_is_pca(count: int) -> None:
    found = mapping.lay_out(vectors(count), 0)
    assert found.method == "PCA" and found.points.shape == (count, 2) and np.isfinite(found.points).all()
    assert len({tuple(point) for point in found.points.tolist()}) == count


def test_without_scikit_learn_a_map_says_that_it_is_pca(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = vectors(40)
    chart = mapping.lay_out(found, 0)
    assert chart.method == "PCA (without scikit-learn)"
    unit = torch.nn.functional.normalize((found - found.mean(0)).double(), dim=1)
    unit = unit - unit.mean(0)
    axes = np.linalg.svd(unit.numpy(), full_matrices=False)[2][:2]
    for axis, drawn in zip(axes, chart.points.T, strict=True):
        assert abs(np.corrcoef(unit.numpy() @ axis, drawn)[0, 1]) > 0.999


def test_images_that_are_all_alike_have_a_map() -> None:
    chart = mapping.lay_out(torch.ones(30, 5), 0)
    assert np.array_equal(chart.points, np.zeros((30, 2)))


def test_a_cell_shows_the_image_nearest_to_its_middle() -> None:
    points = np.random.default_rng(0).uniform(0, 1, (300, 2)).astype(np.float32)
    points[0] = 1.0
    found = mapping.snapped(points, 5)
    wanted: dict[tuple[int, int], tuple[float, int]] = {}
    for image, (x, y) in enumerate(points.tolist()):
        column, row = min(4, int(x * 5)), min(4, int(y * 5))
        distance = (x * 5 - column - 0.5) ** 2 + (y * 5 - row - 0.5) ** 2
        wanted[4 - row, column] = min(wanted.get((4 - row, column), (9.0, -1)), (distance, image))
    assert found == {cell: image for cell, (_, image) in wanted.items()}


def test_pictures_are_drawn(run: fastmim.Run, classes: Path, photos: Path, tmp_path: Path) -> None:
    words = {**PLAIN, "pictures": True}
    done = fastmim.embed(run, str(classes), out=tmp_path / "a.npz", **words)
    assert [path.name for path in done.pictures] == ["a-neighbours.png", "a-map.png"]
    sizes = []
    for path in done.pictures:
        with Image.open(path) as picture:
            sizes.append(picture.size)
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 500
    flat = fastmim.embed(run, str(photos), out=tmp_path / "b.npz", **words)
    with Image.open(flat.pictures[1]) as picture:
        assert picture.width < sizes[1][0], "without classes there are thumbnails alone"
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "000.jpg", few)
    assert fastmim.embed(run, str(few), out=tmp_path / "c.npz", **words).pictures == ()
    shutil.copy(photos / "001.jpg", few)
    assert len(fastmim.embed(run, str(few), out=tmp_path / "d.npz", **words).pictures) == 2


def test_pictures_survive_any_name_of_a_class(run: fastmim.Run, photos: Path, tmp_path: Path) -> None:
    for name in ("_a$b", os.fsdecode(b"c\xff"), "\u732b", "x" * 100):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            shutil.copy(photos / f"{index:03d}.jpg", tmp_path / "data" / name)
    done = fastmim.embed(run, str(tmp_path / "data"), out=tmp_path / "a.npz", **{**PLAIN, "pictures": True})
    assert len(done.pictures) == 2
    assert len(load(tmp_path / "a.npz")["classes"]) == 4


def test_tiles_lie_row_by_row_with_frames() -> None:
    tiles = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 20, 20) * 50
    sheet = np.asarray(tiled(tiles, "", 3, captions=["a" * 50] * 5, frames=[None, "#FF0000", None, None, None]))
    for number in range(5):
        top, left = 28 + number // 3 * 40, 4 + number % 3 * 24
        assert sheet[top + 10, left + 10].tolist() == [50 * number] * 3
        assert sheet[top, left].tolist() == ([255, 0, 0] if number == 1 else [50 * number] * 3)
    assert sheet.shape == (28 + 2 * 40 + 4, 3 * 24 + 4, 3)
