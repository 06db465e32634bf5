# SPDX-License-Identifier: Apache-2.0
"""The parts of fine-tuning against plain loops: augmentation, mixing, averaging, weighing, distilling, judging."""

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from torch import Tensor, nn

from fastmim.config import ClassifyConfig, DistillMethodConfig
from fastmim.data.splits import Part, Splits
from fastmim.data.table import from_names
from fastmim.data.vary import RandAugment
from fastmim.errors import UserError
from fastmim.outcome import calibration_error, measure
from fastmim.tasks.classify import Classify, class_weights
from fastmim.tasks.distill import Distill, Teacher, distance

PLAIN: dict[str, Any] = {"mixup": 0, "cutmix": 0, "erase": 0, "smoothing": 0}


def net(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def task(network: nn.Module | None = None, labels: list[int] | None = None, **words: Any) -> Classify:
    method = ClassifyConfig(**{**PLAIN, **words})
    return Classify(network or net(), method, torch.tensor(labels or [0, 1, 2, 2]), 3, mean=(0.5,) * 3, std=(0.25,) * 3)


def batch(count: int = 4) -> dict[str, Tensor]:
    images = torch.from_numpy(np.stack([draw(index, 16) for index in range(count)])).permute(0, 3, 1, 2).contiguous()
    return {"images": images, "indices": torch.arange(count)}


def test_rand_augment_is_a_pure_function_of_its_key() -> None:
    change, pixels = (
        RandAugment("rand-m9-mstd0.5-inc1", 32, (0.5, 0.4, 0.3)),
        torch.from_numpy(draw(1, 32)).permute(2, 0, 1),
    )
    random.seed(5)
    np.random.seed(5)
    before, numbers = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    state = torch.get_rng_state()
    one = [change(pixels, key) for key in range(30)]
    assert random.getstate() == before and (np.random.get_state()[1] == numbers).all()
    assert torch.equal(torch.get_rng_state(), state)
    random.seed(6)
    assert all(torch.equal(a, change(pixels, key)) for key, a in enumerate(one))
    assert len({a.numpy().tobytes() for a in one}) > 20
    assert all(a.shape == pixels.shape and a.dtype == torch.uint8 for a in one)


@pytest.mark.parametrize("words", ["strong", "rand-q9", "augmix-m3"])
def test_rand_augment_in_words_that_timm_does_not_know(words: str) -> None:
    with pytest.raises(UserError, match="is not in timm's words"):
        RandAugment(words, 32, (0.5,) * 3)


def test_the_plain_loss_is_cross_entropy() -> None:
    model, data = task(smoothing=0.1).eval(), batch()
    logits = model.network((data["images"] / 255 - 0.5) / 0.25).detach()
    by_hand = 0.0
    for row, label in zip(logits.log_softmax(1).tolist(), [0, 1, 2, 2], strict=True):
        by_hand -= sum((0.9 * (k == label) + 0.1 / 3) * value for k, value in enumerate(row)) / 4
    assert float(model(data)[0].detach()) == pytest.approx(by_hand, rel=1e-5)


def test_mixing_keeps_shares_of_images_and_labels() -> None:
    model = task(mixup=0.8, cutmix=0)
    torch.manual_seed(3)
    images, target = model.varied(batch()["images"], torch.tensor([0, 1, 2, 2]))
    plain, one_hot = task().varied(batch()["images"], torch.tensor([0, 1, 2, 2]))
    assert torch.equal(target.sum(1), torch.ones(4)) and torch.equal(one_hot, torch.eye(3)[[0, 1, 2, 2]])
    share = float(target[0, 0])
    assert 0 < share < 1
    # The neighbour before it is mixed in: image i with image i - 1.
    assert torch.allclose(images, share * plain + (1 - share) * plain.roll(1, 0), atol=1e-5)
    torch.manual_seed(3)
    cut, target = task(mixup=0, cutmix=1.0).varied(batch()["images"], torch.tensor([0, 1, 2, 2]))
    other = (cut[0] != plain[0]).any(0)
    assert torch.equal(cut[0][:, other], plain[3][:, other])
    assert float(target[0, 0]) == pytest.approx(1 - float(other.float().mean()), abs=0.02)


def test_erasing_puts_noise_into_a_rectangle_of_some_images() -> None:
    torch.manual_seed(0)
    plain = task().varied(batch()["images"], torch.tensor([0, 1, 2, 2]))[0]
    images = [task(erase=0.5).varied(batch()["images"], torch.tensor([0, 1, 2, 2]))[0] for _ in range(50)]
    changed = torch.stack([(one != plain).any(1).flatten(1).any(1) for one in images])
    assert 0.35 < float(changed.float().mean()) < 0.65
    shares = [(one != plain).any(1).float().mean((1, 2)) for one in images]
    sizes = torch.cat(shares)[changed.flatten()]
    assert float(sizes.min()) > 0.01 and float(sizes.max()) < 0.4


def test_the_average_follows_the_weights() -> None:
    model = task(ema=0.9)
    assert model.average is not None
    slow = copy.deepcopy(model.network)
    optimiser = torch.optim.SGD(model.network.parameters(), lr=0.1)
    for step in range(1, 30):
        model(batch())[0].backward()
        optimiser.step()
        optimiser.zero_grad()
        model.stepped()
        decay = min(0.9, 1 - step ** (-2 / 3))  # timm's warm-up: at first the average is the weights themselves
        with torch.no_grad():
            for name, value in slow.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(model.network.state_dict()[name], 1 - decay)
    for name, value in model.judged.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, slow.state_dict()[name], atol=1e-5), name
    again = task(ema=0.9)
    again.load_state_dict(model.state_dict())
    assert again.updates == 29


