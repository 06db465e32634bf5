# SPDX-License-Identifier: Apache-2.0
"""Weights and images by formula, and what the original FastMIM code (commit d4eea0d) computes from them.

`goldens/official_keys.json` holds the names and shapes of the original models' states, `goldens/official_index.json`
the place of each name in the sorted list of all of a model's keys, and `goldens/official_outputs.npz` the outputs. So
a test needs no download, and none of the original weights or code is here.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
PHASE = 0.7


def image(n: int, s: int) -> Tensor:
    """The images of every output: float32, of shape (n, 3, s, s)."""
    b, c, y, x = np.ogrid[:n, :3, :s, :s]
    waves = np.sin(PHASE + 0.11 * x * (1 + c) + 0.07 * y * (1 + b)) + 0.5 * np.cos(0.013 * x * y / (1 + c) + b)
    return torch.from_numpy(waves.astype(np.float32))


def official_state(name: str) -> dict[str, Tensor]:
    """The filled state of an original model, under the original names.

    Args:
        name: as in the outputs, such as "pretrain__cmt_small".
    """
    shapes, index = (_read(f"official_{file}.json")[name.replace("__", "/")] for file in ("keys", "index"))
    return {key: _fill(key, tuple(shape), index[key]) for key, shape in shapes.items()}


def official_output(name: str) -> Tensor:
    """What the original model of ``official_state(name)`` says of `image`, in eval mode.

    Logits (2, 1000) of 224 px for "finetune__...", dense tokens (2, N, C) of 128 px for "pretrain__...".
    """
    with np.load(GOLDENS / "official_outputs.npz") as outputs:
        return torch.from_numpy(outputs[name])


def _fill(key: str, shape: tuple[int, ...], i: int) -> Tensor:
    w = np.sin(PHASE * (i + 1) + 0.37 * np.arange(math.prod(shape))).reshape(shape)
    if key.endswith("running_var"):
        w = 1 + 0.5 * w * w
    elif len(shape) == 1:
        w = 1 + 0.1 * w if key.endswith("weight") else 0.1 * w
    else:
        w = w / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(w.astype(np.float32))


@cache
def _read(file: str) -> Any:
    return json.loads((GOLDENS / file).read_text(encoding="utf-8"))
