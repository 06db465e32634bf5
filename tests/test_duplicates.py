# SPDX-License-Identifier: Apache-2.0
"""Copies of a picture are found, however they were saved; different pictures are not called the same."""

import io
import time

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from fastmim.data.inspection import duplicates


def grey(image: Image.Image) -> np.ndarray:
    side = min(64, max(image.size))
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


def near(images: list[Image.Image]) -> list[list[int]]:
    cells = [grey(image) for image in images]
    hashes = np.array([duplicates.difference_hash(one)[0] for one in cells], dtype=np.uint64)
    thumbs = np.stack([duplicates.thumb(one) for one in cells])
    return duplicates.near(hashes, thumbs, np.array([max(image.size) < 48 for image in images]))


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Pictures with the spectrum of photos: shapes of all sizes."""
    made = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
        frequency[0, 0] = 1
        channels = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(128, 128))) / frequency**1.2).real for _ in range(3)]
        picture = np.stack([channels[0] + 0.3 * other for other in channels], axis=2)
        picture = 128 + 50 * (picture - picture.mean()) / picture.std()
        made.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return made


def test_different_pictures_are_different(scenes: list[Image.Image]) -> None:
    assert near(scenes) == []
    assert near([Image.fromarray(draw(index)) for index in range(60)]) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.copy(),
        lambda image: saved(image, 90),
        lambda image: saved(image, 40),
        lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
        lambda image: image.resize((300, 300), Image.Resampling.BILINEAR),
        lambda image: image.resize((150, 100), Image.Resampling.BICUBIC),
        lambda image: image.convert("L").convert("RGB"),
        lambda image: image.point(lambda value: min(255, int(1.1 * value))),
        lambda image: image.crop((1, 1, 127, 127)),
    ],
    ids=["copy", "jpeg 90", "jpeg 40", "half", "larger", "stretched", "grey", "brighter", "cropped"],
)
def test_copies_are_found(scenes: list[Image.Image], change) -> None:
    changed = [change(image) for image in scenes[:20]]
    found = near([*scenes, *changed])
    right = [[index, len(scenes) + index] for index in range(len(changed))]
    assert all(group in right for group in found)
    assert len(found) >= 19


def test_small_pictures_must_agree_more_closely() -> None:
    """Two things of one outline on a plain ground, of 28 px, are not the same; a copy of one of them is."""
    y, x = np.mgrid[:28, :28]
    outline = (np.abs(x - 14) < 7 + 2 * np.sin(y / 4)) & (np.abs(y - 14) < 12)

    def thing(seed: int) -> Image.Image:
        inside = 170 + np.random.default_rng(seed).normal(0, 25, (7, 7)).repeat(4, 0).repeat(4, 1)
        return Image.fromarray(np.where(outline, inside, 0).clip(0, 255).astype(np.uint8)).convert("RGB")

    things = [thing(seed) for seed in range(30)]
    assert near([*things, saved(things[4], 90)]) == [[4, 30]]


def test_plain_pictures_have_no_detail(scenes: list[Image.Image]) -> None:
    noise = np.random.default_rng(0).normal(128, 3, (64, 64))
    for plain in (np.zeros((64, 64)), np.full((64, 64), 255.0), noise):
        assert duplicates.difference_hash(plain)[1] < duplicates.MIN_DETAIL
    assert min(duplicates.difference_hash(grey(scene))[1] for scene in scenes) >= duplicates.MIN_DETAIL


def propose(hashes: np.ndarray) -> list[tuple[int, int]]:
    found = np.concatenate([np.stack(pairs, axis=1) for pairs in duplicates._proposed(hashes)] or [np.empty((0, 2))])
    return [tuple(pair) for pair in np.sort(found, axis=1).tolist()]


def test_the_search_finds_every_pair_within_the_radius_and_each_once() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes = [*base]
    for flips in range(1, 12):
        for one in base[:60]:
            bits = rng.choice(64, flips, replace=False)
            hashes.append(one ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64)))
    values = np.array(hashes, dtype=np.uint64)
    far = np.unpackbits((values[:, None] ^ values).view(np.uint8).reshape(len(values), len(values), 8), axis=2).sum(2)
    wanted = {(i, j) for i, j in np.argwhere(far <= duplicates.RADIUS).tolist() if i < j}
    found = propose(values)
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert len(wanted) > 60 * 7


def test_equal_hashes_are_proposed_too() -> None:
    values = np.array([5, 9, 5, 5, 1 << 60], dtype=np.uint64)
    assert {(0, 2), (0, 3), (2, 3), (0, 1), (1, 2), (1, 3)} <= set(propose(values))


def test_with_too_many_comparisons_the_radius_is_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 1)
    assert sorted(propose(np.array([0, 0b111, 0b1111 << 20, 1 << 63], dtype=np.uint64))) == [(0, 1), (0, 3)]
    assert propose(np.array([0, 0b1010101], dtype=np.uint64)) == []


def test_a_hundred_thousand_hashes_take_seconds() -> None:
    rng = np.random.default_rng(0)
    # Bits that hang together, as those of photos do: 24 directions make all 64.
    signs = rng.normal(size=(100_000, 24)) @ rng.normal(size=(24, 64)) > 0
    values = np.packbits(signs, axis=1).view(np.uint64).reshape(-1)
    start = time.process_time()
    count = sum(len(first) for first, _ in duplicates._proposed(values))
    assert time.process_time() - start < 20
    assert count > 0


def test_groups_are_connected_parts() -> None:
    pairs = np.array([[5, 3], [3, 9], [0, 1], [9, 7], [1, 0]])
    assert duplicates.groups(10, pairs) == [[0, 1], [3, 5, 7, 9]]
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    rng = np.random.default_rng(0)
    assert duplicates.groups(1000, rng.permutation(chain)) == [list(range(1000))]
    assert duplicates.groups(3, np.empty((0, 2), np.int64)) == []
    assert duplicates.groups(0, np.empty((0, 2), np.int64)) == []


def test_exact() -> None:
    sizes = np.array([10, 0, 7, 10, 0, 8, 7, 10])
    assert duplicates.same_size(sizes).tolist() == [0, 2, 3, 6, 7]
    assert duplicates.same_size(np.array([], dtype=np.int64)).tolist() == []
    digests = np.zeros((5, 32), np.uint8)
    digests[1, 31] = digests[3, 31] = 1
    digests[4, 0] = 9
    assert duplicates.exact(digests) == [[0, 2], [1, 3]]
    assert duplicates.exact(digests[:0]) == []
