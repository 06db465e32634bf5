# SPDX-License-Identifier: Apache-2.0
"""Is one way of training better than another? From which test images each got right, under each of several seeds.

Two things are chance in such an experiment: the seeds (initial weights, order, which images have labels) and the test
images. A test over images alone takes three lucky runs for a method, and one over three means alone has hardly any
power. Here seeds and images are crossed random effects, as readers and cases are in studies of diagnosis: the analysis
is the one of Dorfman, Berbaum and Metz (1992) with the degrees of freedom of Hillis (2007, eq. 12), on the paired
differences of two starts. Beside it stands the exact sign-flip test over images; of the two p-values the larger counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64

ALPHA = 0.05
POWER = 0.8
"""How often a difference of the size that ``detectable`` names would have been shown."""
Outcome = Literal["helped", "hurt", "unclear"]
Correct = Bool[np.ndarray, "seeds images"]


@dataclass(frozen=True)
class Pair:
    """Start a against start b on the same seeds and test images; differences are a - b, as shares (0.01 is a point).

    Attributes:
        difference: of the mean accuracies.
        per_seed: difference under each seed.
        spread: the larger standard deviation of both starts' accuracies over seeds; NaN with one seed.
        error: standard error of the difference, over seeds and images; over images alone with one seed.
        freedom: degrees of freedom of that error.
        p: the larger of ``p_both`` and ``p_images``; two-sided.
        p_both: for other seeds and other images; NaN with one seed.
        p_images: for other images, with these very networks (exact).
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
    """

    difference: float
    per_seed: tuple[float, ...]
    spread: float
    error: float
    freedom: float
    p: float
    p_both: float
    p_images: float
    low: float
    high: float


def compare_pair(a: Correct, b: Correct) -> Pair:
    """What the two matrices say about the difference of two starts; row s of both has seed s, column i test image i.

    Raises:
        ValueError: the matrices have different shapes, or no images.
    """
    if a.shape != b.shape or not a.size:
        raise ValueError(f"needs two matrices of one shape with images, but got {a.shape} and {b.shape}")
    apart = a.astype(np.int64) - b.astype(np.int64)
    seeds = len(apart)
    difference = float(apart.mean())
    error, freedom = standard_error(apart)
    p_images = sign_flip(apart.sum(0))
    several = seeds > 1
    p_both = _two_sided(difference, error, freedom) if several else math.nan
    reach = student_quantile(1 - ALPHA / 2, freedom) * error
    spread = max(float(one.mean(1).std(ddof=1)) for one in (a, b)) if several else math.nan
    return Pair(
        difference=difference,
        per_seed=tuple(apart.mean(1).tolist()),
        spread=spread,
        error=error,
        freedom=freedom,
        p=max(p_both, p_images) if several else p_images,
        p_both=p_both,
        p_images=p_images,
        low=max(difference - reach, -1.0),
        high=min(difference + reach, 1.0),
    )


def standard_error(apart: Int64[np.ndarray, "seeds images"]) -> tuple[float, float]:
    """Of the mean of ``apart``, for new seeds and new images, and its degrees of freedom.

    With mean squares of seeds (MSS), images (MSI) and their interaction (MSE), the variance of the mean is
    (MSS + max(MSI - MSE, 0)) / (S N), with (S - 1) (sum / MSS)^2 degrees of freedom. It is never taken to be less than
    MSI / (S N), that of images alone, as it may seem where two or three seeds happen to agree: without that floor, an
    interval of 95 % from two seeds holds the truth in 91 % of cases. With one seed it is the variance over images.
    """
    seeds, images = apart.shape
    rows, columns, mean = apart.mean(1), apart.mean(0), apart.mean()
    if seeds == 1 or images == 1:
        values = apart.reshape(-1)
        if len(values) == 1:
            return math.inf, 1.0
        return float(values.std(ddof=1)) / math.sqrt(len(values)), float(len(values) - 1)
    of_seeds = images * float(rows.var(ddof=1))
    of_images = seeds * float(columns.var(ddof=1))
    rest = apart - rows[:, None] - columns[None, :] + mean
    of_both = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
    total = of_seeds + max(of_images - of_both, 0.0)
    freedom = (seeds - 1) * (total / of_seeds) ** 2 if of_seeds > 1e-9 * total else math.inf
    return math.sqrt(max(total, of_images) / (seeds * images)), freedom


def sign_flip(sums: Int64[np.ndarray, " n"]) -> float:
    """Exact two-sided p-value of the sign-flip test on the sum of integers; with one seed it is McNemar's exact test.

    Had both starts the same chance on every image, each image's difference could as well have the other sign. All 2^n
    choices of signs are counted at once: those of the same size are binomial, and the sums of sizes convolve.
    """
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    whole = int((sizes * counts).sum())
    if not whole:
        return 1.0
    # Y = sum over sizes of size * Binomial(count, 1/2); the flipped sum is 2 Y - whole.
    parts = []
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spaced = np.zeros(size * count + 1)
        spaced[::size] = _fair_binomial(count)
        parts.append(spaced)
    chance = _convolved(parts)
    seen = abs(int(sums.sum()))
    return float(min(1.0, chance[np.abs(2 * np.arange(whole + 1) - whole) >= seen].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values (1979), in the given order: at 0.05, one wrong claim or more in 5 % of cases."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def outcome(pair: Pair, corrected: float) -> Outcome:
    """Whether a "helped": ahead on every seed, by more than the spread over seeds, and a corrected p below 0.05.

    "hurt" is its mirror.

    One seed shows nothing: it is "unclear", as is everything else.
    """
    if len(pair.per_seed) < 2 or not corrected < ALPHA or not abs(pair.difference) > pair.spread:
        return "unclear"
    if all(one > 0 for one in pair.per_seed):
        return "helped"
    return "hurt" if all(one < 0 for one in pair.per_seed) else "unclear"


def detectable(pair: Pair, comparisons: int) -> float:
    """The true difference (a share) that this experiment would have shown four times out of five.

    Its standard error times the quantiles of the level, divided among the ``comparisons``, and of the power; at least
    the spread over seeds, as the rule asks for more than that.
    """
    level = student_quantile(1 - ALPHA / 2 / max(comparisons, 1), pair.freedom)
    found = (level + student_quantile(POWER, pair.freedom)) * pair.error
    return found if math.isnan(pair.spread) else max(found, pair.spread)


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share from ``right`` of ``total`` (Wilson 1927): good for few images and shares near 0 and 1.

    Raises:
        ValueError: ``total`` is not positive.
    """
    if total < 1:
        raise ValueError(f"total is {total}, but must be positive")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


