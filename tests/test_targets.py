# SPDX-License-Identifier: Apache-2.0
"""Targets against the numbers of the released FastMIM code, and against plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.mim.targets import HOG, TARGETS, HOGColour, Pixels

GOLDENS = np.load(Path(__file__).parent / "goldens" / "hog.npz")


def golden_images(count: int, side: int) -> Tensor:
    """The formula that the goldens were computed from."""
    b = np.arange(count)[:, None, None, None]
    c = np.arange(3)[None, :, None, None]
    y, x = np.arange(side)[:, None], np.arange(side)[None, :]
    waves = np.sin(0.7 + 0.11 * x * (1 + c) + 0.07 * y * (1 + b)) + 0.5 * np.cos(0.013 * x * y / (1 + c) + b)
    return torch.from_numpy(waves.astype(np.float32))


@pytest.mark.parametrize("side", [96, 128, 192])
def test_hog_equals_the_released_code(side: int) -> None:
    images = golden_images(2, side)
    torch.testing.assert_close(HOG()(images), torch.from_numpy(GOLDENS[f"hog{side}_l2"]), rtol=0, atol=1e-5)
    # Sums of magnitudes reach 300, so the same precision is a relative one.
    raw = torch.from_numpy(GOLDENS[f"hog{side}_raw"])
    torch.testing.assert_close(HOG(normalise=False)(images), raw, rtol=1e-5, atol=1e-5 * raw.max().item())


def test_hog_of_bytes_equals_the_released_code() -> None:
    images = torch.from_numpy(GOLDENS["u8_64"]).float()
    torch.testing.assert_close(HOG()(images), torch.from_numpy(GOLDENS["hog_u8_64"]), rtol=0, atol=1e-5)


def slow_hog(images: Tensor, cell: int, bins: int) -> Tensor:
    """The definition, pixel by pixel, with atan2."""
    count, colours, height, width = images.shape
    out = torch.zeros(count, colours, bins, height // cell, width // cell, dtype=torch.float64)
    padded = F.pad(images.double(), (1, 1, 1, 1), mode="reflect").numpy()
    smooth = (1, 2, 1)
    for b, c, y, x in np.ndindex(count, colours, height, width):
        window = padded[b, c, y : y + 3, x : x + 3]
        gx = sum(smooth[i] * (window[i, 0] - window[i, 2]) for i in range(3))
        gy = sum(smooth[i] * (window[0, i] - window[2, i]) for i in range(3))
        k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
        out[b, c, k, y // cell, x // cell] += math.hypot(gx, gy)
    return F.normalize(out, dim=2).flatten(1, 2)


@pytest.mark.parametrize(("cell", "bins"), [(8, 9), (4, 6), (7, 9)])
def test_hog_equals_the_plain_loop(cell: int, bins: int) -> None:
    # Random floats: whole numbers would put directions exactly on a border between two bins.
    images = torch.rand(1, 2, 2 * cell, 2 * cell, generator=torch.Generator().manual_seed(0))
    fast = HOG(colours=2, cell=cell, bins=bins)(images)
    torch.testing.assert_close(fast.double(), slow_hog(images, cell, bins), rtol=0, atol=1e-5)


def test_hog_does_not_change_with_the_normalisation_of_the_images() -> None:
    images = golden_images(2, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(HOG()((images - mean) / std), HOG()(images), rtol=0, atol=2e-4)


def test_hog_colour_is_hog_and_the_mean_of_each_colour() -> None:
    images = torch.randn(2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    out = HOGColour(colours=4, cell=8, bins=6)(images)
    assert out.shape == (2, 4 * 6 + 4, 3, 2)
    assert torch.equal(out[:, :24], HOG(colours=4, cell=8, bins=6)(images))
    for b, colour, y, x in np.ndindex(2, 4, 3, 2):
        mean = images[b, colour, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].double().mean().item()
        assert out[b, 24 + colour, y, x].item() == pytest.approx(HOGColour.WEIGHT * mean, abs=1e-6)


def test_recolouring_changes_colour_alone_and_moving_edges_within_a_cell_changes_edges_alone() -> None:
    images = golden_images(2, 64)
    before = HOGColour()(images)
    tint = torch.tensor([0.5, -1.0, 0.0])[:, None, None]
    after = HOGColour()(images + tint)
    torch.testing.assert_close(after[:, :27], before[:, :27], rtol=0, atol=2e-4)
    torch.testing.assert_close(
        after[:, 27:] - before[:, 27:], (HOGColour.WEIGHT * tint).expand(2, 3, 8, 8), rtol=0, atol=1e-5
    )
    turned = images.unflatten(3, (8, 8)).unflatten(2, (8, 8)).transpose(3, 5).flatten(4, 5).flatten(2, 3)
    after = HOGColour()(turned)
    torch.testing.assert_close(after[:, 27:], before[:, 27:], rtol=0, atol=1e-5)
    assert (after[:, :27] - before[:, :27]).abs().max() > 0.1


@pytest.mark.parametrize(("colours", "cell", "bins"), [(3, 8, 9), (1, 8, 9), (3, 4, 9), (3, 8, 18)])
def test_colour_has_about_half_of_the_variance(colours: int, cell: int, bins: int) -> None:
    """On pictures with edges at every scale (noise whose amplitude falls as 1 / frequency, as that of photos does)."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(96)[:, None], torch.fft.rfftfreq(96)[None]).clamp(min=1 / 96)
    noise = torch.randn(100, colours, 96, 96, generator=generator)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(96, 96))
    images = (images - images.mean()) / images.std()
    variance = HOGColour(colours, cell, bins)(images).var(dim=(0, 2, 3))
    share = variance[-colours:].sum() / variance.sum()
    assert 0.3 < share < 0.7


def test_pixels_equal_the_plain_loop() -> None:
    images = torch.rand(2, 3, 12, 8)
    out = Pixels(cell=4)(images)
    for b, colour, y, x in np.ndindex(2, 3, 12, 8):
        channel = colour * 16 + (y % 4) * 4 + x % 4
        assert out[b, channel, y // 4, x // 4] == images[b, colour, y, x]


def test_normalised_pixels_have_mean_zero_and_variance_one() -> None:
    out = Pixels(cell=8, normalise=True)(torch.rand(2, 3, 32, 32) * 5 + 3)
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=1), torch.ones(2, 4, 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_keeps_the_contract(name: str) -> None:
    target = TARGETS[name](3, 8)
    images = torch.rand(2, 3, 32, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = target(images)
    assert out.shape == (2, target.channels, 4, 6)
    assert out.dtype == torch.float32 and not out.requires_grad
    torch.testing.assert_close(out, target(images))
