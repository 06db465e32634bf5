# SPDX-License-Identifier: Apache-2.0
"""Does pre-training help? Pre-train from scratch on a folder's training images, probe against the untrained network.

    python benchmarks/gain.py imagenette DATA/imagenette-96 model=... epochs=... --seeds 0 1 2

DATA holds train/ and val/ with class folders; training sees train/ without its labels. One row per seed and measure
goes into results/NAME.csv: means and spreads over 3 subsets of half the labels, trained, untrained and raw pixels.
"""

import argparse
import tempfile
import time
from pathlib import Path

import rows

import fastmim
from fastmim.cli_options import parse_yaml
from fastmim.config import update
from fastmim.recipes import load


def main() -> None:
    """Runs every seed and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="results/NAME.csv")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("words", nargs="*", help="key=value options of pretrain")
    options = parser.parse_args()
    words = {key: parse_yaml(value, key) for key, _, value in (word.partition("=") for word in options.words)}
    origin = rows.origin()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            out = (options.keep or Path(scratch)) / f"{options.name}-{seed}"
            config = update(
                load("fastmim"), {**words, "data": str(options.data / "train"), "out": str(out), "seed": seed}
            )
            began = time.perf_counter()
            run = fastmim.pretrain(config)
            minutes = (time.perf_counter() - began) / 60
            result = fastmim.probe(run, str(options.data))
            print(result["verdict"])
            speed = sorted(line["images_per_s"] for line in run.metrics if line["kind"] == "train")
            (summary,) = result["summary"].values()
            for measure, row in summary.items():
                facts = {
                    "set": options.data.name,
                    "seed": seed,
                    "measure": measure,
                    "labels": result["rows"][0]["labels"],
                }
                for weights in ("trained", "untrained", "pixels"):
                    mean, std = row.get(weights, (float("nan"), float("nan")))
                    facts |= {weights: f"{mean:.2f}", f"{weights}_std": f"{std:.2f}"}
                facts["gain"] = f"{row['trained'][0] - row['untrained'][0]:.2f}"
                facts |= {"minutes": f"{minutes:.1f}", "images_per_s": f"{speed[len(speed) // 2]:.0f}"}
                facts |= {"model": run.config.method.model, "resolution": run.config.data.resolution}
                facts |= {"epochs": run.config.optim.epochs, "verdict": result["verdict"]}
                rows.append(options.name, [facts | origin])


if __name__ == "__main__":
    main()
