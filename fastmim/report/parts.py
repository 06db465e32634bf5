# SPDX-License-Identifier: Apache-2.0
"""What the page of every kind of run shows, for the macros of parts.html.j2."""

from typing import Any

from fastmim.report import facts
from fastmim.report.curves import Chart, draw_chart, read_series
from fastmim.report.folder import Folder

SHOWN_BAD = 10


def common_parts(run: Folder) -> dict[str, Any]:
    """How the run ended, how fast it was, what could not be read, where it ran, and what its folder lacks."""
    speed = facts.speed(run)
    resume = run.config is not None and not facts.finished(run)
    return {
        "unfinished": facts.unfinished(run),
        "not_finite": facts.not_finite(run),
        "readings": len(run.train),
        "speed_text": _speed_text(speed) if speed else "",
        "waiting": facts.waiting_hint(speed[1]) if speed else "",
        "speed_charts": _speed_charts(run),
        "bad": run.bad,
        "shown_bad": SHOWN_BAD,
        "resume": f"fastmim resume {facts.shell_word(str(run.path.resolve()))}" if resume else "",
        "environment": list(facts.flat(run.environment)),
        "missing": list(run.missing.items()),
    }


def _speed_charts(run: Folder) -> list[Chart]:
    rate = read_series(run.train, "images_per_s", "images a second", 4, smooth=True)
    wait = read_series(run.train, "data_wait", "waiting", 1, smooth=True, scale=100)
    charts = [
        draw_chart("Images a second", "", [rate], from_zero=True),
        draw_chart("Time waiting for images, %", "", [wait], from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _speed_text(speed: tuple[float, float]) -> str:
    return (
        f"{speed[0]:,.0f} images a second (median), with {100 * speed[1]:.1f} % of the time spent waiting for images."
    )
