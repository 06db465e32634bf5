# SPDX-License-Identifier: Apache-2.0
"""FastMIM-P against the largest size from the start: time, features, and the loss where the size changes.

    python benchmarks/phases.py DATA/signs-96 model=... epochs=... --phases 64:0.6,80:0.25,96:0.15

DATA holds train/ and val/ with class folders; training sees train/ without its labels. Of three runs with the same
options, one grows, one has the largest size throughout, one the smallest. At a change of size, the jump is the mean
loss of the readings after it minus that of those before it, and the noise the largest difference between two
neighbouring windows of readings of that length inside of the phases. Rows go into results/phases.csv.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import rows

import fastmim
from fastmim.cli_options import parse_yaml
from fastmim.config import update
from fastmim.recipes import load

WINDOW = 5  # readings on each side of a change


def main() -> None:
    """Trains the three runs and appends their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--phases", required=True)
    parser.add_argument("words", nargs="*", help="key=value options of pretrain")
    options = parser.parse_args()
    words = {key: parse_yaml(value, key) for key, _, value in (word.partition("=") for word in options.words)}
    origin = rows.origin()
    sizes = [int(pair.split(":")[0]) for pair in options.phases.split(",")]
    runs = {
        "growing": {"phases": options.phases},
        "largest": {"resolution": max(sizes)},
        "smallest": {"resolution": min(sizes)},
    }
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, own in runs.items():
            out = Path(scratch) / name
            config = update(load("fastmim"), {**words, **own, "data": str(options.data / "train"), "out": str(out)})
            began = time.perf_counter()
            run = fastmim.pretrain(config)
            minutes = (time.perf_counter() - began) / 60
            # All of them are judged at the largest size, at which they would be used.
            result = fastmim.probe(run, str(options.data), resolution=max(sizes))
            (summary,) = result["summary"].values()
            found.append(_row(name, run.metrics, summary, minutes) | _facts(run.config))
            print(found[-1])
    slowest = next(row["minutes"] for row in found if row["run"] == "largest")
    for row in found:
        row["share_of_largest"] = round(row["minutes"] / slowest, 3)
    rows.append("phases", [row | origin for row in found])


def _row(name: str, metrics: list[dict[str, Any]], summary: dict[str, Any], minutes: float) -> dict[str, Any]:
    train = [line for line in metrics if line["kind"] == "train"]
    losses, phases = [line["loss"] for line in train], [line.get("phase", 0) for line in train]
    changes = [place for place in range(1, len(phases)) if phases[place] != phases[place - 1]]
    jumps = [_step(losses, place) for place in changes]
    # The beginning, where the loss falls fast, says nothing of noise.
    inside = [
        abs(_step(losses, place))
        for place in range(len(losses) // 4, len(losses) - WINDOW)
        if all(abs(place - change) >= WINDOW for change in changes)
    ]
    return {
        "run": name,
        "minutes": round(minutes, 2),
        "share_of_largest": 0.0,
        "linear": summary["linear"]["trained"][0],
        "linear_untrained": summary["linear"]["untrained"][0],
        "knn": summary["knn"]["trained"][0],
        "knn_untrained": summary["knn"]["untrained"][0],
        "loss": round(statistics.fmean(losses[-WINDOW:]), 5),
        "jumps": " ".join(f"{jump:+.5f}" for jump in jumps),
        "noise": round(max(inside), 5),
    }


def _step(losses: list[float], place: int) -> float:
    after, before = losses[place : place + WINDOW], losses[place - WINDOW : place]
    return statistics.fmean(after) - statistics.fmean(before)


def _facts(config: fastmim.Config) -> dict[str, Any]:
    sizes = ", ".join(f"{size} px {share:.0%}" for size, share in config.data.course)
    return {"model": config.method.model, "sizes": sizes, "epochs": config.optim.epochs, "seed": config.optim.seed}


if __name__ == "__main__":
    main()
