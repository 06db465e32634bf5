# SPDX-License-Identifier: Apache-2.0
"""A trainer that trains in milliseconds: softmax regression on what frozen weights make of small pictures.

It has the words of fine-tuning and leaves what that leaves. The weights of a run see the picture's spectrum, which
says how stripes lie wherever they begin; untrained ones see it through noise.
"""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from fastmim.config import Config, update
from fastmim.data.augment import Box
from fastmim.data.labelled import Labelled, labelled
from fastmim.data.pictures import Pictures
from fastmim.data.table import ImageTable
from fastmim.run_folder import Run

SIDE = 24
DIMNESS = 0.7
SEEN: dict[Any, np.ndarray] = {}
ANGLES = {"lying": np.pi / 2, "slanted": np.pi / 4, "upright": 0.0}


def stripes(index: int, angle: float) -> np.ndarray:
    """A noisy grating that begins anywhere."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = 128 + 40 * np.sin(along * rng.uniform(0.7, 1.1) + rng.uniform(0, 6.3))
    return (wave[..., None] + rng.normal(0, 45, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def draw_set(folder: Path, train: int = 20, val: int = 40, names: dict[str, str] | None = None) -> Path:
    """train/ and val/ with three classes of stripes; ``names`` gives classes other names."""
    for place, (name, angle) in enumerate(ANGLES.items()):
        for split, count in (("train", train), ("val", val)):
            here = folder / split / (names or {}).get(name, name)
            here.mkdir(parents=True)
            for index in range(count):
                seed = 100_000 * place + 10_000 * (split == "val") + index
                Image.fromarray(stripes(seed, angle)).save(here / f"{index:03d}.png")
    return folder


def pretrained(folder: Path, quality: float, paths: tuple[str, ...] = ("images",), seconds: float = 90.0) -> Path:
    """A run folder whose weights see the spectrum (quality 1), nothing (0), or as untrained ones do (-1)."""
    (folder / "export" / "timm").mkdir(parents=True)
    options: dict[str, Any] = {"paths": paths, "model": "vit_tiny_patch16_224", "resolution": SIDE}
    config = update(Config(), options)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    line = {"kind": "train", "step": 10, "samples": 640, "seconds": seconds, "loss": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    save_file({"quality": np.array([quality])}, folder / "export" / "timm" / "model.safetensors")
    return folder


class TinyTrainer:
    """Remembers its calls; ``stop_after`` runs, it is interrupted like a person's Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def __call__(self, data: str, start: str, *, out: str, labels: str | None, seed: int, **words: Any) -> Run:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            Path(out).mkdir()
            (Path(out) / "half.txt").write_text("begun", encoding="utf-8")
            raise KeyboardInterrupt
        self.calls.append({"data": data, "start": start, "out": out, "labels": labels, "seed": seed, **words})
        began = time.monotonic()
        sets = labelled(data)
        chosen = subset(sets, labels, words["label_seed"])
        y = np.array(sets.train_labels)[chosen]
        if words.get("shuffle_labels"):
            y = np.random.default_rng(seed).permutation(y)
        see = eye(start, seed)
        x, x_test = see(pixels(sets.train.take(chosen))), see(pixels(sets.val))
        chances = fit(x, y, x_test, len(sets.classes), words.get("steps") or 200)
        folder = Path(out)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")), encoding="utf-8")
        right = write_predictions(folder / "predictions.csv", sets, chances)
        result = {
            "classes": list(sets.classes),
            "train": len(y),
            "test": len(chances),
            "steps": words.get("steps") or 200,
        }
        result |= {"seconds": time.monotonic() - began, "accuracy": {"top1": 100 * right / len(chances)}}
        run = Run(folder)
        run.write("finetune.json", result)
        return run


def subset(sets: Labelled, labels: str | None, seed: int) -> list[int]:
    """Rows of the training images whose labels are used."""
    rng, found = np.random.default_rng(seed), []
    for label in range(len(sets.classes)):
        rows = [row for row, one in enumerate(sets.train_labels) if one == label]
        count = len(rows)
        if labels is not None:
            word = labels.removesuffix("/class")
            count = int(word) if word != labels else round(float(labels.removesuffix("%")) / 100 * len(rows))
        found += rng.permutation(rows)[: max(count, 1)].tolist()
    return sorted(found)


def pixels(table: ImageTable) -> np.ndarray:
    """[n, side, side], grey, 0 to 1."""
    key = (table.fingerprint, table.containers)
    if key not in SEEN:
        SEEN[key] = _pixels(table)
    return SEEN[key]


def _pixels(table: ImageTable) -> np.ndarray:
    opened = (Pictures(table).open(row) for row in range(len(table)))
    return np.stack([one.crop(Box(0, 0, one.width, one.height), SIDE).numpy().mean(0) / 255 for one in opened])


def eye(start: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """What the weights make of pictures."""
    quality = -1.0
    if start != "scratch":
        quality = float(load_file(Run(start).exported / "model.safetensors")["quality"][0])
    own = int(start != "scratch")
    noise = np.random.default_rng([seed, own])

    def see(images: np.ndarray) -> np.ndarray:
        if quality < 0:
            images = images + noise.normal(0, DIMNESS, images.shape)
        return abs(quality) * np.abs(np.fft.fft2(images))[:, :6, :6].reshape(len(images), -1)

    return see


def fit(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, classes: int, steps: int) -> np.ndarray:
    """Chances of every class for the test images, by softmax regression with plain gradient descent."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    weight, bias = np.zeros((x.shape[1], classes)), np.zeros(classes)
    for _ in range(steps):
        wrong = softmax(x @ weight + bias) - np.eye(classes)[y]
        weight -= 0.1 * (x.T @ wrong / len(x) + 0.01 * weight)
        bias -= 0.1 * wrong.mean(0)
    return softmax(x_test @ weight + bias)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def write_predictions(path: Path, sets: Labelled, chances: np.ndarray) -> int:
    """predictions.csv; how many are right."""
    right = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "predicted", "p_true", *(f"p:{name}" for name in sets.classes)])
        for row, chance in enumerate(chances):
            true, said = sets.val_labels[row], int(chance.argmax())
            right += true == said
            names = (sets.classes[true], sets.classes[said])
            writer.writerow([sets.val.path(row), *names, f"{chance[true]:.4f}", *(f"{one:.4f}" for one in chance)])
    return right
