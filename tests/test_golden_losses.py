# SPDX-License-Identifier: Apache-2.0
"""Ten steps of every recipe's tiny variant give the losses that they gave before.

A change that should not touch the mathematics must leave them as they are. To write them anew, with a reason in the
commit: ``python tests/test_golden_losses.py``.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastmim
from fastmim import recipes
from fastmim.config import update

GOLDENS = Path(__file__).parent / "goldens" / "losses.json"
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "resolution": 32, "global_batch": 16, "micro_batch": 16, "lr": 1e-3, "warmup": 0.2, "log_every": 1, "device": "cpu",
    "precision": "fp32", "tensorboard": False, "holdout": 0.0, "workers": 0,
}  # fmt: skip
# What a recipe's own settings would make too large, or does not fit a network of two blocks.
OWN: dict[str, dict[str, Any]] = {
    "fastmim_p": {"phases": [[32, 0.5], [48, 0.5]]},
    "localmim": {"scales": [0, 1], "decoder_dim": 64},
    "mae": {"decoder_dim": 64, "decoder_depth": 2},
    "selectivemae": {"decoder_dim": 64, "decoder_depth": 2},
    "simmim": {"block": 16},
}


def losses(recipe: str, folder: Path) -> list[float]:
    """The ten losses of a recipe on pictures that a formula draws (PNG: JPEG decoders differ by a bit)."""
    images = folder / "images"
    images.mkdir()
    y, x = np.mgrid[:40, :40]
    for index in range(16):
        waves = np.sin((1 + index % 4) * x / 6 + index) + np.cos((1 + index // 4) * y / 5)
        colours = 128 + 50 * waves[..., None] * np.array([1.0, 0.7, -0.5])
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(images / f"{index:02d}.png")
    words = {**TINY, **OWN.get(recipe, {}), "data": str(images), "out": str(folder / "run"), "epochs": 10}
    run = fastmim.pretrain(update(recipes.load(recipe), words))
    return [line["loss"] for line in run.metrics if line["kind"] == "train"]


@pytest.mark.parametrize("recipe", recipes.names())
def test_losses_are_what_they_were(recipe: str, tmp_path: Path) -> None:
    stored = json.loads(GOLDENS.read_text())[recipe]
    # Processors add in different orders; a change of the mathematics shows in the third digit.
    assert losses(recipe, tmp_path) == pytest.approx(stored, rel=2e-4)
    assert len(stored) == 10 and stored[-1] < stored[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        content = {}
        for name in recipes.names():
            (Path(scratch) / name).mkdir()
            content[name] = losses(name, Path(scratch) / name)
    GOLDENS.write_text(json.dumps(content, indent=1) + "\n")