def test_weights_of_classes_give_each_the_same_part() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    weights = class_weights(labels, 2)
    assert float(weights[0] * 8) == float(weights[1] * 2) == 5
    model, data = task(net(), [0, 0, 0, 1], balance="loss", smoothing=0.0).eval(), batch()
    losses = -model.network((data["images"] / 255 - 0.5) / 0.25).log_softmax(1)[torch.arange(4), [0, 0, 0, 1]]
    expected = (losses * torch.tensor([4 / 9, 4 / 9, 4 / 9, 4 / 3])).mean()
    assert float(model(data)[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_distance_to_the_teacher() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    by_hand = 0.0
    for one, other in zip((student / 2).softmax(1).tolist(), (teacher / 2).softmax(1).tolist(), strict=True):
        by_hand += 4 * sum(q * (math.log(q) - math.log(p)) for p, q in zip(one, other, strict=True)) / 5
    assert float(distance(student, teacher, 2.0)) == pytest.approx(by_hand, rel=1e-5)
    assert float(distance(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_the_teacher_sees_its_own_size_and_statistics() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3))

    teacher = Teacher(Watch(), 8, (0.2, 0.2, 0.2), (0.5, 0.5, 0.5))
    student = Distill(
        net(), teacher, DistillMethodConfig(**PLAIN), torch.tensor([0, 1, 2, 2]), 3, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    loss = student(batch())[0]
    loss.backward()
    assert seen[0].shape == (4, 3, 8, 8)
    wanted = nn.functional.interpolate(batch()["images"].float() / 255, size=8, mode="bilinear", antialias=True)
    assert torch.allclose(seen[0], (wanted - 0.2) / 0.5, atol=1e-4)
    assert not any(name.startswith("_teacher") or "teacher" in name for name in student.state_dict())


def found(labels: list[int], names: tuple[str, ...]) -> Splits:
    part = Part(from_names("/x", [f"{i}.png" for i in range(len(labels))], [1] * len(labels)), tuple(labels))
    return Splits(names, part, part, part, "")


def test_what_is_measured() -> None:
    torch.manual_seed(2)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    logits = torch.randn(10, 3) + 2 * torch.eye(3)[labels]
    logits[7] = torch.tensor([5.0, 0.0, 0.0])
    facts = measure(logits, labels, torch.arange(10), found(labels.tolist(), ("a", "b", "c"))).facts
    answers = logits.argmax(1).tolist()
    confusion = [[0] * 3 for _ in range(3)]
    for label, answer in zip(labels.tolist(), answers, strict=True):
        confusion[label][answer] += 1
    assert facts["confusion"] == confusion
    assert facts["accuracy"]["top1"] == pytest.approx(100 * sum(confusion[k][k] for k in range(3)) / 10)
    recalls = [confusion[k][k] / sum(confusion[k]) for k in range(3)]
    assert facts["accuracy"]["balanced"] == pytest.approx(100 * sum(recalls) / 3)
    named = [sum(row[k] for row in confusion) for k in range(3)]
    f1 = [2 * confusion[k][k] / (named[k] + sum(confusion[k])) for k in range(3)]
    assert facts["accuracy"]["macro_f1"] == pytest.approx(100 * sum(f1) / 3)
    assert facts["accuracy"]["majority"] == 60 and "top5" not in facts["accuracy"]
    assert facts["accuracy"]["low"] < facts["accuracy"]["top1"] < facts["accuracy"]["high"]


def test_calibration_against_a_loop() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.randn(200, 4).mul(2).softmax(1), torch.randint(4, (200,))
    total = 0.0
    for low in range(15):
        inside = [
            (float(row.max()), int(row.argmax()) == int(label))
            for row, label in zip(probabilities, labels, strict=True)
            if low / 15 <= float(row.max()) < (low + 1) / 15
        ]
        if inside:
            confidence, right = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            total += abs(confidence - right) * len(inside) / 200
    assert calibration_error(probabilities, labels) == pytest.approx(total, abs=1e-5)
