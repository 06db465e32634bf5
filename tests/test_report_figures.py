# SPDX-License-Identifier: Apache-2.0
"""The report's drawings: strokes lie along edges, pixels lie where they were, curves lie where the numbers are."""

from pathlib import Path

import numpy as np
import pytest
from fake_run import cells_of, hog

from fastmim.report.curves import Series, draw_chart, nice_ticks, smoothed, tick_label
from fastmim.report.facts import duration, file_size
from fastmim.report.figures import cells_to_picture, glyphs

GOLDENS = Path(__file__).parent / "goldens"


def test_the_loop_of_these_tests_is_the_hog_of_the_goldens() -> None:
    with np.load(GOLDENS / "hog.npz") as golden:
        np.testing.assert_allclose(hog(golden["u8_64"][0]), golden["hog_u8_64"][0], atol=1e-5)


@pytest.mark.parametrize("degrees", [0, 10, 30, 45, 70, 90, 110, 135, 150, 170])
def test_strokes_lie_along_the_stripes(degrees: int) -> None:
    """Stripes at an angle (counter-clockwise from the horizontal, as on a screen) give strokes at that angle."""
    angle = np.deg2rad(degrees)
    y, x = np.mgrid[:64, :64].astype(float)
    # Constant along (cos, -sin), as y points down.
    stripes = 127 + 120 * np.sin(0.9 * (x * np.sin(angle) + y * np.cos(angle)))
    picture = glyphs(hog(np.stack([stripes.round().astype(np.uint8)] * 3)), full=1.0).mean(axis=2)
    side = len(picture) // 8
    ink = (picture - picture.min()).reshape(8, side, 8, side)[1:-1, :, 1:-1].sum(axis=(0, 2))
    place = np.arange(side) + 0.5 - side / 2
    xx, yy, xy = (
        (ink * moment).sum() for moment in np.broadcast_arrays(place**2, place[:, None] ** 2, place * place[:, None])
    )
    found = np.rad2deg(0.5 * np.arctan2(-2 * xy, xx - yy)) % 180
    # A stroke stands at the middle of a bin of 20 degrees.
    assert abs((found - degrees + 90) % 180 - 90) <= 12


@pytest.mark.parametrize("k", range(9))
def test_a_full_stroke_crosses_its_cell_at_every_angle(k: int) -> None:
    bins = np.zeros((27, 1, 1), np.float32)
    bins[[k, 9 + k, 18 + k]] = 1.0
    picture = glyphs(bins, full=1.0).mean(axis=2)
    place = np.arange(len(picture)) + 0.5 - len(picture) / 2
    reach = np.hypot(place, place[:, None])[picture > 100].max() / len(picture)
    assert 0.45 < reach < 0.55


def test_a_larger_histogram_gives_a_longer_and_brighter_stroke() -> None:
    bins = np.zeros((27, 1, 2), np.float32)
    bins[[4, 13, 22]] = [[1.0, 0.25]]
    strong, weak = np.split(glyphs(bins, full=1.0).mean(axis=2), 2, axis=1)
    long, short = ((half.max(axis=1) > half.min() + 10).sum() for half in (strong, weak))
    assert long > 3 * short > 0
    assert strong.max() > weak.max() + 40


def test_pixel_cells_come_back_as_the_picture() -> None:
    image = np.random.default_rng(0).integers(0, 255, (3, 32, 32), dtype=np.uint8)
    values = cells_of(image / 255, 16).astype(np.float32)
    np.testing.assert_allclose(cells_to_picture(values), image.transpose(1, 2, 0) / 255, atol=1e-6)


def test_curves_lie_where_the_numbers_are() -> None:
    samples = np.array([0.0, 50.0, 100.0])
    chart = draw_chart("t", "", [Series("a", samples, np.array([0.0, 5.0, 10.0]))], from_zero=True)
    assert chart is not None
    points = [tuple(map(float, point.split())) for point in chart.lines[0].path[1:].split("L")]
    where = {label: 10 * place for place, label in chart.y_ticks}
    assert [point[1] for point in points] == pytest.approx([where["0"], where["5"], where["10"]], abs=0.1)
    across = {label: 10 * place for place, label in chart.x_ticks}
    assert [points[0][0], points[2][0]] == pytest.approx([across["0"], across["100"]], abs=0.1)
    assert draw_chart("t", "", [Series("a", np.array([]), np.array([]))]) is None


def test_smoothing_neither_lags_nor_bends_a_line() -> None:
    line = np.linspace(3, -2, 500)
    np.testing.assert_allclose(smoothed(line), line, atol=1e-9)
    noise = np.random.default_rng(0).normal(0, 1, 5000)
    assert smoothed(noise)[200:-200].std() < 0.15


def test_short_numbers() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 860, 7260, 97200)] == [
        "0 s",
        "1 min",
        "14 min 20 s",
        "2 h 1 min",
        "1 d 3 h",
    ]
    assert [file_size(count) for count in (999, 4_120_000, 2e13)] == ["999 bytes", "4.12 MB", "20 TB"]
    assert [tick_label(value) for value in (0, 2e-5, 0.05, 250_000, 1.5e6)] == ["0", "2e-5", "0.05", "250 k", "1.5 M"]
    assert nice_ticks(0.041, 0.119, 4) == pytest.approx([0.06, 0.08, 0.1])
