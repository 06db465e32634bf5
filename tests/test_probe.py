# SPDX-License-Identifier: Apache-2.0
"""The measures against plain references, and the sentence that they lead to."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastmim.config import Config, update
from fastmim.data.labelled import labelled
from fastmim.errors import UserError
from fastmim.evidence import clear
from fastmim.run_network import build_network, untrained_network
from fastmim.seeding import derive
from fastmim.tasks import features
from fastmim.tasks.probing import compare, knn, linear, rank, subsets
from fastmim.tasks.probing.methods import Features
from fastmim.tasks.probing.run import run_probe
from fastmim.tasks.probing.settings import Settings, read_settings

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(count: int, width: int, classes: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around one centre a class, far from the origin."""
    labels = torch.arange(count) % classes
    centres = random(classes, width, seed=99)
    return 50 + centres[labels] + spread * random(count, width, seed=seed), labels


class Network(nn.Module):
    """A Backbone with layers that behave differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.norm(self.conv(images))
        return [first, self.drop(first[:, :, ::2, ::2])]


def batches(count: int, size: int, with_labels: bool) -> list[dict[str, Tensor]]:
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(count)
    parts = zip(images.split(size), labels.split(size), strict=True)
    return [{"images": part} | ({"labels": label} if with_labels else {}) for part, label in parts]


def test_features_equal_a_plain_loop_and_leave_the_network_as_it_was() -> None:
    network = Network().train()
    network.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    loader, seen = batches(10, 4, with_labels=True), list[int]()
    vectors, labels = features.features(network, loader, torch.device("cpu"), MEAN, STD, progress=seen.append)

    assert (network.training, network.norm.training, network.drop.training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert labels is not None and labels.tolist() == list(range(10))
    assert seen == [4, 4, 2]
    assert vectors.shape == (10, 5) and vectors.dtype == torch.float32 and not vectors.requires_grad
    network.eval()
    image = loader[1]["images"][2]
    colours = [(image[c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    expected = network(torch.stack(colours)[None])[-1][0].flatten(1).mean(1)
    torch.testing.assert_close(vectors[6], expected)


def test_features_without_labels_and_without_images() -> None:
    device = torch.device("cpu")
    assert features.features(Network(), batches(3, 2, with_labels=False), device, MEAN, STD)[1] is None
    with pytest.raises(UserError, match="none of the images"):
        features.features(Network(), [], device, MEAN, STD)


def test_pixel_features_are_means_of_squares() -> None:
    loader = batches(5, 2, with_labels=True)
    vectors, labels = features.pixel_features(loader, side=4)
    assert vectors.shape == (5, 48) and labels is not None and labels.tolist() == [0, 1, 2, 3, 4]
    square = loader[1]["images"][1][2, 4:8, 8:12].float() / 255
    torch.testing.assert_close(vectors[3].view(3, 4, 4)[2, 1, 2], square.mean())


def slow_knn(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, k: int, temperature: float) -> float:
    centre, right = train_x.mean(0), 0
    for x, y in zip(val_x, val_y, strict=True):
        cosines = [float(F.cosine_similarity(x - centre, t - centre, dim=0)) for t in train_x]
        votes: dict[int, float] = defaultdict(float)
        for index in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[int(train_y[index])] += math.exp(cosines[index] / temperature)
        right += max(votes, key=lambda label: votes[label]) == int(y)
    return 100 * right / len(val_y)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (1000, 0.07)])
def test_knn_equals_a_plain_loop(k: int, temperature: float) -> None:
    train_x, train_y = blobs(60, 8, 4, 1.5)
    val_x, val_y = blobs(40, 8, 4, 1.5, seed=1)
    expected = slow_knn(train_x, train_y, val_x, val_y, k, temperature)
    assert 25 < expected < 100
    assert knn.knn_accuracy(train_x, train_y, val_x, val_y, k=k, temperature=temperature) == expected


def test_knn_counts_every_image_beyond_one_chunk() -> None:
    train_x, train_y = blobs(60, 8, 4, 0.1)
    val_x, val_y = blobs(2100, 8, 4, 0.1, seed=1)
    val_y[2000:] = 3 - val_y[2000:]  # wrong labels, in the last chunk: 0, 1, 2, 3 became 3, 2, 1, 0
    assert knn.knn_accuracy(train_x, train_y, val_x, val_y) == pytest.approx(100 * 2000 / 2100)


@pytest.mark.parametrize("strength", [0.1, 0.01])
def test_linear_reaches_the_minimum_that_gradient_descent_reaches(strength: float) -> None:
    x, y = blobs(60, 5, 3, 1.0)
    x = (x - x.mean(0)) / x.std(0)
    weight = torch.zeros(5, 3, dtype=torch.float64)
    bias = torch.zeros(3, dtype=torch.float64)
    target = F.one_hot(y, 3).double()
    for _ in range(3000):  # by the textbook's gradient, not by autograd
        error = ((x.double() @ weight + bias).softmax(1) - target) / len(y)
        weight -= 0.5 * (x.double().T @ error + strength * weight)
        bias -= 0.5 * error.sum(0)
    found = linear.fit_linear(x, y, 3, strength)
    torch.testing.assert_close(found[0].double(), weight, atol=2e-3, rtol=0)
    expected = float(linear.linear_objective(x.double(), y, weight, bias, strength))
    assert float(linear.linear_objective(x, y, *found, strength)) == pytest.approx(expected, rel=1e-5)
    plain = -(x.double() @ weight + bias).log_softmax(1)[range(60), y].mean() + strength / 2 * (weight**2).sum()
    assert expected == pytest.approx(float(plain))


def test_linear_is_the_same_every_time_and_under_no_grad() -> None:
    train, val = blobs(200, 16, 4, 2.0), blobs(100, 16, 4, 2.0, seed=1)
    with torch.no_grad():
        first = linear.linear_accuracy(*train, *val)
    assert 50 < first < 100
    assert linear.linear_accuracy(*train, *val) == first


def test_linear_ignores_scale_and_features_that_never_change() -> None:
    (train_x, train_y), (val_x, val_y) = blobs(80, 6, 4, 0.2), blobs(60, 6, 4, 0.2, seed=1)
    scale = torch.tensor([1e-3, 1e3, 1.0, 1.0, 10.0, 0.0])
    assert linear.linear_accuracy(train_x * scale, train_y, val_x * scale, val_y) > 95


def test_linear_chooses_a_strength_that_suits_the_data() -> None:
    """Nearly as many features as images, most of them noise: the weakest strength fits the noise."""
    train_x, train_y = random(400, 300), torch.arange(400) % 2
    val_x, val_y = random(2000, 300, seed=1), torch.arange(2000) % 2
    for x, y in ((train_x, train_y), (val_x, val_y)):
        x[:, :10] += 0.3 * (2 * y - 1)[:, None]
    weight, bias = linear.fit_linear(train_x, train_y, 2, min(linear.STRENGTHS))
    weakest = 100 * float(((val_x @ weight + bias).argmax(1) == val_y).float().mean())
    assert linear.linear_accuracy(train_x, train_y, val_x, val_y) > weakest + 1


def test_linear_takes_nothing_from_the_validation_part() -> None:
    train, (val_x, val_y) = blobs(100, 8, 4, 2.0), blobs(80, 8, 4, 2.0, seed=1)
    whole = linear.linear_accuracy(*train, val_x, val_y)
    halves = [linear.linear_accuracy(*train, val_x[part], val_y[part]) for part in (slice(0, 8), slice(8, 80))]
    assert whole == pytest.approx((8 * halves[0] + 72 * halves[1]) / 80)


def test_effective_rank_of_known_matrices() -> None:
    rotation = torch.linalg.qr(random(40, 7)).Q
    assert rank.effective_rank(rotation) == pytest.approx(7)
    assert rank.effective_rank(1e-3 * rotation) == pytest.approx(7)
    assert rank.effective_rank(random(40, 1) @ random(1, 7)) == pytest.approx(1, abs=1e-3)
    assert rank.effective_rank(torch.zeros(5, 3)) == 1
    shares = (0.6, 0.3, 0.1)
    expected = math.prod(share**-share for share in shares)
    assert rank.effective_rank(rotation[:, :3] * torch.tensor(shares)) == pytest.approx(expected, rel=1e-5)


def test_nearest_neighbours() -> None:
    angles = torch.tensor([0.0, 10.0, 40.0, 180.0, 190.0, 220.0]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 4).repeat(2)[:, None]
    assert vectors.mean(0).abs().max() < 1e-6
    indices, similarity = knn.nearest_neighbours(vectors + 100, torch.tensor([0, 4]), 2)
    assert indices.tolist() == [[1, 2], [3, 5]]
    expected = torch.tensor([[10.0, 40.0], [10.0, 30.0]]).deg2rad().cos()
    torch.testing.assert_close(similarity, expected, atol=1e-3, rtol=0)
    everything, _ = knn.nearest_neighbours(vectors, torch.tensor([0]), 99)
    assert sorted(everything[0].tolist()) == [1, 2, 3, 4, 5]


def test_label_subsets_are_stratified_and_a_pure_function() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [4])[torch.randperm(51, generator=torch.Generator().manual_seed(0))]
    quarter = subsets.read_labels("25%")
    chosen = subsets.label_subsets(labels, quarter, 3, seed=5)
    for subset in chosen:
        assert labels[subset].bincount().tolist() == [10, 2, 0, 0, 1]
        assert subset.tolist() == sorted(set(subset.tolist()))
    assert len({tuple(subset.tolist()) for subset in chosen}) == 3
    torch.manual_seed(1)
    again = subsets.label_subsets(labels, quarter, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(chosen[:2], again, strict=True))
    assert not torch.equal(chosen[0], subsets.label_subsets(labels, quarter, 1, seed=6)[0])
    (few,) = subsets.label_subsets(labels, subsets.read_labels("3/class"), 1, seed=5)
    assert labels[few].bincount().tolist() == [3, 3, 0, 0, 1]
    (one,) = subsets.label_subsets(labels, subsets.read_labels("1%"), 1, seed=5)
    assert labels[one].bincount().tolist() == [1, 1, 0, 0, 1]
    assert set(one.tolist()) <= set(few.tolist()) <= set(chosen[0].tolist()) | set(few.tolist())


@pytest.mark.parametrize(
    ("text", "name", "of_forty"),
    [("10%", "10%", 4), (0.1, "10%", 4), (" 12.5 %", "12.5%", 5), ("5/class", "5/class", 5), ("0.001", "0.1%", 1)],
)
def test_labels_are_read(text: str | float, name: str, of_forty: int) -> None:
    setting = subsets.read_labels(text)
    assert (setting.name, setting.count(40)) == (name, of_forty)
    assert subsets.read_labels(setting.name) == setting


@pytest.mark.parametrize("text", ["0", "1", "100%", "0/class", "5 per class", "ten", "-1%", "1.5/class", ""])
def test_labels_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match=r"write 10%, 0\.1 or 5/class"):
        subsets.read_labels(text)


def test_inner_split_leaves_every_class_something_to_learn_from() -> None:
    labels = torch.tensor([0] * 40 + [1] * 9 + [2])
    for seed in range(20):
        kept, out = subsets.inner_split(labels, seed)
        assert sorted([*kept.tolist(), *out.tolist()]) == list(range(50))
        assert len(out) == 10
        assert set(labels[kept].tolist()) == {0, 1, 2}
    order = torch.randperm(50, generator=torch.Generator().manual_seed(derive(0, "probe-strength")))
    assert 49 in order[10:].tolist() and subsets.inner_split(labels, 0)[1].tolist() == order[:10].tolist()
    kept, out = subsets.inner_split(torch.arange(7), 0)
    assert (len(kept), len(out)) == (7, 0)


def test_compare_measures_every_entry_on_the_same_subsets() -> None:
    (train_x, train_y), (val_x, val_y) = blobs(80, 6, 4, 1.5), blobs(60, 6, 4, 1.5, seed=1)
    entries = {"trained": (train_x, val_x), "untrained": (random(80, 6), random(60, 6)), "pixels": (train_x, val_x)}
    found, done = [(name, Features(x, train_y), Features(y, val_y)) for name, (x, y) in entries.items()], list[int]()
    settings = read_settings(labels="50%,2/class")
    result = compare.compare(found, settings, done=lambda: done.append(1))
    rows = {(row["labels_setting"], row["weights"], row["method"], row["subset"]): row for row in result["rows"]}
    assert len(done) == len(rows) == len(result["rows"]) == 2 * 3 * 2 * 3
    assert {(key[0], row["labels"]) for key, row in rows.items()} == {("50%", 40), ("2/class", 8)}
    subset = subsets.label_subsets(train_y, subsets.read_labels(0.5), 3, 0)[2]
    expected = knn.knn_accuracy(train_x[subset], train_y[subset], val_x, val_y)
    assert rows["50%", "trained", "knn", 2]["accuracy"] == expected
    for setting in ("50%", "2/class"):
        for method in ("knn", "linear"):
            summary = result["summary"][setting][method]
            for name in entries:
                scores = [rows[setting, name, method, number]["accuracy"] for number in range(3)]
                assert summary[name] == pytest.approx([statistics.mean(scores), statistics.stdev(scores)])
            assert summary["trained"] == summary["pixels"]


def test_compare_refuses_what_could_show_no_spread() -> None:
    x, y = blobs(8, 2, 2, 1.0)
    entries = [("trained", Features(x, y), Features(x, y))]
    with pytest.raises(UserError, match="labels = 4/class takes all 8 images"):
        compare.compare(entries, read_settings(labels="4/class"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"repeats": 1}, "repeats is 1, but at least 2"),
        ({"labels": "10%,1"}, "labels = '1' is not"),
        ({"labels": ()}, "no labels"),
        ({"methods": "knn,attentiv"}, "unknown method 'attentiv'; nearest: attentive"),
        ({"methods": "x"}, "there are linear, linear-sgd, attentive, knn"),
        ({"methods": ()}, "unknown method ''"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_settings_that_do_not_fit(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(**words)


def test_settings_are_the_same_however_they_are_written() -> None:
    assert read_settings() == Settings()
    written = read_settings(methods="knn,attentive", labels="10%, 0.5,10%")
    assert written == read_settings(methods=("attentive", "knn"), labels=["10%", 0.5])
    assert written.methods == ("attentive", "knn")
    assert [setting.name for setting in written.labels] == ["10%", "50%"]


Scores = dict[str, list[float]]


def comparison(settings: dict[str, dict[str, Scores]]) -> dict[str, Any]:
    rows, summary = [], dict[str, Any]()
    for setting, methods in settings.items():
        summary[setting] = {}
        for method, scores in methods.items():
            for name, values in scores.items():
                rows += [
                    {"labels_setting": setting, "weights": name, "method": method, "subset": number, "accuracy": value}
                    for number, value in enumerate(values)
                ]
            summary[setting][method] = {name: [statistics.mean(v), statistics.stdev(v)] for name, v in scores.items()}
    return {"rows": rows, "summary": summary}


BETTER = {"trained": [75.0, 75.8, 76.6], "untrained": [49.4, 49.6, 49.8]}
UNCLEAR = {"trained": [20.0, 20.5, 21.0], "untrained": [20.8, 20.8, 20.8]}
# Ahead on the mean by more than the spread, but behind on one subset.
AHEAD_NOT_ALWAYS = {"trained": [51.0, 52.0, 50.0], "untrained": [50.0, 49.0, 50.1]}
# Ahead on every subset, but by less than the spread.
AHEAD_BY_LITTLE = {"trained": [50.1, 55.1, 45.1], "untrained": [50.0, 55.0, 45.0]}
WORSE = {"trained": BETTER["untrained"], "untrained": BETTER["trained"]}


@pytest.mark.parametrize(
    ("linear", "knn", "expected"),
    [
        (
            BETTER,
            UNCLEAR,
            "Pre-training helped: linear accuracy 75.8 % against 49.6 % untrained (+26.2 points, spread 0.8); "
            "kNN did not improve (20.5 % against 20.8 %).",
        ),
        (
            BETTER,
            BETTER,
            "Pre-training helped: linear accuracy 75.8 % against 49.6 % untrained (+26.2 points, spread 0.8) and "
            "kNN 75.8 % against 49.6 % untrained (+26.2 points, spread 0.8).",
        ),
        (
            AHEAD_NOT_ALWAYS,
            AHEAD_BY_LITTLE,
            "Pre-training made no clear difference: linear accuracy 51.0 % against 49.7 % untrained "
            "(+1.3 points, spread 1.0) and kNN 50.1 % against 50.0 % untrained (+0.1 points, spread 5.0).",
        ),
        (
            WORSE,
            UNCLEAR,
            "Pre-training hurt: linear accuracy 49.6 % against 75.8 % untrained (-26.2 points, spread 0.8); "
            "kNN made no clear difference (20.5 % against 20.8 %).",
        ),
        (
            WORSE,
            BETTER,
            "Pre-training helped and hurt: better kNN 75.8 % against 49.6 % untrained (+26.2 points, spread 0.8), "
            "but worse linear accuracy 49.6 % against 75.8 % untrained (-26.2 points, spread 0.8).",
        ),
        (
            BETTER | {"pixels": [77.0, 78.0, 79.0]},
            UNCLEAR,
            "Pre-training helped: linear accuracy 75.8 % against 49.6 % untrained (+26.2 points, spread 0.8); "
            "kNN did not improve (20.5 % against 20.8 %); raw pixels do better still (78.0 %).",
        ),
        (
            {"untrained": [1.0, 2.0]},
            {"untrained": [1.0, 2.0]},
            "No pre-trained network was given, so there is nothing to say about pre-training.",
        ),
    ],
)
def test_verdict(linear: Scores, knn: Scores, expected: str) -> None:
    assert compare.verdict(comparison({"50%": {"linear": linear, "knn": knn}})) == expected


def test_verdict_on_several_settings_has_a_sentence_for_each() -> None:
    settings = {
        "1/class": {"linear": UNCLEAR, "attentive": UNCLEAR, "knn": UNCLEAR | {"pixels": [30.0, 31.0, 32.0]}},
        "10%": {"linear": BETTER, "attentive": WORSE, "knn": UNCLEAR},
    }
    assert compare.verdict(comparison(settings)) == (
        "With 1 label a class, pre-training made no clear difference to linear accuracy, attentive accuracy and kNN; "
        "raw pixels do better still (31.0 %). With 10 % of the labels, pre-training helped linear accuracy (75.8 % "
        "against 49.6 %), hurt attentive accuracy (49.6 % against 75.8 %) and made no clear difference to kNN."
    )


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (BETTER, "better"),
        (WORSE, "worse"),
        (UNCLEAR, "unclear"),
        (AHEAD_NOT_ALWAYS, "unclear"),
        (AHEAD_BY_LITTLE, "unclear"),
    ],
)
def test_what_is_clear(scores: Scores, expected: str) -> None:
    assert clear(scores["trained"], scores["untrained"]) == expected
    assert clear(scores["trained"][:1], scores["untrained"][:1]) == "unclear"
    with pytest.raises(ValueError, match="shorter"):
        clear(scores["trained"], scores["untrained"][:2])


class Colours(nn.Module):
    """A network that has learnt what matters here (the mean colour), or one that sees a single corner."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.learnt = learnt

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images if self.learnt else images[:, :, :1, :1]]


