# SPDX-License-Identifier: Apache-2.0
"""A run folder as a real run leaves it, made in a second: for tests of what reads run folders, and to look at pages.

    python tests/fake_run.py OUT [--photos FOLDER] [--target hog]

The images are drawn (or given photos), the HOG is real, predictions are noisy targets, and the curves are formulas with
noise. Nothing here is a result.
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter
from safetensors.numpy import save_file

from fastmim.config import Config, update

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(
    out: Path,
    target: str = "hog",
    steps: int = 1200,
    images: UInt8[np.ndarray, "N 3 S S"] | None = None,
    bad: Sequence[tuple[str, str]] = (("photos/broken.jpg", "truncated JPEG"),),
    options: dict[str, object] | None = None,
    labels: dict[str, tuple[int, float]] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a whole run folder and returns it.

    Args:
        out: the folder; made when it is not there.
        target: hog, pixels or pixels_norm.
        steps: length of the run.
        images: what to show; drawn when not given. S is a multiple of 32.
        bad: rows of bad_images.csv.
        options: further options of the config, by their flat names.
        labels: settings of the probe: how many labels, and the share of the full accuracy that they give.
        seed: of the noise.
    """
    noise = np.random.default_rng(seed)
    images = drawn(10) if images is None else images
    (out / "images").mkdir(parents=True, exist_ok=True)
    config = resolved(target, images.shape[-1], options or {})
    (out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    _write_small_files(out, steps, bad)
    records = _metrics(steps, noise)
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    _write_pictures(out / "images", images, target, noise)
    (out / "probe.json").write_text(json.dumps(_probe(noise, labels or {"50%": (1000, 1.0)})), encoding="utf-8")
    (out / "export" / "timm").mkdir(parents=True, exist_ok=True)
    save_file({"blocks.0.weight": np.zeros((5, 1000), np.float32)}, out / "export" / "timm" / "model.safetensors")
    return out


def resolved(target: str, side: int, options: dict[str, object]) -> Config:
    """A config with every value chosen, as a run writes it."""
    words = {
        "paths": ("photos/signs-96",), "model": "vit_tiny_patch16_224", "resolution": side, "target": target,
        "block": 16, "cell": 8 if target == "hog" else 16, "decoder_dim": 64, "decoder_depth": 1, "epochs": 40,
        "global_batch": 64, "micro_batch": 64, "lr": 3.75e-5, "device": "cuda", "precision": "bf16", "workers": 8,
        "out": "runs/pretrain/vit_tiny-signs-001",
    }  # fmt: skip
    return update(Config(), {**words, "mean": MEAN, "std": STD, **options})


def drawn(count: int, side: int = 96) -> UInt8[np.ndarray, "N 3 S S"]:
    """Pictures of coloured shapes on soft grounds."""
    noise = np.random.default_rng(1)
    pictures = []
    for _ in range(count):
        picture = Image.new("RGB", (side, side), tuple(noise.integers(120, 220, 3).tolist()))
        brush = ImageDraw.Draw(picture)
        for _ in range(6):
            x, y, size = (int(value) for value in noise.integers((0, 0, side // 6), (side, side, side // 2)))
            colour = tuple(noise.integers(0, 255, 3).tolist())
            if noise.random() < 0.5:
                brush.ellipse((x - size, y - size // 2, x + size, y + size // 2), fill=colour)
            else:
                brush.polygon([(x, y - size), (x + size, y + size // 2), (x - size, y + size // 3)], fill=colour)
        pictures.append(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8))))
    return np.stack(pictures).transpose(0, 3, 1, 2)


def read_photos(folder: Path, count: int, side: int = 96) -> UInt8[np.ndarray, "N 3 S S"]:
    """Photos of a folder, spread over all of it, cut to squares."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    pictures = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        with Image.open(path) as picture:
            edge = min(picture.size)
            pictures.append(np.asarray(picture.convert("RGB").crop((0, 0, edge, edge)).resize((side, side))))
    return np.stack(pictures).transpose(0, 3, 1, 2)


def hog(image: UInt8[np.ndarray, "3 S S"], cell: int = 8, bins: int = 9) -> Float[np.ndarray, "C h w"]:
    """Histograms of oriented gradients by a plain loop, from the definition: channel = colour * bins + bin."""
    colours, side, _ = image.shape
    table = np.zeros((colours, bins, side // cell, side // cell))
    for colour in range(colours):
        wide = np.pad(image[colour].astype(float), 1, mode="reflect").tolist()
        for y in range(side):
            above, here, below = wide[y : y + 3]
            for x in range(side):
                gx = (above[x] + 2 * here[x] + below[x]) - (above[x + 2] + 2 * here[x + 2] + below[x + 2])
                gy = (above[x] + 2 * above[x + 1] + above[x + 2]) - (below[x] + 2 * below[x + 1] + below[x + 2])
                place = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                table[colour, place, y // cell, x // cell] += math.hypot(gx, gy)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return table.reshape(colours * bins, side // cell, side // cell).astype(np.float32)


def cells_of(levels: Float[np.ndarray, "3 S S"], cell: int) -> Float[np.ndarray, "C h w"]:
    """Pixels of each cell by a plain loop: channel = colour * cell * cell + row * cell + column."""
    grid = levels.shape[-1] // cell
    table = np.zeros((3 * cell * cell, grid, grid), np.float32)
    for y in range(grid):
        for x in range(grid):
            table[:, y, x] = levels[:, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].reshape(-1)
    return table


def pixels(image: UInt8[np.ndarray, "3 S S"], cell: int, normalise: bool) -> Float[np.ndarray, "C h w"]:
    """The targets "pixels" and "pixels_norm"."""
    table = cells_of((image / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)), cell)
    return (table - table.mean(axis=0)) / table.std(axis=0).clip(1e-3) if normalise else table


def _write_pictures(
    folder: Path, images: UInt8[np.ndarray, "N 3 S S"], target: str, noise: np.random.Generator
) -> None:
    shown = images[:6]
    if target == "hog":
        targets = np.stack([hog(image) for image in shown])
    else:
        targets = np.stack([pixels(image, 16, target == "pixels_norm") for image in shown])
    grid = images.shape[-1] // 16
    order = noise.random((len(shown), grid * grid)).argsort(axis=1)
    mask = (order < round(0.75 * grid * grid)).reshape(-1, grid, grid)
    # A trained network predicts something between the target and the mean, with some noise.
    prediction = 0.75 * targets + 0.25 * targets.mean(axis=1, keepdims=True) + noise.normal(0, 0.08, targets.shape)
    arrays = {"images": shown, "mask": mask, "target": targets, "prediction": prediction.astype(np.float32)}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "reconstruction.safetensors",
        metadata={"target": target, "cell": "8" if target == "hog" else "16"},
    )
    small = images[:, :, ::2, ::2]
    thumbs = np.stack([np.roll(small, -query, axis=0)[:7] for query in range(5)])
    similarity = np.sort(noise.uniform(0.55, 0.97, (5, 6)).astype(np.float32), axis=1)[:, ::-1]
    save_file(
        {"thumbs": np.ascontiguousarray(thumbs), "similarity": np.ascontiguousarray(similarity)},
        folder / "neighbours.safetensors",
    )


def _metrics(steps: int, noise: np.random.Generator) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        done = step / steps
        samples, epoch, seconds = step * 64, step * 64 / 2062, step * 0.066
        loss = 0.052 + 0.045 * math.exp(-7 * done) + 0.02 * math.exp(-60 * done) + noise.normal(0, 0.0012)
        lr = 3.75e-5 * min(done / 0.025, 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.025) / 0.975)))
        wait = abs(noise.normal(0.09, 0.03))
        records.append(
            {
                "kind": "train", "step": step, "samples": samples, "epoch": epoch, "loss": loss, "lr": lr,
                "images_per_s": 970 * (1 - wait) + noise.normal(0, 12), "data_wait": wait, "seconds": seconds,
            }
        )  # fmt: skip
        if step % max(1, steps // 10) == 0:
            records.append(
                {
                    "kind": "eval", "step": step, "samples": samples, "epoch": epoch, "seconds": seconds,
                    "val_loss": 0.0535 + 0.045 * math.exp(-7 * done) + noise.normal(0, 0.0004),
                    "effective_rank": 14 + 60 * (1 - math.exp(-4 * done)) + noise.normal(0, 1),
                    "knn": 20.8 + 20 * done + noise.normal(0, 0.6), "linear": 49.6 + 26 * done**0.6,
                }
            )  # fmt: skip
    return records


def _probe(noise: np.random.Generator, settings: dict[str, tuple[int, float]]) -> dict[str, object]:
    means = {
        "knn": {"trained": 40.8, "untrained": 20.8, "pixels": 67.0},
        "linear": {"trained": 75.8, "untrained": 49.6},
    }
    rows: list[dict[str, object]] = []
    summary: dict[str, dict[str, dict[str, list[float]]]] = {}
    for setting, (labels, share) in settings.items():
        summary[setting] = {method: {} for method in means}
        for method, weights in means.items():
            for name, mean in weights.items():
                points = [round(float(share * mean + noise.normal(0, 0.9)), 2) for _ in range(3)]
                summary[setting][method][name] = [float(np.mean(points)), float(np.std(points, ddof=1))]
                rows += [
                    {
                        "labels_setting": setting, "weights": name, "method": method, "subset": subset,
                        "labels": labels, "accuracy": point,
                    }
                    for subset, point in enumerate(points)
                ]  # fmt: skip
    trained, untrained = (summary[next(iter(settings))]["linear"][name][0] for name in ("trained", "untrained"))
    verdict = (
        f"It helped: a linear probe is right on {trained:.1f} % of unseen images, against {untrained:.1f} % with the "
        "untrained network, but comparing raw pixels still finds better neighbours."
    )
    return {
        "data": "photos/signs-96", "model": "vit_tiny_patch16_224", "classes": 10, "train": 1000, "val": 412,
        "resolution": 96, "rows": rows, "summary": summary, "verdict": verdict,
    }  # fmt: skip


def _write_small_files(out: Path, steps: int, bad: Sequence[tuple[str, str]]) -> None:
    contents = {
        "environment.json": {
            "fastmim": "0.1.0", "python": "3.12.1", "torch": "2.15.0", "torchvision": "0.30.0", "timm": "1.0.31",
            "platform": "Linux", "device": "cuda:0", "device_name": "NVIDIA H200", "threads": 16, "git": None,
            "command": "fastmim pretrain photos/signs-96 --model vit_tiny_patch16_224 --epochs 40",
        },
        "data.json": {
            "paths": ["photos/signs-96"], "images": 2062, "bytes": 4_120_000, "formats": {"jpeg": 2062},
            "held_out": 41, "fingerprint": "0" * 64,
        },
        "status.json": {
            "state": "finished", "step": steps, "steps": steps, "samples": steps * 64, "pid": 1, "host": "host",
            "heartbeat": "2026-01-01T00:00:00+00:00", "message": "",
        },
    }  # fmt: skip
    for name, content in contents.items():
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    with (out / "bad_images.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *bad])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--target", default="hog", choices=["hog", "pixels", "pixels_norm"])
    arguments = parser.parse_args()
    images = read_photos(arguments.photos, 12, side=128) if arguments.photos else None
    print(build(arguments.out, target=arguments.target, images=images))


if __name__ == "__main__":
    main()
