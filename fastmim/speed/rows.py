# SPDX-License-Identifier: Apache-2.0
"""The numbers of a comparison, from the seconds that steps took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol, runtime_checkable

from fastmim.speed.methods import Method

# What "memory" means, on a GPU and elsewhere.
PEAK, KEPT = "peak of the device", "kept for the backward pass"


@runtime_checkable
class Timed(Protocol):
    """What a `fastmim.speed.trial.Trial` knows after its turns."""

    seconds: list[float]
    peaks: list[float]
    macs: float
    memory: int


@dataclass(frozen=True)
class Row:
    """One method; medians over the rounds.

    Attributes:
        method: the recipe and what was changed of it.
        px: side of its images; first and last of a method whose images grow.
        images_per_s: decoded images per second.
        views_per_s: the same times masks of an image: predictions per second.
        ms_per_image: milliseconds per decoded image.
        ratio: images per second over those of the baseline, in the same round.
        spread: (slowest - fastest) / median of the rounds; what a small difference is worth.
        gmac_per_image: 1e9 multiply-accumulates, forward and backward.
        share: achieved arithmetic over that of a matrix product just before, so that a machine whose speed changes
            slows down both.
        memory_mb: 1e6 bytes of a step.
        feed_images_per_s: what the loader reaches at this size; None without images.
        epochs: the recipe's own.
        run_s: seconds of that many epochs over all images.
        asked_s: seconds of the epochs that were asked for; None without.
    """

    method: str
    px: str
    images_per_s: float
    views_per_s: float
    ms_per_image: float
    ratio: float
    spread: float
    gmac_per_image: float
    share: float
    memory_mb: float
    feed_images_per_s: float | None
    epochs: float
    run_s: float
    asked_s: float | None

    @property
    def label(self) -> str:
        """Name and size."""
        return f"{self.method} {self.px}"

    @property
    def waits(self) -> bool:
        """Whether the network would wait for images."""
        return self.feed_images_per_s is not None and self.feed_images_per_s < self.images_per_s


@dataclass(frozen=True)
class Bench:
    """A whole comparison.

    Attributes:
        rows: fastest first.
        left_out: what could not be measured, and why.
        baseline: label of the row whose ratio is 1.
        facts: of the machine and the settings, as the CSV has them in every row.
        images: in the set that the estimates are for.
        epochs: that were asked for.
        remedy: what would make images come faster; empty where no method waits for them.
        interrupted: whether it was stopped before its last round.
        folder: where bench.csv and bench.png are.
    """

    rows: tuple[Row, ...]
    left_out: dict[str, str]
    baseline: str
    facts: dict[str, str | int]
    images: int
    epochs: float | None
    remedy: str
    interrupted: bool
    folder: Path


def make_rows(
    measured: Mapping[str, Sequence[tuple[Timed, float]]],
    methods: Mapping[str, Method],
    baseline: str,
    *,
    batch: int,
    images: int,
    epochs: float | None,
    feed: Mapping[int, float],
) -> tuple[list[Row], str]:
    """Rows, fastest first, and the label of the baseline: the given one, or the slowest where that is not measured.

    Args:
        measured: the trials of each method, and the share of a run that each stands for; by label.
        methods: by label.
        baseline: label.
        batch: images of a step.
        images: in the set that the estimates are for.
        epochs: to estimate beside the recipes' own.
        feed: images per second that the loader reaches, by size; may be empty.
    """
    rounds = {label: _per_image(parts, batch) for label, parts in measured.items()}
    rounds = {label: seconds for label, seconds in rounds.items() if seconds}
    if rounds and baseline not in rounds:
        baseline = max(rounds, key=lambda label: median(rounds[label]))
    found = []
    for label, seconds in rounds.items():
        config, parts = methods[label].config, measured[label]
        own = median(seconds)
        macs = sum(share * trial.macs for trial, share in parts)
        shares = [(feed[side], share) for side, share in config.data.course if side in feed]
        arriving = 1 / sum(share / speed for speed, share in shares) if len(shares) == len(parts) else None
        slower = max(own, 1 / arriving) if arriving else own
        found.append(
            Row(
                method=methods[label].name,
                px=methods[label].px,
                images_per_s=1 / own,
                views_per_s=config.method.masks / own,
                ms_per_image=1000 * own,
                ratio=median(theirs / ours for theirs, ours in zip(rounds[baseline], seconds, strict=False)),
                spread=(max(seconds) - min(seconds)) / own,
                gmac_per_image=macs / 1e9,
                share=2 * macs / median(_per_image(parts, batch, of_peak=True)),
                memory_mb=max(trial.memory for trial, _ in parts) / 1e6,
                feed_images_per_s=arriving,
                epochs=config.optim.epochs,
                run_s=config.optim.epochs * images * slower,
                asked_s=None if epochs is None else epochs * images * slower,
            )
        )
    return sorted(found, key=lambda row: row.ms_per_image), baseline


def _per_image(parts: Sequence[tuple[Timed, float]], batch: int, of_peak: bool = False) -> list[float]:
    """Seconds per image in each round that all parts have seen; or the operations of a matrix product in that time."""
    costs = (
        [
            share * seconds * (peak if of_peak else 1) / batch
            for seconds, peak in zip(one.seconds, one.peaks, strict=True)
        ]
        for one, share in parts
    )
    return [sum(parts_of_it) for parts_of_it in zip(*costs, strict=False)]
