# SPDX-License-Identifier: Apache-2.0
"""``fastmim demo``: pre-train a small network from scratch, measure whether it helped, export, report.

The photos are Sign Language Digits (Zeynep Dikle, Arda Mavi and pupils of Ankara Ayranci Anadolu High School;
Apache-2.0): 1,653 of them to learn from, 409 to judge by. They were chosen because they are photos in colour, which
Fashion-MNIST is not, and because shape tells their classes apart, which HOG can see; the gain is in results/demo.csv.
"""

import zipfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from fastmim import recipes, runs
from fastmim.config import Config, update
from fastmim.errors import UserError
from fastmim.run_folder import Run, free_folder

_SET = "signs-96"
# A ViT of 1.2 million parameters on crops of 64 px: small enough to learn from scratch on two cores, and of the family
# that most people use. Patches of 8 px give it an 8 x 8 grid, as patches of 16 px give the paper's ViT at 128 px;
# hidden patches are not encoded, which is what makes three quarters of the work go away.
OFFLINE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
    },
    "resolution": 64,
    "hide": "drop",
    "epochs": 40,
    "global_batch": 64,
    "lr": 1.5e-3,
    "warmup": 0.1,
}
ONLINE: dict[str, Any] = {
    "model": "vit_small_patch16_224",
    "model_args": {"class_token": False, "global_pool": "avg"},
    "resolution": 128,
    "hide": "drop",
    "epochs": 20,
    "global_batch": 128,
    "lr": 6e-4,
}


def demo(out: str | None = None, online: bool = False) -> Path:
    """Runs the demo and returns the path of its report.

    Args:
        out: the run folder; the next free one below runs/ when not given.
        online: fetch Imagenette (94 MB) instead of using the photos that ship with the package.

    Raises:
        UserError: the run folder cannot be used, or Imagenette cannot be fetched.
    """
    photos = imagenette(Path("runs/imagenette")) if online else unpack(Path("runs"))
    words = {**(ONLINE if online else OFFLINE), "data": str(photos / "train")}
    words["out"] = out or str(free_folder(Path("runs"), "demo"))
    run = runs.pretrain(demo_config(words))
    if run.status["state"] != "finished":
        return run.path
    print("measuring: kNN and linear accuracy, against the same network untrained, on 3 subsets of the labels")
    result = runs.probe(run, str(photos))
    say(run, result)
    return run.path / "report.html"


def demo_config(words: dict[str, Any]) -> Config:
    """The FastMIM recipe with the demo's sizes."""
    return update(recipes.load("fastmim"), words, "demo")


def say(run: Run, result: dict[str, Any]) -> None:
    """The measurements in a small table, the verdict, and where the weights are."""
    names = ("trained", "untrained", "pixels")
    print(f"\n{'accuracy in %':16}" + "".join(f"{name:>16}" for name in names))
    (summary,) = result["summary"].values()
    for method, row in summary.items():
        cells = (f"{row[name][0]:.1f} +- {row[name][1]:.1f}" if name in row else "" for name in names)
        print(f"{method:16}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\n{result['verdict']}\n")
    print(f"weights: timm.create_model('local-dir:{run.exported}', pretrained=True, num_classes=10)")


def unpack(folder: Path) -> Path:
    """The photos of the package, as files below ``folder``."""
    target = folder / _SET
    with as_file(files("fastmim.demo") / f"{_SET}.zip") as archive, zipfile.ZipFile(archive) as content:
        names = content.namelist()
        if not all((folder / name).is_file() for name in names):
            content.extractall(folder)
    return target


def imagenette(folder: Path) -> Path:
    """Imagenette at 160 px (fast.ai), fetched by torchvision."""
    from torchvision.datasets import Imagenette

    try:
        for split in ("train", "val"):
            Imagenette(str(folder), split=split, size="160px", download=not (folder / "imagenette2-160").exists())
    except OSError as error:
        raise UserError(f"Imagenette cannot be fetched ({error}); without the network use 'fastmim demo'") from None
    return folder / "imagenette2-160"
