# SPDX-License-Identifier: Apache-2.0
"""The comparison in one plain sentence, which can be no."""

from collections.abc import Sequence

from fastmim.comparing.measure import Difference, Judged
from fastmim.comparing.plan import Plan, said
from fastmim.starts import SCRATCH

MOST_POINTS = 50
"""An experiment that shows only larger differences shows none."""
WORDS = {"helped": "helped", "hurt": "hurt"}


def sentence(judged: Judged, plan: Plan, shuffled: bool = False, left_out: int = 0) -> str:
    """What the comparison shows of every start against untrained weights, and of runs against other weights.

    Args:
        judged: on the test images that count.
        plan: the grid.
        shuffled: whether the training labels were permuted, so that nothing may help.
        left_out: test images that did not count, because they were seen before.
    """
    names = [start.name for start in plan.starts if start.name != SCRATCH]
    against = {name: [judged.difference(labels, name, SCRATCH) for labels in plan.labels] for name in names}
    rest = f" (without {left_out:,} leaked test image{'s' if left_out > 1 else ''})" if left_out else ""
    if judged.seeds < 2:
        return _one_seed(judged, against) + rest + "."
    above = any(score.beats_chance for score in judged.scores)
    if shuffled:
        return _shuffled(judged, against, above) + rest + "."
    parts = [part for name in names for part in _of_start(judged, name, against[name], len(names) == 1)]
    if not parts:
        text = _nothing(judged, [one for group in against.values() for one in group], above)
    else:
        quiet = [one for group in against.values() for one in group if one.outcome == "unclear"]
        text = "; ".join(parts) + _unclear(quiet)
    return text + "".join(_against_others(judged, plan)) + rest + "."


def decide(differences: Sequence[Difference]) -> str:
    """One word for several label settings: helped, hurt, mixed or nothing."""
    found = {one.outcome for one in differences} - {"unclear"}
    if not found:
        return "nothing"
    return "mixed" if len(found) > 1 else next(iter(found))


def chance_of(p: float) -> str:
    """A p-value in words."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _of_start(judged: Judged, name: str, differences: Sequence[Difference], alone: bool) -> list[str]:
    """'Pre-training helped: with ... and with ...', and the same for hurt; none where nothing is shown."""
    parts = []
    for kind, verb in WORDS.items():
        shown = [one for one in differences if one.outcome == kind]
        if shown:
            who = "Pre-training" if alone else name
            figures = ", and ".join(_figures(judged, one) for one in shown)
            parts.append(f"{who} {verb}: {figures}")
    return parts


def _figures(judged: Judged, one: Difference) -> str:
    mine, base = judged.score(one.labels, one.a).mean, judged.score(one.labels, one.b).mean
    return (
        f"with {said(one.labels)} {mine:.1f} % against {base:.1f} % from scratch ({one.points:+.1f} points, "
        f"spread {one.spread or 0:.1f}, {chance_of(one.corrected)}, {judged.seeds} seeds)"
    )


def _unclear(quiet: Sequence[Difference]) -> str:
    """What else was compared with untrained weights, without a result."""
    if not quiet:
        return ""
    parts = [f"{one.a} with {said(one.labels)} ({one.points:+.1f} points)" for one in quiet[:3]]
    more = f" and {len(quiet) - 3} more" if len(quiet) > 3 else ""
    return f"; no difference shown for {', '.join(parts)}{more}"


def _nothing(judged: Judged, differences: Sequence[Difference], above: bool) -> str:
    best = max(differences, key=lambda one: one.points)
    mine, base = judged.score(best.labels, best.a).mean, judged.score(best.labels, best.b).mean
    figures = (
        f"the best, {best.a} with {said(best.labels)}, has {mine:.1f} % against {base:.1f} % from scratch "
        f"({best.points:+.1f} points, spread {best.spread or 0:.1f}, {chance_of(best.corrected)}, {judged.seeds} seeds)"
    )
    if not above:
        return f"Nothing helped, and nothing beats chance ({judged.chance:.1f} %): {figures}"
    hints = [one for one in differences if _hint(one)]
    if hints:
        return f"Nothing is shown, for too few seeds: {figures}; more seeds may show it"
    if not best.detectable < MOST_POINTS:
        return f"Nothing is shown: {figures}, and no difference could have been: more seeds are needed"
    return f"Nothing helped: {figures}; a difference of {best.detectable:.1f} points would have been shown"


def _hint(one: Difference) -> bool:
    """Whether all seeds agree, by more than their spread, and only the p-value is too large."""
    agree = all(value > 0 for value in one.per_seed) or all(value < 0 for value in one.per_seed)
    return one.outcome == "unclear" and agree and abs(one.points) > (one.spread or 0)


def _one_seed(judged: Judged, against: dict[str, list[Difference]]) -> str:
    best = max((one for group in against.values() for one in group), key=lambda one: one.points)
    mine, base = judged.score(best.labels, best.a).mean, judged.score(best.labels, best.b).mean
    return (
        f"One seed shows nothing: {best.a} with {said(best.labels)} has {mine:.1f} % against {base:.1f} % from scratch "
        f"({best.points:+.1f} points), which may be luck; three seeds or more would tell"
    )


def _shuffled(judged: Judged, against: dict[str, list[Difference]], above: bool) -> str:
    def claimed_to_be(word: str) -> str:
        return ", ".join(sorted(name for name, group in against.items() if any(one.outcome == word for one in group)))

    claimed, behind = claimed_to_be("helped"), claimed_to_be("hurt")
    best = max(judged.scores, key=lambda score: score.mean)
    figures = f"the best, {best.start} with {said(best.labels)}, has {best.mean:.1f} %, chance {judged.chance:.1f} %"
    if claimed:
        return (
            f"With shuffled labels {claimed} is shown to help, which must not be: {figures}; look for a leak, or take"
            " more seeds"
        )
    # No leak makes a start worse than chance; the luck of the labels does, in some of a hundred controls.
    luck = f"; {behind} is behind scratch, by the luck of the labels: more seeds would tell" if behind else ""
    if above:
        return f"With shuffled labels nothing helped, as it must be, but something beats chance: {figures}{luck}"
    return f"With shuffled labels nothing helped and nothing beats chance, as it must be: {figures}{luck}"


def _against_others(judged: Judged, plan: Plan) -> list[str]:
    """Each run against released weights and files: who pre-trains wants to know that first."""
    found = []
    order = [start.name for start in plan.starts]
    for run in (start for start in plan.starts if start.kind == "run"):
        for other in (start for start in plan.starts if start.kind in ("released", "file")):
            turned = order.index(run.name) < order.index(other.name)
            a, b = (other.name, run.name) if turned else (run.name, other.name)
            differences = [judged.difference(labels, a, b) for labels in plan.labels]
            largest = max(differences, key=lambda one: (one.outcome != "unclear", abs(one.points)))
            points = -largest.points if turned else largest.points
            decided = decide(differences)
            if decided == "nothing":
                word = "not shown to differ from"
            elif decided == "mixed":
                word = "sometimes better and sometimes worse than"
            else:
                word = "better than" if points > 0 else "worse than"
            where = f" with {said(largest.labels)}" if len(plan.labels) > 1 else ""
            found.append(f"; {run.name} is {word} {other.name} ({points:+.1f} points{where})")
    return found
