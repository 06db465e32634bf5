# SPDX-License-Identifier: Apache-2.0
"""Probes that are trained step by step, against plain trainings and plain loops."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastmim.data.labelled import labelled
from fastmim.errors import UserError
from fastmim.tasks import features
from fastmim.tasks.probing import attentive, linear_sgd, sweep
from fastmim.tasks.probing.linear import linear_accuracy
from fastmim.tasks.probing.run import run_probe
from fastmim.tasks.probing.settings import read_settings

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps, in batches that do not divide the images."""
    monkeypatch.setattr(sweep, "_MOST_STEPS", 30)
    for module in (sweep, linear_sgd, attentive):
        monkeypatch.setattr(module, "BATCH", 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(count: int, width: int, classes: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % classes
    return random(classes, width, seed=99)[labels] + spread * random(count, width, seed=seed), labels


def test_every_epoch_sees_every_image_in_an_order_of_its_own(quick: None) -> None:
    found = list(sweep.batches(40, 7, seed=3))
    assert [len(batch) for batch in found] == [16, 16, 8, 16, 16, 8, 16]
    first, second = torch.cat(found[:3]), torch.cat(found[3:6])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(found, sweep.batches(40, 7, seed=3), strict=True))
    assert not torch.equal(found[0], next(sweep.batches(40, 7, seed=4)))


def test_steps_are_epochs_within_bounds() -> None:
    assert [sweep.count_steps(images) for images in (10, 256 * 10, 10**7)] == [500, 900, 12_500]


def test_the_rate_is_chosen_by_hits_then_by_loss_and_the_middle_without_a_choice() -> None:
    labels = torch.arange(20) % 2

    def train(kept: Tensor, out: Tensor) -> Tensor:
        right = F.one_hot(labels[out], 2).float()
        return torch.stack([1 - right, right, 2 * right, 3 * right * torch.tensor([0.0, 1.0])])

    assert sweep.choose_rate([1.0, 2.0, 3.0, 4.0], labels, 0, train) == 3.0

    def never(kept: Tensor, out: Tensor) -> Tensor:
        raise AssertionError("nothing is held out")

    assert sweep.choose_rate([1.0, 2.0, 3.0], torch.arange(5), 0, never) == 2.0


def test_sgd_side_by_side_equals_one_after_the_other(quick: None) -> None:
    """Against torch's own SGD, cosine and gradient."""
    x, y = blobs(40, 6, 3, 1.0)
    rates = (0.01, 0.1, 1.0)
    weight, bias = linear_sgd.fit_sgd(x, y, 3, rates, seed=1)
    assert len({float(one.sum()) for one in weight.abs()}) == 3
    for place, rate in enumerate(rates):
        layer = nn.Linear(6, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 30)
        for batch in sweep.batches(40, 30, seed=1):
            optimiser.zero_grad()
            F.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
        torch.testing.assert_close(weight[place], layer.weight.T.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias[place, 0], layer.bias.detach(), rtol=1e-3, atol=1e-4)


def test_linear_sgd_says_what_the_exact_optimum_says_every_time() -> None:
    train, val = blobs(200, 16, 4, 2.0), blobs(400, 16, 4, 2.0, seed=1)
    first = linear_sgd.linear_sgd_accuracy(*train, *val)
    assert linear_sgd.linear_sgd_accuracy(*train, *val) == first
    assert 60 < first < 99
    assert first == pytest.approx(linear_accuracy(*train, *val), abs=4)


def slow_logits(tokens: Tensor, probe: attentive.Probe, place: int) -> Tensor:
    """One probe by loops over images, heads and tokens, from the definition of cross-attention."""
    query, keys, values, weight, bias = (tensor[place] for tensor in probe)
    rows = []
    for image in tokens:
        pooled: list[Tensor] = []
        for head in range(len(query)):
            scores = [float(query[head] @ (keys[:, head].T @ token)) / math.sqrt(query.shape[1]) for token in image]
            total = sum(math.exp(score) for score in scores)
            pooled.append(
                sum(
                    (
                        math.exp(score) / total * (values[:, head].T @ token)
                        for score, token in zip(scores, image, strict=True)
                    ),
                    torch.zeros(values.shape[2]),
                )
            )
        rows.append(torch.cat(pooled) @ weight + bias[0])
    return torch.stack(rows)


def test_attentive_pooling_equals_loops() -> None:
    shapes = [(2, 3, 4), (2, 12, 3, 4), (2, 12, 3, 4), (2, 12, 5), (2, 1, 5)]
    probe = attentive.Probe(*(random(*shape, seed=number) for number, shape in enumerate(shapes)))
    tokens = random(6, 7, 12, seed=9)
    found = attentive.attentive_logits(tokens, probe)
    assert found.shape == (2, 6, 5)
    for place in range(2):
        torch.testing.assert_close(found[place], slow_logits(tokens, probe, place), rtol=1e-4, atol=1e-4)


def test_attentive_side_by_side_equals_one_after_the_other() -> None:
    tokens, labels = random(20, 5, 8), torch.arange(20) % 3
    rates = (1e-3, 1e-2)
    together = attentive._Training(8, 3, rates, 0, CPU)
    alone = [attentive._Training(8, 3, [rate], 0, CPU) for rate in rates]
    for step in range(10):
        for training in (together, *alone):
            training.step(tokens, labels, sweep.cosine(step, 10))
    for found, first, second in zip(together.weights(), *(one.weights() for one in alone), strict=True):
        torch.testing.assert_close(found, torch.cat([first, second]), rtol=1e-4, atol=1e-6)
        assert not torch.equal(first, second)


def few_tell(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One token of sixteen, marked by its first channel, tells the class by the sign of its second."""
    tokens, labels = random(count, 16, 8, seed=seed), torch.arange(count) % 2
    place = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed))
    tokens[:, :, 0] = 0
    tokens[range(count), place, 0] = 8.0
    tokens[range(count), place, 1] = 1.5 * (2 * labels - 1)
    return tokens.half(), labels


def test_attentive_finds_the_token_that_matters_and_a_mean_does_not() -> None:
    (train_x, train_y), (val_x, val_y) = few_tell(300, 0), few_tell(200, 1)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = attentive.attentive_accuracy(train_x, train_y, val_x, val_y)
    assert found > 95
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_accuracy(train_x.float().mean(1), train_y, val_x.float().mean(1), val_y) < 85


def test_attentive_is_the_same_every_time_and_learns_from_one_image_a_class(quick: None) -> None:
    (train_x, train_y), (val_x, val_y) = few_tell(2, 0), few_tell(60, 1)
    first = attentive.attentive_accuracy(train_x, train_y, val_x, val_y)
    assert attentive.attentive_accuracy(train_x, train_y, val_x, val_y) == first
    vectors = train_x.float().mean(1), train_y, val_x.float().mean(1), val_y
    assert 0 <= linear_sgd.linear_sgd_accuracy(*vectors) <= 100
    assert 0 <= linear_accuracy(*vectors) <= 100


def test_token_statistics_equal_those_of_all_at_once(quick: None) -> None:
    tokens = (50 + torch.arange(1, 7) * random(40, 5, 6)).half()
    tokens[:, :, 3] = 7
    mean, scale = attentive._statistics(tokens)
    every = tokens.flatten(0, 1).double()
    torch.testing.assert_close(mean, every.mean(0).float())
    expected = 1 / every.std(0, correction=0).float()
    expected[3] = 0
    torch.testing.assert_close(scale, expected)


class Grid(nn.Module):
    """The image itself as its only map."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def test_tokens_are_the_last_map_place_by_place() -> None:
    images = torch.randint(0, 256, (5, 3, 2, 4), generator=torch.Generator().manual_seed(0)).byte()
    bank = features.TokenBank(7)
    loader = [{"images": part} for part in images.split(2)]
    vectors, _ = features.features(Grid(), loader, CPU, (0.0,) * 3, (1.0,) * 3, keep=bank.add)
    assert bank.tokens.shape == (5, 8, 3)
    torch.testing.assert_close(bank.tokens[4, 1 * 4 + 2], (images[4, :, 1, 2] / 255).half())
    torch.testing.assert_close(bank.tokens.float().mean(1), vectors, rtol=1e-3, atol=1e-3)
    big = features.TokenBank(1)
    big.add(torch.full((1, 2, 1, 1), -1e9))
    assert big.tokens.flatten().tolist() == [-65504, -65504]


def test_tokens_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=4 * 2 * 100 * 6 * 3)
    monkeypatch.setattr(features.psutil, "virtual_memory", lambda: free)
    features.TokenBank(100).add(torch.zeros(1, 3, 2, 3))
    with pytest.raises(UserError, match="fewer images or a smaller --resolution"):
        features.TokenBank(101).add(torch.zeros(1, 3, 2, 3))


@pytest.fixture
def shelves(tmp_path: Path) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for index in range(12):
            pixels = rng.integers(100 * label, 100 * label + 100, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    yield tmp_path


def test_all_methods_on_a_folder(shelves: Path, quick: None) -> None:
    settings = read_settings("knn,linear,linear-sgd,attentive", "1/class,50%", repeats=2, k=1)
    result = run_probe(
        Grid(), Grid(), labelled(str(shelves)), settings, resolution=8, mean=(0.5,) * 3, std=(0.2,) * 3, device=CPU
    )
    assert list(result["summary"]) == ["1/class", "50%"]
    for methods in result["summary"].values():
        assert list(methods) == ["linear", "linear-sgd", "attentive", "knn"]
        for method, accuracies in methods.items():
            assert ("pixels" in accuracies) == (method != "attentive")
            assert accuracies["trained"] == accuracies["untrained"]
    assert len(result["rows"]) == 2 * 2 * (4 + 4 + 3)
    assert all(mean == 100 for mean, _ in result["summary"]["50%"]["linear"].values())
    assert result["verdict"].startswith("With 1 label a class, pre-training made no clear difference to linear")
