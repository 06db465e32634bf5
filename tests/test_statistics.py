# SPDX-License-Identifier: Apache-2.0
"""Mean, deviation and percentiles equal those of the pixels that were written."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data.inspection import statistics
from fastmim.data.table import ImageTable, from_names
from fastmim.errors import UserError


def table_of(folder: Path) -> ImageTable:
    names = sorted(path.name for path in folder.iterdir())
    return from_names(str(folder), names, [(folder / name).stat().st_size for name in names])


def write(folder: Path, pictures: list[np.ndarray], suffix: str = "png") -> ImageTable:
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03d}.{suffix}")
    return table_of(folder)


def noise(count: int, side: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scale = np.array([20.0, 40.0, 10.0])
    return [
        (rng.normal(size=(side, side, 3)) * scale + [60, 120, 200] + rng.normal(0, 15)).clip(0, 255).astype(np.uint8)
        for _ in range(count)
    ]


def test_eight_bit_colour(tmp_path: Path) -> None:
    pictures = noise(30)
    found = statistics.measure(write(tmp_path, pictures), channels=3, raw=False)
    pixels = np.stack(pictures).reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(0), atol=1e-9)
    wanted = np.percentile(pixels, statistics.PERCENTILES, axis=0).T
    np.testing.assert_allclose(found.percentiles, wanted, atol=0.01)
    assert (found.constant, found.images) == ((), 30)
    assert found == statistics.measure(table_of(tmp_path), channels=3, raw=False)


def test_large_pictures_are_averaged_whole(tmp_path: Path) -> None:
    picture = np.zeros((300, 200, 3), np.uint8)
    picture[150:] = 200
    picture[:, 100:, 1] = 100
    found = statistics.measure(write(tmp_path, [picture]), channels=3, raw=False)
    np.testing.assert_allclose(found.mean, picture.reshape(-1, 3).mean(0) / 255, atol=0.004)
    np.testing.assert_allclose(found.std, picture.reshape(-1, 3).std(0) / 255, rtol=0.03)


def test_stored_values_keep_their_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pictures = [rng.integers(900, 1500, (32, 32)).astype(np.uint16) for _ in range(5)]
    found = statistics.measure(write(tmp_path, pictures), channels=1, raw=True)
    np.testing.assert_allclose(found.mean, [np.mean(pictures)], rtol=1e-6)
    np.testing.assert_allclose(found.std, [np.std(pictures)], rtol=1e-6)
    assert 900 <= found.percentiles[0][0] < found.percentiles[0][-1] < 1500


def test_bands_of_which_one_is_constant_and_one_has_holes(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = np.random.default_rng(0).normal(5, 2, (6, 4, 24, 24)).astype(np.float32)
    values[:, 2] = 7
    values[:, 3, :12] = np.nan
    for number, picture in enumerate(values):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
            place = tmp_path / f"{number}.tif"
            with rasterio.open(place, "w", driver="GTiff", width=24, height=24, count=4, dtype="float32") as file:
                file.write(picture)
    found = statistics.measure(table_of(tmp_path), channels=4, raw=True)
    assert found.std[2] == 1 and found.mean[2] == 7 and 2 in found.constant
    np.testing.assert_allclose(found.mean[:2], values[:, :2].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.std[:2], values[:, :2].std((0, 2, 3)), rtol=1e-5)
    assert np.isfinite([*found.mean, *found.std, *np.ravel(found.percentiles)]).all()
    assert min(found.std) > 0


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20, 20))
    values[1, :10] = np.inf
    values[2] = np.nan
    found = statistics.pool(statistics.summary(values)[None])
    np.testing.assert_allclose(found.mean, [values[0].mean(), values[1, 10:].mean(), 0])
    np.testing.assert_allclose(found.std, [values[0].std(), values[1, 10:].std(), 1])
    assert found.constant == (2,)


def test_unreadable_images_are_skipped_until_none_is_left(tmp_path: Path) -> None:
    table = write(tmp_path, noise(4))
    (tmp_path / "001.png").write_bytes(b"broken")
    (tmp_path / "002.png").unlink()
    assert statistics.measure(table, channels=3, raw=False).images == 2
    for name in ("000.png", "003.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 4 images .* can be read; first '.*000.png': empty") as caught:
        statistics.measure(table, channels=3, raw=False)
    assert "\n" not in str(caught.value)


def test_the_sample_is_evenly_spread() -> None:
    assert statistics.spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert statistics.spread(3, 5).tolist() == [0, 1, 2]
    assert statistics.spread(0, 5).tolist() == []
    assert statistics.spread(10**12, 3).tolist() == [0, 333333333333, 666666666666]


def test_percentiles_of_many_pictures_and_of_one_kind() -> None:
    """Pooled from 17 values a picture, they are near those of all pixels, whether pictures differ or are alike."""
    rng = np.random.default_rng(2)
    for spread in (0, 1, 10):
        values = rng.normal(size=(50, 1, 32, 32)) + spread * rng.normal(size=(50, 1, 1, 1))
        found = statistics.pool(np.stack([statistics.summary(one) for one in values]))
        wanted = np.percentile(values, statistics.PERCENTILES)
        np.testing.assert_allclose(found.percentiles[0], wanted, atol=0.06 * values.std())