# ---- Distributions


def student_tail(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's t with ``freedom`` degrees of freedom (any positive number; infinite: normal)."""
    if freedom > 1e7:
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def student_quantile(share: float, freedom: float) -> float:
    """The t below which ``share`` (from a half up) of Student's distribution lies."""
    high = 1.0
    while student_tail(high, freedom) > 2 * (1 - share):
        high *= 2
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 2 * (1 - share) else (low, middle)
    return high


def _two_sided(difference: float, error: float, freedom: float) -> float:
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return student_tail(difference / error, freedom)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def _fair_binomial(count: int) -> Float[np.ndarray, " k"]:
    """Chances of 0 to ``count`` heads; logarithms, because 2^-count is too small a number from 1,075 on."""
    k = np.arange(count)
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - k) / (k + 1)))]) - count * math.log(2)
    return np.exp(logs)


def _convolved(parts: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " n"]:
    chance = np.ones(1)
    for part in parts:
        if len(chance) * len(part) <= 10_000_000:
            chance = np.convolve(chance, part)
            continue
        # By Fourier, which is exact to 1e-16 of the largest chance: no p-value below that is of interest.
        size = len(chance) + len(part) - 1
        chance = np.fft.irfft(np.fft.rfft(chance, size) * np.fft.rfft(part, size), size).clip(0)
    return chance
