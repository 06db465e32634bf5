# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md from results/*.csv, between their marks; ``--check`` only compares.

python benchmarks/readme_tables.py
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import rows

README = Path(__file__).resolve().parents[1] / "README.md"


def gain(name: str) -> str:
    """Trained against untrained, one line per measure, averaged over the seeds of the last commit measured."""
    found = rows.read(name)
    newest = [row for row in found if row["commit"] == found[-1]["commit"] and row["set"] == found[-1]["set"]]
    seeds = sorted({row["seed"] for row in newest}, key=int)
    lines = ["| measure | pre-trained | untrained | gain | raw pixels |", "|---|---|---|---|---|"]
    for measure in dict.fromkeys(row["measure"] for row in newest):
        mine = [row for row in newest if row["measure"] == measure]

        def mean(column: str, mine: list[dict[str, str]] = mine) -> float:
            return statistics.fmean(float(row[column]) for row in mine)

        cells = [f"{mean(w):.1f} ± {mean(f'{w}_std'):.1f}" for w in ("trained", "untrained")]
        pixels = "" if mine[0]["pixels"] == "nan" else f"{mean('pixels'):.1f}"
        lines.append(f"| {measure} | {cells[0]} | {cells[1]} | **{mean('gain'):+.1f}** | {pixels} |")
    minutes = statistics.fmean(float(row["minutes"]) for row in newest)
    one = newest[0]
    lines += [
        "",
        f"({one['model']}, {one['resolution']} px, {one['epochs']} epochs in {minutes:.1f} minutes of pre-training; "
        f"mean of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; {one['machine']})",
    ]
    return "\n".join(lines)


def backbones() -> str:
    """How many of timm's families can be pre-trained."""
    found = rows.read("backbones")
    good = sum(row["ok"] == "True" for row in found)
    reasons = sorted({row["reason"] for row in found if row["reason"]})
    return (
        f"Of the {len(found)} families of networks in timm {found[0]['timm']}, {good} ({good / len(found):.0%}) "
        f"pre-train; why the others do not: {', '.join(reasons)} "
        f"([`results/backbones.csv`](results/backbones.csv))."
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": lambda: gain("demo"),
    "imagenette": lambda: gain("imagenette"),
    "backbones": backbones,
}


def filled(text: str) -> str:
    """README.md with its tables as the results say."""
    for name, table in TABLES.items():
        before, mark, rest = text.partition(f"<!-- table:{name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit("README.md is not what results/ say; run benchmarks/readme_tables.py" if before != after else 0)
    README.write_text(after, encoding="utf-8")
