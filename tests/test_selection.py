# SPDX-License-Identifier: Apache-2.0
"""Choosing images: the mathematics against plain loops, and lists that pretrain reads."""

import csv
import math
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from torch import Tensor, nn

import fastmim
from fastmim.choose import _as_csv
from fastmim.cli import main
from fastmim.data.sources.scan import scan
from fastmim.errors import UserError
from fastmim.run_images import eval_loader, find_images, split
from fastmim.run_network import bare_network, trained_model, whole_network
from fastmim.tasks import selection
from fastmim.tasks.selection import Selector

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resolution": 32, "decoder_dim": 32, "global_batch": 16, "lr": 1e-3, "epochs": 4, "log_every": 1, "device": "cpu",
    "workers": 0, "tensorboard": False,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The predictor


def regression(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features far from zero, of different scales, one of which never changes; and losses that depend on them."""
    x = 5 + random(count, 6, seed=seed) * torch.tensor([1e-2, 1.0, 10.0, 1.0, 1.0, 0.0])
    y = 0.3 + 4 * x[:, 0] + 0.02 * x[:, 2] + 0.05 * random(count, seed=seed + 1)
    return x, y


def test_ridge_equals_lstsq_on_rows_that_stand_for_the_ridge() -> None:
    x, y = regression(200)
    parts = zip(x.split(64), y.split(64), strict=True)
    sums = torch.stack([selection.gram(*part) for part in parts]).sum(dim=0)
    ridge = selection.fit_ridge(sums, strength=0.1)
    columns, target = x[:, :5].double().numpy(), y.double().numpy()
    standard = (columns - columns.mean(0)) / columns.std(0)
    rows = np.concatenate([standard, math.sqrt(0.1 * len(y)) * np.eye(5)])
    wanted = np.concatenate([(target - target.mean()) / target.std(), np.zeros(5)])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    assert ridge.weight[5] == 0
    np.testing.assert_allclose(ridge.weight[:5].numpy() * columns.std(0), weight, rtol=1e-6)
    np.testing.assert_allclose(ridge(x.view(4, 50, 6)).flatten(), standard @ weight, atol=1e-4)
    assert (ridge.mean, ridge.deviation) == pytest.approx((target.mean(), target.std()))


def test_r2_equals_its_definition_on_other_blocks() -> None:
    ridge = selection.fit_ridge(selection.gram(*regression(200)))
    x, y = regression(100, seed=7)
    x[:50] += 0.02  # worse than on the blocks of the fit
    errors = y.double() - (ridge.mean + ridge.deviation * (x.double() @ ridge.weight + ridge.bias))
    expected = 1 - float(errors.square().sum() / (y.double() - y.double().mean()).square().sum())
    assert 0.1 < expected < 0.9
    assert selection.explained(ridge, selection.gram(x, y)) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(selection.explained(ridge, torch.zeros(8, 8).double()))


def test_losses_that_never_change_are_predicted_as_they_are() -> None:
    ridge = selection.fit_ridge(selection.gram(random(20, 3), torch.full((20,), 0.5)))
    assert ridge(random(4, 3, seed=1)).tolist() == [0, 0, 0, 0]
    assert (ridge.mean, ridge.deviation) == pytest.approx((0.5, 0))


# ---- Masks


@pytest.mark.parametrize(("hidden", "side"), [(12, 4), (47, 8), (1, 2)])
def test_hardest_hides_exactly_the_highest(hidden: int, side: int) -> None:
    predicted = random(5, side, side)
    masks = selection.hardest(predicted, hidden)
    for row, mask in zip(predicted.flatten(1), masks.hidden.flatten(1), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(row.argsort()[side * side - hidden :].tolist())
    assert torch.equal(masks.hidden, masks.predicted) and masks[2:] == (hidden, hidden)


@pytest.mark.parametrize(("hidden", "side"), [(12, 4), (13, 4), (52, 8)])
def test_hardest_of_grids_shows_the_easiest_of_each_cell(hidden: int, side: int) -> None:
    predicted = random(5, side, side)
    masks = selection.hardest(predicted, hidden, one_of_four=True)
    for image, mask in zip(predicted, masks.hidden, strict=True):
        lowest = sorted(
            min((float(image[y, x]), y, x) for y in (top, top + 1) for x in (left, left + 1))
            for top in range(0, side, 2)
            for left in range(0, side, 2)
        )
        shown = {(y, x) for _, y, x in lowest[: side * side - hidden]}
        assert {tuple(place) for place in (~mask).nonzero().tolist()} == shown


def test_equal_blocks_are_shown_in_their_order() -> None:
    masks = selection.hardest(torch.zeros(2, 4, 4), 12)
    assert masks.hidden.flatten(1).tolist() == [[False] * 4 + [True] * 12] * 2
    corners = selection.hardest(torch.zeros(1, 4, 4), 12, one_of_four=True)
    assert (~corners.hidden[0]).nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


def test_weighted_loss_equals_a_plain_loop() -> None:
    losses, predicted = random(3, 4, 4).abs(), 7 + 3 * random(3, 4, 4, seed=1)
    predicted[2] = 1.0
    hidden = selection.hardest(predicted, 10).hidden
    scores = selection.weighted_loss(losses, predicted, hidden)
    for image in range(2):
        places = hidden[image].nonzero().tolist()
        values = [float(predicted[image, y, x]) for y, x in places]
        weights = [math.exp((value - np.mean(values)) / (np.std(values) + 1e-3)) for value in values]
        terms = [weight * float(losses[image, y, x]) for weight, (y, x) in zip(weights, places, strict=True)]
        assert float(scores[image]) == pytest.approx(sum(terms) / sum(weights))
    assert float(scores[2]) == pytest.approx(float(losses[2][hidden[2]].mean())), "of equal blocks it is the mean"


# ---- A whole model


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rich pictures, 30 that are all but flat, one that cannot be read, and names that lists must survive."""
    folder = tmp_path_factory.mktemp("pool")
    for index in range(30):
        name = {3: 'rich, "3"', 4: "rich\n4", 5: os.fsdecode(b"rich\xff5"), 6: "rich;6 "}.get(index, f"rich{index:02d}")
        Image.fromarray(draw(index)).save(folder / f"{name}.png")
        noise = np.random.default_rng(index).normal(0, 1, (48, 48, 3))
        flat = np.random.default_rng(100 + index).uniform(60, 190, 3) + noise
        Image.fromarray(flat.astype(np.uint8)).save(folder / f"flat{index:02d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def train(pool: Path, out: Path, **words: Any) -> fastmim.Run:
    return fastmim.pretrain(data=str(pool), out=out, max_bad=0.1, **{**TINY, **words})


@pytest.fixture(scope="module")
def run(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> fastmim.Run:
    return train(pool, tmp_path_factory.mktemp("runs") / "run", hide="drop", epochs=10)


def rows_of(path: Path) -> list[tuple[str, float]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [(row["path"], float(row["score"])) for row in csv.DictReader(file)]


def test_scores_equal_a_plain_loop_over_each_image(run: fastmim.Run) -> None:
    config = run.config
    mim, _ = trained_model(run, None)
    table = find_images(config)
    loader = eval_loader(config, table.take(split(config, table)[0][:7]))
    selector = Selector(mim, bare_network(mim))
    predictor = selector.fit(loader)
    assert predictor.hidden == 12
    places, scores = selector.score(predictor, loader)
    batch = next(iter(loader))
    assert places.tolist() == batch["indices"].tolist()
    mean, std = (values.view(3, 1, 1) for values in (mim.mean, mim.std))
    for image, score in zip(batch["images"], scores, strict=True):
        normal = ((image / 255 - mean) / std)[None]
        with torch.no_grad():
            seen = mim.backbone.backbone(normal)[-1][0]
            guess = [float(predictor.ridge(seen[:, y, x])) for y in range(4) for x in range(4)]
            chosen = sorted(range(16), key=lambda place: (guess[place], place))[4:]
            mask = torch.zeros(1, 16, dtype=torch.bool)
            mask[0, chosen] = True
            mask = mask.view(1, 4, 4)
            maps = mim.backbone(normal, mask, 12)
            prediction = mim.decoders[0](maps, fastmim.Masks(mask, mask, 12, 12))[0]
            target = mim.targets[0](normal)[0]
        values = np.array([guess[place] for place in chosen])
        weights = np.exp((values - values.mean()) / (values.std() + 1e-3))
        losses = [float((prediction - target).square()[:, place // 4, place % 4].mean()) for place in chosen]
        assert float(score) == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-4)


def test_a_predictor_is_fitted_to_the_hidden_blocks_of_the_runs_own_masks(run: fastmim.Run) -> None:
    config = run.config
    mim, _ = trained_model(run, None)
    loader = eval_loader(config, scan(config.data.paths))
    predictor = Selector(mim, bare_network(mim)).fit(loader)
    features: dict[bool, list[Tensor]] = {False: [], True: []}
    losses: dict[bool, list[Tensor]] = {False: [], True: []}
    for batch in loader:
        with torch.no_grad():
            out = mim(batch["images"], batch["keys"])
            seen = bare_network(mim)((batch["images"] / 255 - mim.mean) / mim.std)[-1]
        for image, index in enumerate(batch["indices"].tolist()):
            for y, x in out.masks.hidden[image].nonzero().tolist():
                features[index % 10 == 9].append(seen[image, :, y, x])
                error = out.predictions[0][image, :, y, x] - out.targets[0][image, :, y, x]
                losses[index % 10 == 9].append(error.square().mean())
    fitted, held = (selection.gram(torch.stack(features[part]), torch.stack(losses[part])) for part in (False, True))
    expected = selection.fit_ridge(fitted)
    torch.testing.assert_close(predictor.ridge.weight, expected.weight, rtol=1e-3, atol=1e-4)
    assert predictor.r2 == pytest.approx(selection.explained(expected, held), abs=1e-3)


METHODS: list[dict[str, Any]] = [
    {"hide": "pixels"},
    {"hide": "tokens", "masking": "blockwise", "target": "pixels_norm", "loss": "l1"},
    {"hide": "drop", "masking": "selective", "mask_ratio": 0.8, "predict_ratio": 0.25, "decoder": "cross"},
    {"hide": "compact", "masking": "grid"},
    {"hide": "pixels", "masking": "grid", "mask_ratio": 0.8125, "masks": 2},
    {"model": "resnet10t", "model_args": {}, "resolution": 64, "scales": "stages", "decoder": "linear", "block": 16},
    {"phases": "32:0.5,48:0.5", "resolution": 48},
]


@pytest.mark.parametrize("words", METHODS, ids=lambda words: "-".join(map(str, words.values())))
def test_every_method_can_score(words: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    trained = train(photos, tmp_path / "run", **{"epochs": 2, **words})
    chosen = fastmim.select(trained, keep=0.5, out=tmp_path / "kept.csv", workers=0)
    assert chosen.images == 39 and chosen.kept == round(0.5 * 39)
    assert chosen.scores.isfinite().all() and chosen.scores.unique().numel() > 30
    assert (chosen.scores > 0).all()


def test_masks_stay_what_the_method_hides(run: fastmim.Run) -> None:
    """What the network is given in the second stage: the count of the method in every image, all of it predicted."""
    mim, _ = trained_model(run, None)
    own, seen = mim.masking, []
    mim.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(inputs[1:]))
    loader = eval_loader(run.config, scan(run.config.data.paths))
    selector = Selector(mim, bare_network(mim))
    predictor = selector.fit(loader)
    del seen[:]
    selector.score(predictor, loader)
    assert mim.masking is own
    assert [count for _, count in seen] == [12] * len(seen) and seen
    assert all((mask.flatten(1).sum(dim=1) == 12).all() for mask, _ in seen)


def test_grid_masking_keeps_its_rule(photos: Path, tmp_path: Path) -> None:
    trained = train(photos, tmp_path / "run", epochs=1, hide="compact", masking="grid", mask_ratio=0.8125)
    mim, resolution = trained_model(trained, None)
    loader = eval_loader(trained.config, scan(trained.config.data.paths))
    selector = Selector(mim, whole_network(bare_network(mim), resolution))
    predictor, seen = selector.fit(loader), list[Tensor]()
    mim.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(inputs[1]))
    selector.score(predictor, loader)
    shown = (~torch.cat(seen)).float()
    assert len(shown) == 40 and (shown.flatten(1).sum(dim=1) == 64 - predictor.hidden).all()
    assert predictor.hidden == 52
    assert (4 * nn.functional.avg_pool2d(shown[:, None], 2)).max() == 1


# ---- Lists


def test_rich_images_score_above_flat_ones_and_pretrain_reads_the_list(
    run: fastmim.Run, pool: Path, tmp_path: Path
) -> None:
    chosen = fastmim.select(run, keep=0.4, out=tmp_path / "kept.csv", workers=0)
    rows = rows_of(chosen.path)
    trained = run.read("data.json")
    assert trained is not None
    count = 61 - trained["held_out"]
    assert chosen.images == count - 1 and list(chosen.bad) == [str(pool / "broken.png")]
    assert len(rows) == chosen.kept == round(0.4 * chosen.images)
    assert [score for _, score in rows] == sorted((score for _, score in rows), reverse=True)
    assert [score for _, score in rows] == chosen.scores[: chosen.kept].tolist()
    assert all(Path(path).is_absolute() and Path(path).name.startswith("rich") for path, _ in rows)
    again = train(chosen.path, tmp_path / "again", epochs=1)
    assert again.status["state"] == "finished"
    every = fastmim.select(run, keep=1, out=tmp_path / "all.csv", workers=0)
    table = scan([str(every.path)])
    assert {table.path(row) for row in range(len(table))} == {path for path, _ in rows_of(every.path)}
    assert {os.fsdecode(b"rich\xff5.png"), "rich\n4.png", 'rich, "3".png', "rich;6 .png"} <= {
        Path(path).name for path, _ in rows_of(every.path)
    }
    with Image.open(chosen.picture) as picture:
        assert picture.size[0] == 8 * 100 + 4 and np.asarray(picture).std() > 20


def test_a_list_is_the_same_every_time_and_for_any_batch_size(
    run: fastmim.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = []
    for number, (batch, workers) in enumerate([(64, 0), (64, 1), (7, 0), (1, 0)]):
        monkeypatch.setattr("fastmim.choose._BATCH", batch)
        torch.manual_seed(number)
        chosen = fastmim.select(run, keep=1, out=tmp_path / f"{number}.csv", workers=workers)
        names = [path for path, _ in rows_of(chosen.path)]
        lists.append((chosen.path.read_bytes(), chosen.picture.read_bytes(), names))
    assert lists[0] == lists[1]
    assert lists[0][2] == lists[2][2] == lists[3][2]


def test_names_of_any_bytes_stand_in_a_list_as_they_are(tmp_path: Path) -> None:
    names = ["a,b.png", 'a"b.png', "a\nb.png", "a\rb.png", " a;b\t.png", os.fsdecode(b"\xff\xfe.png"), "\u2028.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "list.csv").write_bytes(_as_csv([(str(tmp_path / name), "0.5") for name in names]))
    table = scan([str(tmp_path / "list.csv")])
    assert {table.path(row) for row in range(len(table))} == {str(tmp_path / name) for name in names}


# ---- Mistakes


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which ``fastmim select`` refuses."""
    assert main(["select", *argv]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("fastmim: ") and output.err.count("\n") == 1
    return output.err


def test_mistakes_are_one_line(run: fastmim.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(run.path)
    for keep in ("0", "-1", "1.5", "half"):
        assert f"keep = '{keep}'" in refusal(capsys, where, "--keep", keep)
        if keep != "half":
            with pytest.raises(UserError, match="keep is"):
                fastmim.select(run, keep=float(keep))
    assert "select needs RUN" in refusal(capsys)
    assert "is not a run folder" in refusal(capsys, str(tmp_path))
    assert "must end in .csv" in refusal(capsys, where, "--out", str(tmp_path / "kept.txt"))
    assert "there is no folder" in refusal(capsys, where, "--out", str(tmp_path / "none" / "kept.csv"))
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in refusal(capsys, where, "--out", str(tmp_path / "folder.csv"))
    shutil.copytree(run.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("checkpoints"))
    assert "no checkpoint yet" in refusal(capsys, str(tmp_path / "fresh"), "--out", str(tmp_path / "kept.csv"))
    assert not (tmp_path / "kept.csv").exists()


def test_the_list_that_a_run_was_trained_on_is_not_replaced(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_bytes(_as_csv([(str(path), "1") for path in sorted(photos.iterdir())]))
    before = source.read_bytes()
    trained = train(source, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="the list that the run was trained on"):
        fastmim.select(trained, out=source)
    assert source.read_bytes() == before
    other = tmp_path / "kept.csv"
    other.write_text("of an earlier choice")
    assert fastmim.select(trained, keep=1e-9, out=other, workers=0).kept == 1
    assert len(rows_of(other)) == 1


def test_images_inside_of_archives_cannot_be_named(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    trained = train(tmp_path / "photos.tar", tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match=r"cannot name the images inside of .*photos\.tar.*; unpack"):
        fastmim.select(trained, out=tmp_path / "kept.csv")


def test_the_command_says_what_was_kept(
    run: fastmim.Run, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my list.csv"
    assert main(["select", str(run.path), "--keep", "0.5", "--out", str(out), "--workers", "0"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    rows = rows_of(out)
    assert lines["kept"].split() == f"{len(rows)} of 59 images, in {out}".split()
    assert lines["scores"].strip().startswith("0% ") and f"100% {rows[0][1]:.3g}" in lines["scores"]
    assert re.fullmatch(r" R\^2 -?\d+\.\d\d on unseen images", lines["predictor"])
    assert lines["left out"].strip().startswith(f"1 that cannot be read: {str(pool / 'broken.png')!r}: ")
    assert lines["look"].strip() == str(out.with_suffix(".png"))
    assert lines["train"].strip() == f"fastmim pretrain '{out}'"


class OwnNetwork(nn.Module):
    """Somebody's own: the three members, and nothing of timm."""

    stages = (fastmim.Stage(16, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}


def test_a_network_of_ones_own_and_grey_images(photos: Path, tmp_path: Path) -> None:
    words = {**TINY, "model": OwnNetwork(), "model_args": {}, "epochs": 1}
    trained = fastmim.pretrain(data=str(photos), out=tmp_path / "run", **words)
    assert fastmim.select(trained, model=OwnNetwork(), out=tmp_path / "kept.csv", workers=0).images == 39
    grey = train(photos, tmp_path / "grey", channels=1, epochs=1)
    assert main(["select", str(grey.path), "--out", str(tmp_path / "grey.csv"), "--workers", "0"]) == 0
