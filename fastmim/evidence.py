# SPDX-License-Identifier: Apache-2.0
"""What may be called a difference, and what it was measured on in words: for whoever states results."""

import statistics
from collections.abc import Sequence
from typing import Literal

Outcome = Literal["better", "worse", "unclear"]


def clear(after: Sequence[float], before: Sequence[float]) -> Outcome:
    """Whether paired measurements differ clearly: the one rule of the probe's verdict and of the report.

    ``after[i]`` and ``before[i]`` come from the same labels. It is "better" when ``after`` is ahead in every pair, and
    its mean by more than the larger of the two standard deviations (of a sample); "worse" the other way round. A single
    pair shows no spread, and is "unclear".

    Raises:
        ValueError: they are not of one length.
    """
    differences = [one - other for one, other in zip(after, before, strict=True)]
    if len(differences) < 2:
        return "unclear"
    spread = max(statistics.stdev(after), statistics.stdev(before))
    if min(differences) > 0 and statistics.fmean(differences) > spread:
        return "better"
    if max(differences) < 0 and -statistics.fmean(differences) > spread:
        return "worse"
    return "unclear"


def of_labels(setting: str) -> str:
    """A setting of the probe's labels in words: "10%" as "10 % of the labels", "5/class" as "5 labels a class"."""
    number, each, _ = setting.partition("/class")
    if each:
        return f"{number} label{'s' if number != '1' else ''} a class"
    return f"{setting.removesuffix('%')} % of the labels"
