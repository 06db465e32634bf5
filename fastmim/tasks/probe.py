# SPDX-License-Identifier: Apache-2.0
"""Did pre-training help? Frozen features, judged by k nearest neighbours and a linear classifier.

The same label subsets are given to the pre-trained network, to the same network before pre-training and to raw pixels,
so that a difference between the rows is the difference of the features. Nothing is ever chosen on the validation part.
"""

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastmim.data.labelled import Labelled
from fastmim.data.loader import EvalLoader
from fastmim.data.pictures import Pictures
from fastmim.errors import UserError
from fastmim.seeding import derive
from fastmim.tasks.features import Progress, features, pixel_features

# L2 strengths to choose from, strongest first: of equally good ones the strongest is taken.
STRENGTHS = (1.0, 0.1, 0.01, 0.001)
METHODS = ("linear", "knn")


def knn_accuracy(
    train_x: Float[Tensor, "N D"],
    train_y: Int64[Tensor, "N"],
    val_x: Float[Tensor, "M D"],
    val_y: Int64[Tensor, "M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Percent of the validation images that their neighbours name rightly (Wu et al. 2018, section 3.4).

    Each of the ``k`` nearest training images (all of them, if there are fewer) votes with exp(cosine / temperature).
    Both sides are centred on the training mean first: pooled features share a large constant part, beside which the
    cosines of all images are alike.
    """
    centre = train_x.mean(0)
    bank = F.normalize(train_x - centre, dim=1)
    classes = int(train_y.max()) + 1
    right = 0
    for queries, labels in zip((val_x - centre).split(1024), val_y.split(1024), strict=True):
        similarity, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(queries), classes).scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(val_y)


def linear_accuracy(
    train_x: Float[Tensor, "N D"],
    train_y: Int64[Tensor, "N"],
    val_x: Float[Tensor, "M D"],
    val_y: Int64[Tensor, "M"],
    seed: int = 0,
) -> float:
    """Percent of the validation images that a linear classifier on the features names rightly.

    Multinomial logistic regression on features standardised by the training part. The L2 strength is the one of
    ``STRENGTHS`` that does best on a fifth of the training part, drawn from ``seed``; then all of the training part is
    fitted with it. The validation part decides nothing.
    """
    std, mean = torch.std_mean(train_x, 0, correction=0)
    # A feature that never changes says nothing; dividing by its rounding error would make noise of it.
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)
    train_x, val_x = (train_x - mean) * scale, (val_x - mean) * scale
    classes = int(max(train_y.max(), val_y.max())) + 1

    order = torch.randperm(len(train_y), generator=_generator(seed, "probe-strength"))
    held = max(1, len(train_y) // 5)
    out, kept = order[:held], order[held:]

    def held_out(strength: float) -> float:
        weight, bias = fit_linear(train_x[kept], train_y[kept], classes, strength)
        return _accuracy(train_x[out] @ weight + bias, train_y[out])

    weight, bias = fit_linear(train_x, train_y, classes, max(STRENGTHS, key=held_out))
    return _accuracy(val_x @ weight + bias, val_y)


def fit_linear(
    x: Float[Tensor, "N D"], y: Int64[Tensor, "N"], classes: int, strength: float, steps: int = 100
) -> tuple[Float[Tensor, "D K"], Float[Tensor, "K"]]:
    """The weight and bias that minimise ``linear_objective``, by L-BFGS from zero: the same every time.

    With many correlated features ``steps`` end it within 1 or 2 % of the minimum; the accuracy no longer moves there.
    """
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = linear_objective(x, y, weight, bias, strength)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def linear_objective(
    x: Float[Tensor, "N D"],
    y: Int64[Tensor, "N"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, "K"],
    strength: float,
) -> Float[Tensor, ""]:
    """Mean cross-entropy plus half of ``strength`` times the squared norm of the weight; the bias is free."""
    return F.cross_entropy(x @ weight + bias, y) + 0.5 * strength * weight.square().sum()


def _accuracy(logits: Float[Tensor, "N K"], labels: Int64[Tensor, "N"]) -> float:
    return 100 * int((logits.argmax(1) == labels).sum()) / len(labels)


def effective_rank(vectors: Float[Tensor, "N D"]) -> float:
    """How many directions the features use, from 1 (collapsed) to min(N, D): RankMe (Garrido et al. 2023, eq. 1).

    The exponential of the entropy of the singular values, normalised to sum 1; the features are not centred.
    """
    values = torch.linalg.svdvals(vectors.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def nearest_neighbours(
    vectors: Float[Tensor, "N D"], queries: Int64[Tensor, "Q"], k: int
) -> tuple[Int64[Tensor, "Q K"], Float[Tensor, "Q K"]]:
    """The K = min(k, N - 1) nearest images of each query and their cosine after centring, nearest first.

    ``queries`` are places in ``vectors``; no query is its own neighbour.
    """
    unit = F.normalize(vectors - vectors.mean(0), dim=1)
    similarity = unit[queries] @ unit.T
    similarity.scatter_(1, queries[:, None], -torch.inf)
    found, indices = similarity.topk(min(k, len(vectors) - 1))
    return indices, found


def label_subsets(labels: Int64[Tensor, "N"], fraction: float, subsets: int, seed: int) -> list[Int64[Tensor, "n"]]:
    """Random parts of the training set, each with ``fraction`` of every class and at least one image of it.

    A pure function of its arguments; the indices are ascending.
    """
    chosen = []
    for subset in range(subsets):
        parts = []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=_generator(seed, "probe-subset", subset, label))
            parts.append(members[order[: max(1, round(fraction * len(members)))]])
        chosen.append(torch.cat(parts).sort().values)
    return chosen


def compare(
    entries: Mapping[str, tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]]],
    train_y: Int64[Tensor, "N"],
    val_y: Int64[Tensor, "M"],
    *,
    fraction: float,
    subsets: int,
    seed: int,
) -> dict[str, Any]:
    """The ``rows`` and the ``summary`` of probe.json: every entry on the same ``subsets`` label subsets.

    ``entries`` are the features of the training and of the validation images by name ("trained", "untrained",
    "pixels"); each subset has ``fraction`` of the training labels. The summary is in percent: the mean over the subsets
    and the standard deviation (of a sample).

    Raises:
        UserError: fewer than two subsets, or subsets that hold every label: they could show no spread.
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction is {fraction}, but must lie between 0 and 1: only different subsets show a spread")
    if subsets < 2:
        raise UserError(f"subsets is {subsets}, but at least 2 are needed to show a spread")
    rows: list[dict[str, Any]] = []
    for number, subset in enumerate(label_subsets(train_y, fraction, subsets, seed)):
        labels = train_y[subset]
        for name, (train_x, val_x) in entries.items():
            linear = linear_accuracy(train_x[subset], labels, val_x, val_y, derive(seed, "probe", number))
            knn = knn_accuracy(train_x[subset], labels, val_x, val_y)
            for method, accuracy in (("linear", linear), ("knn", knn)):
                row = {"weights": name, "method": method, "subset": number, "labels": len(subset)}
                rows.append(row | {"accuracy": accuracy})
    summary = {method: {name: _mean_std(_scores(rows, name, method)) for name in entries} for method in METHODS}
    return {"rows": rows, "summary": summary}


def _scores(rows: list[dict[str, Any]], weights: str, method: str) -> list[float]:
    return [row["accuracy"] for row in rows if row["weights"] == weights and row["method"] == method]


def _mean_std(scores: list[float]) -> list[float]:
    return [statistics.fmean(scores), statistics.stdev(scores)]


def verdict(comparison: Mapping[str, Any]) -> str:
    """One plain sentence from the rows and the summary of ``compare``.

    A method speaks for pre-training when its mean difference exceeds the larger of the two standard deviations and
    the pre-trained network is ahead on every subset; it speaks against when both hold the other way round.
    """
    summary = comparison["summary"]
    if "trained" not in summary["linear"]:
        return "No pre-trained network was given, so there is nothing to say about pre-training."
    groups: dict[str, list[str]] = {"better": [], "unclear": [], "worse": []}
    for method in METHODS:
        trained, untrained = (_scores(comparison["rows"], name, method) for name in ("trained", "untrained"))
        groups[_outcome(trained, untrained)].append(method)
    better, unclear, worse = groups["better"], groups["unclear"], groups["worse"]

    def figures(methods: list[str]) -> str:
        return " and ".join(_figures(method, summary[method]) for method in methods)

    def short(method: str, what: str) -> str:
        (trained, _), (untrained, _) = summary[method]["trained"], summary[method]["untrained"]
        return f"; {_NAMES[method]} {what} ({trained:.1f} % against {untrained:.1f} %)"

    if better and worse:
        sentence = f"Pre-training helped and hurt: better {figures(better)}, but worse {figures(worse)}"
    elif better:
        sentence = f"Pre-training helped: {figures(better)}" + "".join(short(m, "did not improve") for m in unclear)
    elif worse:
        sentence = f"Pre-training hurt: {figures(worse)}" + "".join(
            short(m, "made no clear difference") for m in unclear
        )
    else:
        sentence = f"Pre-training made no clear difference: {figures(unclear)}"
    best = max(summary[method]["trained"][0] for method in METHODS)
    pixels = max((summary[method]["pixels"][0] for method in METHODS if "pixels" in summary[method]), default=0.0)
    return sentence + (f"; raw pixels do better still ({pixels:.1f} %)." if pixels > best else ".")


_NAMES = {"linear": "linear accuracy", "knn": "kNN"}


def _outcome(trained: list[float], untrained: list[float]) -> str:
    differences = [after - before for after, before in zip(trained, untrained, strict=True)]
    spread = max(statistics.stdev(trained), statistics.stdev(untrained))
    if min(differences) > 0 and statistics.fmean(differences) > spread:
        return "better"
    if max(differences) < 0 and -statistics.fmean(differences) > spread:
        return "worse"
    return "unclear"


def _figures(method: str, summary: Mapping[str, list[float]]) -> str:
    (trained, spread), (untrained, other_spread) = summary["trained"], summary["untrained"]
    return (
        f"{_NAMES[method]} {trained:.1f} % against {untrained:.1f} % untrained "
        f"({trained - untrained:+.1f} points, spread {max(spread, other_spread):.1f})"
    )


def run_probe(
    trained: nn.Module | None,
    untrained: nn.Module,
    data: Labelled,
    *,
    resolution: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    fraction: float = 0.5,
    subsets: int = 3,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    raw: bool = False,
    model: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that probe.json holds, but where the images lie.

    Args:
        trained: the Backbone after pre-training; None: only what is there is measured.
        untrained: the same Backbone before pre-training.
        data: labelled images, already split into a training and a validation part.
        resolution: side in pixels at which the images are seen.
        mean: of each channel, as in pre-training.
        std: likewise.
        device: where to compute features; both networks are moved there.
        fraction: share of the training labels in each subset.
        subsets: how many subsets, at least 2.
        seed: of the subsets.
        batch_size: images per forward pass.
        workers: loader processes.
        raw: images are stored values, not 0 to 255.
        model: the name that the report shows.
        progress: called after each batch.
    """
    sizes = {"resolution": resolution, "batch_size": batch_size, "workers": workers}
    parts = [
        EvalLoader(Pictures(table, len(mean), raw), labels=labels, **sizes)
        for table, labels in ((data.train, data.train_labels), (data.val, data.val_labels))
    ]
    entries = {}
    for name, network in {"trained": trained, "untrained": untrained}.items():
        if network is not None:
            of = partial(features, network.to(device), device=device, mean=mean, std=std, progress=progress)
            entries[name] = (of(parts[0])[0], of(parts[1])[0])
    (train_x, train_y), (val_x, val_y) = (pixel_features(part, progress=progress) for part in parts)
    entries["pixels"] = (train_x, val_x)
    assert train_y is not None and val_y is not None
    comparison = compare(entries, train_y, val_y, fraction=fraction, subsets=subsets, seed=seed)
    return {
        "model": model,
        "classes": len(data.classes),
        "train": len(train_y),
        "val": len(val_y),
        "resolution": resolution,
        **comparison,
        "verdict": verdict(comparison),
    }


def _generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, *position))
