# SPDX-License-Identifier: Apache-2.0
"""Does pre-training help fine-tuning, and does the comparison say no where nothing can help?

    python benchmarks/compare.py DATA/imagenette-96 model=... epochs=... --labels 10% --epochs 20 --keep FOLDER
    python benchmarks/compare.py DATA/imagenette-96 --run RUN --inits imagenet --labels 1% 10%

DATA holds train/ and val/ with class folders. Pre-trains on train/ without its labels (or takes --run), compares with
untrained weights, and again with shuffled labels. A row for each start and label setting goes into results/compare.csv.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rows

import fastmim
from fastmim.cli_options import parse_yaml
from fastmim.comparing.compare import Comparison
from fastmim.config import update
from fastmim.recipes import load
from fastmim.starts import SCRATCH


def main() -> None:
    """Pre-trains, compares twice and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", help="a run to compare; pre-trained here when not given")
    parser.add_argument("--inits", nargs="*", default=[], help="further starts, as imagenet")
    parser.add_argument("--labels", nargs="+", default=["10%"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--global-batch", type=int)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--keep", type=Path, help="keep the folders here; what is there already is not made again")
    parser.add_argument("words", nargs="*", help="key=value options of pretrain")
    options = parser.parse_args()
    words = {key: parse_yaml(value, key) for key, _, value in (word.partition("=") for word in options.words)}
    origin = rows.origin()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        run = options.run or pretrained(options.data, folder / "pretrained", words)
        for shuffled in (False, True):
            found = fastmim.compare(
                str(options.data),
                [run, *options.inits],
                labels=options.labels,
                seeds=options.seeds,
                steps=options.steps,
                epochs=options.epochs,
                global_batch=options.global_batch,
                resolution=options.resolution,
                shuffle_labels=shuffled,
                out=str(folder / ("shuffled" if shuffled else "compared")),
            )
            print(found.verdict)
            if found.interrupted:
                break
            rows.append("compare", [row | origin for row in results(found, options.data.name)])


def pretrained(data: Path, out: Path, words: dict[str, Any]) -> str:
    """A run on the training images; one that is there already is taken."""
    if (out / "export" / "timm" / "model.safetensors").is_file():
        return str(out)
    config = update(load("fastmim"), {**words, "data": str(data / "train"), "out": str(out)})
    return str(fastmim.pretrain(config).path)


def results(found: Comparison, name: str) -> Iterator[dict[str, Any]]:
    """A row for each start and label setting."""
    facts = found.facts
    for score in facts["scores"]:
        against = next(
            (
                one
                for one in facts["differences"]
                if (one["labels"], one["a"], one["b"]) == (score["labels"], score["start"], SCRATCH)
            ),
            None,
        )
        row = {"set": name, "shuffled": facts["shuffled"], "start": score["start"], "labels": score["labels"]}
        row |= {"train": score["train"], "test": facts["images"], "seeds": len(score["accuracies"])}
        row |= {"mean": f"{score['mean']:.2f}", "spread": "" if score["spread"] is None else f"{score['spread']:.2f}"}
        row |= dict.fromkeys(("difference", "low", "high", "p", "outcome", "detectable"), "")
        if against is not None:
            row |= {"difference": f"{against['points']:.2f}", "low": f"{against['low']:.2f}"}
            row |= {"high": f"{against['high']:.2f}", "p": f"{against['corrected']:.2g}"}
            row |= {"outcome": against["outcome"], "detectable": f"{against['detectable']:.2f}"}
        row |= {"chance": f"{facts['chance']:.2f}", "left_out": facts["left_out"], "network": facts["network"]}
        cost = next(one for one in facts["cost"] if one["start"] == score["start"])
        row |= {"steps": cost["steps"], "finetune_s": f"{cost['finetune_seconds']:.0f}"}
        row["pretrain_s"] = "" if cost["pretrain_seconds"] is None else f"{cost['pretrain_seconds']:.0f}"
        yield row | {"verdict": found.verdict}


if __name__ == "__main__":
    main()