@pytest.mark.parametrize(
    "words",
    [
        {"phases": "64:0.5,96:0.5"},
        # 224 px work, 112 px, which moving blocks together would make of them, do not.
        {"resolution": 64, "hide": "compact", "masking": "grid"},
    ],
)
def test_the_untrained_network_is_what_the_run_began_with(words: dict[str, Any]) -> None:
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    config = update(Config(), {"model": "swin_tiny_patch4_window7_224", "model_args": small, **words})
    torch.manual_seed(derive(config.optim.seed, "init"))
    began = build_network(config, None)
    network = untrained_network(config, None, 224)
    assert network.resolution == 224
    expected = began.at(224).weights()
    assert network.weights().keys() == expected.keys()
    for name, value in network.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a slight tint for each of two classes; one file cannot be read."""
    root = tmp_path_factory.mktemp("shelves")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        (root / name).mkdir()
        for index in range(40):
            pixels = rng.integers(0, 200, (24, 24, 3))
            pixels[:, :, 2 - 2 * label] += 30
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    (root / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


def test_run_probe_on_a_folder(shelves: Path) -> None:
    data = labelled(str(shelves))
    result = run_probe(
        Colours(True),
        Colours(False),
        data,
        resolution=16,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        batch_size=32,
        model="colours",
    )
    assert json.loads(json.dumps(result)) == result
    keys = ["model", "classes", "train", "val", "resolution", "rows", "summary", "verdict"]
    assert list(result) == keys
    assert (result["model"], result["classes"]) == ("colours", 2)
    assert result["train"] + result["val"] == 80, "the broken file is not counted"
    assert {row["weights"] for row in result["rows"]} == {"trained", "untrained", "pixels"}
    linear = result["summary"]["50%"]["linear"]
    assert linear["trained"][0] > 95 > 80 > linear["untrained"][0]
    assert result["verdict"].startswith("Pre-training helped: linear accuracy ")


def test_run_probe_without_a_trained_network(shelves: Path) -> None:
    result = run_probe(
        None,
        Colours(True),
        labelled(str(shelves)),
        resolution=16,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
    )
    assert result["summary"]["50%"]["knn"].keys() == {"untrained", "pixels"}
    assert result["verdict"].startswith("No pre-trained network")
