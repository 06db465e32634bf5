# SPDX-License-Identifier: Apache-2.0
"""Which of timm's networks can be pre-trained? The smallest of each family takes two steps.

Writes results/backbones.csv.

    python benchmarks/backbones.py              all families, about 15 minutes on one core
    python benchmarks/backbones.py resnet eva   these alone, nothing is written

Each family runs in a process of its own, so that a crash or an endless loop costs one row.
"""

import argparse
import math
import multiprocessing
import re
import sys
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import rows
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.backbones.adapter import TimmBackbone, build
from fastmim.backbones.blueprint import Blueprint
from fastmim.backbones.catalog import describe, families
from fastmim.backbones.hiding import HidingBackbone
from fastmim.errors import UserError
from fastmim.mask import resize_mask

RESOLUTION = 128
SECONDS = 600  # for a family, most of it to find the smallest network
COLUMNS = (
    *("module", "model", "params", "resolution", "strides", "hides", "ok", "reason", "without_gradient"),
    *("loss_before", "loss_after", "seconds"),
)


class Pretraining(nn.Module):
    """Hide 3 of 4 blocks, predict a fixed random picture there."""

    def __init__(self, backbone: TimmBackbone, resolution: int) -> None:
        super().__init__()
        self.hiding = HidingBackbone(backbone)
        (stage,) = backbone.stages
        self.head = nn.Conv2d(stage.channels, 3 * stage.stride**2, 1)
        self.stride = stage.stride
        side = next(side for side in (8, 7, 6, 5, 4, 3, 2) if resolution % side == 0)
        order = torch.rand(2, side**2).argsort(dim=1).argsort(dim=1)
        self.mask = (order < round(0.75 * side**2)).unflatten(1, (side, side))

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        prediction = F.pixel_shuffle(self.head(self.hiding(images, self.mask)[-1]), self.stride)
        error = (prediction - target).square()
        return error.mean(dim=1)[resize_mask(self.mask, error.shape[-1])].mean()


def pretrain(backbone: TimmBackbone, resolution: int) -> tuple[float, float, int]:
    """Two steps of AdamW; the losses before and after, and the trainable parameters that got no gradient."""
    torch.manual_seed(0)
    model = Pretraining(backbone, resolution)
    images, target = torch.randn(2, 2, 3, resolution, resolution)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses, without = [], 0
    for _ in range(2):
        loss = model(images, target)
        optimizer.zero_grad()
        loss.backward()
        without = max(without, sum(weight.grad is None for weight in trained))
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(images, target).item())
    return losses[0], losses[-1], without


def build_near(name: str) -> tuple[TimmBackbone, int]:
    """At 128 px, or at the nearest size that the error names."""
    try:
        return build(name, RESOLUTION), RESOLUTION
    except UserError as error:
        sizes = re.search(r"nearest that work: (.*)", str(error))
        if sizes is None:
            raise
        size = min(map(int, sizes[1].split(", ")), key=lambda size: abs(size - RESOLUTION))
        return build(name, size), size


def count(name: str) -> int:
    return sum(weight.numel() for weight in Blueprint(name, {}).model.parameters())


def try_family(names: list[str], pipe: Connection) -> None:
    """In the child process: send what is known of the row, as soon as it is known."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    smallest = describe(min(names, key=count))
    pipe.send({"model": smallest["name"], "params": smallest["params"], "hides": " ".join(sorted(smallest["hides"]))})
    start = time.perf_counter()
    try:
        backbone, resolution = build_near(smallest["name"])
        pipe.send({"resolution": resolution, "strides": " ".join(str(stage.stride) for stage in backbone.stages)})
        before, after, without = pretrain(backbone, resolution)
    except UserError as error:
        print(error, file=sys.stderr)
        pipe.send({"ok": False, "reason": "size"})
    except Exception as error:  # any failure is a result here
        print(error, file=sys.stderr)
        pipe.send({"ok": False, "reason": type(error).__name__})
    else:
        reason = "gradient" if without else "" if math.isfinite(before + after) else "loss"
        pipe.send({"ok": not reason, "reason": reason, "without_gradient": without})
        pipe.send({"loss_before": round(before, 4), "loss_after": round(after, 4)})
    pipe.send({"seconds": round(time.perf_counter() - start, 1)})


def watch_family(names: list[str]) -> dict[str, Any]:
    """In the parent: the row, also when the child crashes or never ends."""
    context = multiprocessing.get_context("fork")  # torch and timm take seconds to import; the child has them already
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=try_family, args=(names, send))
    child.start()
    send.close()
    row: dict[str, Any] = {"ok": False, "reason": "crash"}
    deadline = time.monotonic() + SECONDS
    try:
        while "seconds" not in row:
            if not receive.poll(max(0.0, deadline - time.monotonic())):
                row |= {"ok": False, "reason": "timeout"}
                break
            row |= receive.recv()
    except EOFError:
        pass
    child.kill()
    child.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="*", help="families to try; all when not given")
    chosen = parser.parse_args().module
    # timm's own test networks are smaller than anything that is used.
    found = {module: [name for name in names if not name.startswith("test_")] for module, names in families().items()}
    torch.set_num_threads(1)
    origin = rows.origin()
    measured = []
    for number, module in enumerate(chosen or found, start=1):
        row = dict.fromkeys(COLUMNS, "") | {"module": module} | watch_family(found[module])
        measured.append(row | origin)
        print(f"{number}/{len(chosen or found)} " + " ".join(f"{key}={row[key]}" for key in COLUMNS), flush=True)
    print(f"{sum(row['ok'] for row in measured)} of {len(measured)} families work")
    if not chosen:  # only now, so that a sweep cut short does not cost the last whole one
        (rows.RESULTS / "backbones.csv").unlink(missing_ok=True)
        rows.append("backbones", measured)


if __name__ == "__main__":
    main()
