# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and docs/*.md from results/*.csv, between their marks; ``--check`` only compares.

python benchmarks/readme_tables.py
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import rows

from fastmim.recipes import finetune

HOME = Path(__file__).resolve().parents[1]
# What an H100 does in an hour at 40 % of its 989 TFLOP/s, in multiply-accumulates; and the images of ImageNet-1k.
H100_HOUR, IMAGENET = 0.4 * 989e12 / 2 * 3600, 1_281_167
# Images a second that one H200 takes of ViT-B/16 at 128 px (assumed), and multiply-accumulates at 224 px (billions).
DEMAND, COST = 10_000, {"ViT-S/16": 4.6, "ViT-B/16": 17.6, "ViT-L/16": 61.6}


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


# Of the many that are measured, those that a first look needs.
SHORT = {
    *("simmim", "mae", "localmim", "fastmim", "fastmim+discard", "fastmim+hide=drop", "fastmim+hide=drop+discard"),
    *("compact", "compact+discard"),
}


def methods(short: bool = False) -> str:
    """Training steps of every method as ratios to SimMIM at 224 px, one column for each network."""
    found = [row for row in rows.read("methods") if row["batch"] == "32"]
    last = {row["model"]: row["commit"] for row in found}
    newest = [row for row in found if row["commit"] == last[row["model"]]]
    models = list(dict.fromkeys(row["model"] for row in newest))
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in newest:
        # How much is discarded, and how a network that has no patch embedding hides, differs from network to network.
        words = [word.partition("=")[0] if word.startswith("discard") else word for word in row["method"].split("+")]
        name = "+".join(word for word in words if word != "hide=pixels")
        table.setdefault((name, row["px"]), {})[row["model"]] = row["ratio"]
    order = sorted(table, key=lambda key: statistics.fmean(float(ratio) for ratio in table[key].values()))
    if short:
        order = [key for key in order if key[0] in SHORT]
    lines = [f"| method | px | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    for name, px in order:
        cells = " | ".join(table[name, px].get(model, "") for model in models)
        lines.append(f"| {name.replace('+', ' + ')} | {px} | {cells} |")
    one = newest[0]
    note = (
        f"(images/s as multiples of SimMIM's at 224 px in the same run; batch {one['batch']}, {one['threads']} thread"
    )
    return "\n".join([*lines, "", f"{note}, {one['precision']}; {one['machine']}; medians of rounds that take turns)"])


def phases() -> str:
    """Images that grow, against one size throughout."""
    found = rows.read("phases")
    newest = [row for row in found if row["commit"] == found[-1]["commit"]]
    lines = ["| run | sizes | minutes | of the largest | linear | kNN | jumps of the loss | noise |", "|---" * 8 + "|"]
    for row in newest:
        cells = [row["run"], row["sizes"], row["minutes"], f"{float(row['share_of_largest']):.0%}"]
        cells += [f"{float(row[name]):.1f}" for name in ("linear", "knn")]
        lines.append(f"| {' | '.join([*cells, row['jumps'], row['noise']])} |")
    one = newest[0]
    return "\n".join(
        [*lines, "", f"({one['model']}, {one['epochs']} epochs, one seed; untrained at the largest size: linear "
         f"{float(one['linear_untrained']):.1f}, kNN {float(one['knn_untrained']):.1f} %; {one['machine']})"]
    )  # fmt: skip


def data() -> str:
    """Images a second of every way to feed a device, as ratios to the baseline of the same run."""
    lines = ["| | images/s | times the baseline | PSNR | HOG error | KiB |", "|---|---|---|---|---|---|"]
    newest = _newest_data()
    for row in newest:
        if row["method"].startswith("crop of"):
            continue
        quality = [row["psnr"], row["hog_error"], row["kib"]]
        lines.append(f"| {' | '.join([row['method'], row['images_per_s'], row['ratio'], *quality])} |")
    crops = [row for row in newest if row["method"].startswith("crop of")]
    cut = "; ".join(f"{row['method']}: {1e6 / float(row['images_per_s']):.0f} us an image" for row in crops)
    one = newest[0]
    return "\n".join(
        [*lines, "", f"({one['resolution']} px; {one['machine']}; medians of rounds that take turns. {cut}.)"]
    )


def cores() -> str:
    """How many cores of the measured machine feed one H200."""
    speed = {row["method"]: float(row["images_per_s"]) for row in _newest_data()}
    largest = max(int(name.split()[2].rstrip(",")) for name in speed if name.startswith("prepared jpeg"))
    ways = {
        "Pillow + torchvision": "folder, baseline",
        "folder": "folder",
        f"prepared JPEG of {largest} px, crop on the CPU": f"prepared jpeg {largest}, crop on CPU",
        f"prepared JPEG of {largest} px, crop on the GPU": f"prepared jpeg {largest}, squares",
        f"prepared values of {largest} px, crop on the GPU": f"prepared raw {largest}, squares",
    }
    lines = [f"| | {' | '.join(COST)} |", "|---" * (1 + len(COST)) + "|"]
    demands = [DEMAND * COST["ViT-B/16"] / cost for cost in COST.values()]
    lines.append(f"| images/s | {' | '.join(f'{demand:,.0f}' for demand in demands)} |")
    for way, method in ways.items():
        lines.append(f"| {way} | {' | '.join(f'{demand / speed[method]:.1f}' for demand in demands)} |")
    return "\n".join(lines)


def _newest_data() -> list[dict[str, str]]:
    found = rows.read("data")
    return [row for row in found if (row["commit"], row["machine"]) == (found[-1]["commit"], found[-1]["machine"])]


def costs() -> str:
    """Weights and multiply-accumulates of networks beside what their papers print."""
    newest = {row["network"]: row for row in rows.read("costs")}
    lines = ["| network | `--model` | px | weights (M) | printed | | GMACs | printed | |", "|---" * 9 + "|"]
    for row in newest.values():
        cells = [row["network"], f"`{row['model']}`", row["px"]]
        for name in ("params_m", "gmacs"):
            cells += [row[name], row[f"{name}_published"], f"{row[f'{name}_difference']} %"]
        lines.append(f"| {' | '.join(cells)} |")
    one = next(reversed(newest.values()))
    return "\n".join([*lines, "", f"(with a head of 1000 classes; one image, forward; timm {one['timm']})"])


def recipes() -> str:
    """The fine-tuning recipes by name, and what each costs on ImageNet-1k."""
    gmacs = {row["model"]: float(row["gmacs"]) for row in rows.read("costs")}
    lines = ["| `--recipe` | px | batch | learning rate | epochs | layer decay | drop path | cost |", "|---" * 8 + "|"]
    for name in finetune.names():
        config = finetune.load(name)
        data, method, optim = config.data, config.method, config.optim
        batch, rate = optim.global_batch or "from the images", f"{optim.lr:g}" if optim.lr else "from the batch"
        decay = f"{optim.layer_decay:.2f}" if optim.layer_decay else "0.75"
        cost = ""
        if method.model is not None:
            # Backward costs twice as much as forward.
            total = 3 * gmacs[method.model] * IMAGENET * optim.epochs * 1e9
            cost = f"{total / 1e18:.1f}e18 MACs, {total / H100_HOUR:.0f} h of an H100"
        cells = [f"`{name}`", data.resolution, batch, rate, f"{optim.epochs:g}", decay, method.drop_path, cost]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def compared() -> str:
    """Fine-tuning from every start, against untrained weights, and the control with shuffled labels."""
    found = rows.read("compare")
    newest = [row for row in found if row["commit"] == found[-1]["commit"] and row["set"] == found[-1]["set"]]
    lines = ["| labels | start | accuracy | against scratch | p | verdict |", "|---|---|---|---|---|---|"]
    for row in newest:
        labels = row["labels"].replace("%", " %") + (", shuffled (control)" if row["shuffled"] == "True" else "")
        against = ["", "", ""]
        if row["difference"]:
            difference, low, high = (float(row[name]) for name in ("difference", "low", "high"))
            against = [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", row["p"], row["outcome"]]
        start = "untrained" if row["start"] == "scratch" else "pre-trained"
        accuracy = f"{float(row['mean']):.1f} ± {float(row['spread']):.1f}"
        lines.append(f"| {' | '.join([labels, start, accuracy, *against])} |")
    one = newest[0]
    budget = f"{one['seeds']} seeds; {one['steps']} steps for every start"
    note = f"({one['train']} labelled images, {one['test']} test images, {budget}; {one['machine']})"
    return "\n".join([*lines, "", note])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "methods": lambda: methods(short=True),
        "compare": compared,
        "demo": lambda: gain("demo"),
        "imagenette": lambda: gain("imagenette"),
        "backbones": backbones,
    },
    "docs/methods.md": {"methods": methods, "phases": phases},
    "docs/data.md": {"data": data, "cores": cores},
    "docs/backbones.md": {"costs": costs},
    "docs/finetune.md": {"recipes": recipes},
}


def filled(page: str, text: str) -> str:
    """A page with its tables as the results say."""
    for name, table in PAGES[page].items():
        before, mark, rest = text.partition(f"<!-- table:{name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        before = (HOME / page).read_text(encoding="utf-8")
        after = filled(page, before)
        if "--check" in sys.argv and before != after:
            sys.exit(f"{page} is not what results/ say; run benchmarks/readme_tables.py")
        (HOME / page).write_text(after, encoding="utf-8")
