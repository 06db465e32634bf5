# SPDX-License-Identifier: Apache-2.0
"""Masks: exact counts, one function of key, image and progress, and the distributions that the papers ask for."""

import math

import numpy as np
import pytest
import torch
from test_targets import golden_images
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastmim.errors import UserError
from fastmim.mask import resize_mask
from fastmim.mim.masking import MASKINGS, Masking, OneOfFour, RandomBlocks, Rectangles, SelectiveBlocks
from fastmim.mim.targets import HOG

KEYS = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + golden_images(20, 64)


def slow_noise(key: int, count: int, stream: int = 0) -> list[int]:
    """The hashes of one image, with Python's unbounded numbers; signed, because torch sorts signed numbers."""

    def splitmix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    state = splitmix(key)
    if stream:
        state = splitmix(state ^ stream)
    hashes = [splitmix((state + number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, count + 1)]
    return [number - 2**64 if number >= 2**63 else number for number in hashes]


def slow_uniform(bits: int) -> float:
    return ((bits % 2**64 >> 41) + 0.5) / 2**23


def as_grid(blocks: set[int], side: int) -> list[list[bool]]:
    return [[row * side + column in blocks for column in range(side)] for row in range(side)]


# Contracts that all maskings keep.


@pytest.mark.parametrize("predict", [None, 0.25])
@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize(("ratio", "side"), [(0.75, 8), (0.8125, 4), (0.85, 16), (0.9, 4)])
def test_exactly_the_shares_are_hidden_and_predicted(name: str, ratio: float, side: int, predict: float | None) -> None:
    masking = MASKINGS[name](ratio, predict=predict)
    assert isinstance(masking, Masking) and masking.masks == 1
    hidden, predicted, hidden_count, predicted_count = masking(KEYS[:20], side, IMAGES, 0.5)
    assert hidden.dtype == torch.bool and hidden.shape == (20, side, side)
    assert hidden_count == round(ratio * side * side)
    assert (hidden.flatten(1).sum(1) == hidden_count).all()
    assert predicted_count == (hidden_count if predict is None else round(predict * side * side))
    assert (predicted.flatten(1).sum(1) == predicted_count).all()
    assert not (predicted & ~hidden).any()


@pytest.mark.parametrize(
    "masking",
    [
        RandomBlocks(0.75, predict=0.25),
        RandomBlocks(0.6, masks=3),
        Rectangles(0.4, predict=0.2),
        OneOfFour(0.8, masks=4, predict=0.5),
        SelectiveBlocks(0.85, predict=0.25),
    ],
)
def test_a_mask_follows_from_its_own_image_alone(masking: Masking) -> None:
    def masks(rows: slice | list[int]) -> Tensor:
        hidden, predicted, _, _ = masking(KEYS[:20][rows], 8, IMAGES[rows], 0.3)
        both = torch.stack([hidden, predicted], dim=1)
        return both.unflatten(0, (masking.masks, -1)).transpose(0, 1)  # image first

    whole = masks(slice(None))
    assert torch.equal(masks(list(range(19, -1, -1))).flip(0), whole)
    assert torch.equal(torch.cat([masks([row]) for row in range(20)]), whole)
    assert len(whole[:, 0, 0].flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("number", [True, False])
@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_nothing_is_read_back_from_the_device(name: str, number: bool, device: str) -> None:
    """Fake tensors have no values: whatever asked for one, or mixed devices, would fail. They need no GPU either."""
    masking = MASKINGS[name](0.8, predict=0.25)
    with FakeTensorMode():
        keys = torch.empty(5, dtype=torch.int64, device=device)
        progress = 0.3 if number else torch.empty((), device=device)
        masks = masking(keys, 8, torch.empty(5, 3, 64, 64, device=device), progress)
    assert masks.hidden.device.type == masks.predicted.device.type == device
    assert masks.hidden.shape == (5, 8, 8) and masks.hidden_count == 51 and masks.predicted_count == 16
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(5, device=device).sum().item()


@pytest.mark.parametrize("name", MASKINGS)
def test_neighbouring_keys_have_unrelated_masks(name: str) -> None:
    image = torch.zeros(1, 3, 16, 16)  # without edges every block is equally likely, whatever the masking
    mask = MASKINGS[name](0.75)(torch.arange(4000), 4, image.expand(4000, -1, -1, -1)).hidden.flatten(1).float()
    apart = [(mask[step:] == mask[:-step]).float().mean().item() for step in (1, 2, 3, 1999)]
    # Rectangles prefer the middle, so that all their masks are somewhat alike, but neighbours no more than others.
    assert max(apart[:3]) - apart[3] < 0.02
    if name != "blockwise":
        assert abs(apart[0] - (0.75**2 + 0.25**2)) < 0.02


@pytest.mark.parametrize("name", MASKINGS)
def test_predicted_blocks_are_a_random_part_of_the_hidden(name: str) -> None:
    flat = torch.zeros(4000, 1, 8, 8)
    hidden, predicted, *_ = MASKINGS[name](0.75, predict=0.25)(KEYS, 4, flat)
    share = predicted.flatten(1).sum(0) / hidden.flatten(1).sum(0)
    # At least 2,000 hidden draws of each block: a standard error of at most 0.0106; four and a half of them.
    torch.testing.assert_close(share, torch.full((16,), 1 / 3), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("random", {"ratio": 1.0}, "between 0 and 1"),
        ("random", {"ratio": 0.5, "predict": 0.6}, "at most ratio 0.5"),
        ("random", {"ratio": 0.5, "predict": 0.0}, "above 0"),
        ("random", {"ratio": 0.5, "masks": 0}, "at least one"),
        ("blockwise", {"ratio": 0.4, "masks": 2}, "'random' and 'grid'"),
        ("selective", {"ratio": 0.85, "masks": 2}, "'random' and 'grid'"),
        ("grid", {"ratio": 0.6}, "0.75, or more"),
        ("grid", {"ratio": 0.75, "masks": 5}, "4 at most"),
        ("grid", {"ratio": 0.75, "masks": 0}, "at least one"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(name: str, options: dict[str, float], names: str) -> None:
    with pytest.raises(UserError, match=names):
        MASKINGS[name](**options)


# Random blocks.


def test_a_mask_is_the_one_that_it_always_was() -> None:
    """Other masks would make every run another one; drawn by the first version of this library."""
    mask = RandomBlocks(0.5)(torch.tensor([0, 123456789]), 4).hidden
    assert ["".join(".#"[block] for block in row) for image in mask.int().tolist() for row in image] == [
        *("#...", "...#", ".#.#", "####"),
        *(".##.", "...#", ".#.#", "##.#"),
    ]


def test_every_block_and_every_pair_of_blocks_is_equally_likely() -> None:
    mask = RandomBlocks(0.75)(KEYS, 4).hidden.flatten(1).float()
    # 4,000 draws: the standard error of a frequency is at most 0.008; five of them.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.75), rtol=0, atol=0.04)
    pairs = mask.T @ mask / len(mask)
    other = pairs[~torch.eye(16, dtype=torch.bool)]
    torch.testing.assert_close(other, torch.full_like(other, 12 * 11 / (16 * 15)), rtol=0, atol=0.04)


@pytest.mark.parametrize(("ratio", "masks", "side"), [(0.75, 1, 8), (0.6, 2, 7), (0.75, 6, 4), (0.5, 5, 6)])
def test_random_masks_equal_the_plain_loop(ratio: float, masks: int, side: int) -> None:
    blocks, keys = side * side, KEYS[:5].tolist()
    hidden = round(ratio * blocks)
    result = RandomBlocks(ratio, masks, predict=0.3)(KEYS[:5], side)
    expected, predicted = [], []
    for image, key in enumerate(keys):
        stream, start, seen = 0, 0, 0
        for mask in range(masks):
            order = sorted(range(blocks), key=slow_noise(key, blocks, stream).__getitem__)
            run = [order[(start + step) % blocks] for step in range(hidden)]
            expected.append((mask * len(keys) + image, as_grid(set(run), side)))
            predicted.append((mask * len(keys) + image, as_grid(set(run[: round(0.3 * blocks)]), side)))
            start, seen = (start + hidden) % blocks, seen + hidden
            if start == 0:  # back where the first run began
                stream += 1
    assert result.hidden.tolist() == [grid for _, grid in sorted(expected)]
    assert result.predicted.tolist() == [grid for _, grid in sorted(predicted)]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("masks", [2, 3, 4, 9])
def test_several_masks_hide_every_block_equally_often_and_none_is_there_twice(ratio: float, masks: int) -> None:
    hidden = RandomBlocks(ratio, masks)(KEYS[:50], 8).hidden.unflatten(0, (masks, 50))
    often = hidden.sum(0)
    assert (often.amax(dim=(1, 2)) - often.amin(dim=(1, 2)) <= 1).all()
    for first in range(masks):
        for second in range(first):
            assert not (hidden[first] == hidden[second]).flatten(1).all(dim=1).any()


def test_four_masks_show_disjoint_quarters_and_two_hide_what_the_other_shows() -> None:
    quarters = RandomBlocks(0.75, 4)(KEYS[:50], 8).hidden.unflatten(0, (4, 50))
    assert ((~quarters).sum(0) == 1).all()
    first, second = RandomBlocks(0.6, 2)(KEYS[:50], 8).hidden.unflatten(0, (2, 50))
    assert (first | second).all()
    assert torch.equal(first, RandomBlocks(0.6)(KEYS[:50], 8).hidden)


# Rectangles.


def slow_rectangles(key: int, side: int, hidden: int) -> list[tuple[int, int, int, int]]:
    share, aspect, down, right = (
        [slow_uniform(bits) for bits in slow_noise(key, 32, (3 << 20) + number)] for number in range(4)
    )
    left, drawn = 1.0, []
    for number in range(32):
        area = max(left * share[number] * hidden, side * side * 16 / 196)
        left *= 1 - share[number]
        ratio = math.exp(math.log(0.3) + aspect[number] * (math.log(1 / 0.3) - math.log(0.3)))
        height = min(max(round(math.sqrt(area * ratio)), 1), side)
        width = min(max(round(math.sqrt(area / ratio)), 1), side)
        drawn.append((int(down[number] * (side - height + 1)), int(right[number] * (side - width + 1)), height, width))
    return drawn


@pytest.mark.parametrize(("ratio", "side"), [(0.4, 14), (0.75, 8), (0.9, 5)])
def test_rectangles_equal_the_plain_loop(ratio: float, side: int) -> None:
    keys, hidden = KEYS[:30].tolist(), round(ratio * side * side)
    masking = Rectangles(ratio)
    assert masking.rectangles(KEYS[:30], side).tolist() == [
        [list(one) for one in slow_rectangles(key, side, hidden)] for key in keys
    ]
    for key, mask in zip(keys, masking(KEYS[:30], side).hidden.tolist(), strict=True):
        bits = [number % 2**64 >> 7 for number in slow_noise(key, side * side)]
        chosen: set[int] = set()
        for top, left, height, width in [*slow_rectangles(key, side, hidden), (0, 0, side, side)]:
            inside = {row * side + column for row in range(top, top + height) for column in range(left, left + width)}
            chosen |= set(sorted(inside - chosen, key=bits.__getitem__)[: hidden - len(chosen)])
        assert mask == as_grid(chosen, side)


def test_rectangles_lie_in_the_image_with_the_aspects_and_places_of_the_paper() -> None:
    top, left, height, width = Rectangles(0.4).rectangles(KEYS, 32).unbind(dim=2)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area = height * width
    assert area.min() >= 0.85 * 16 / 196 * 32 * 32  # but for rounded sides
    aspect = (height / width).log()
    assert aspect.abs().max() < math.log(1 / 0.3) + 0.25  # likewise
    assert abs(aspect.mean().item()) < 0.01 and abs(aspect.std().item() - 2 * math.log(1 / 0.3) / math.sqrt(12)) < 0.03
    middle = (top + height / 2).mean().item(), (left + width / 2).mean().item()
    assert middle == pytest.approx((16, 16), abs=0.1)


def test_neighbours_are_hidden_together_far_more_often_than_at_random() -> None:
    def together(masking: Masking) -> float:
        mask = masking(KEYS[:500], 14).hidden
        return (
            (mask[:, 1:] & mask[:, :-1]).float().mean() + (mask[..., 1:] & mask[..., :-1]).float().mean()
        ).item() / 2

    assert together(RandomBlocks(0.4)) == pytest.approx(0.16, abs=0.01)
    assert together(Rectangles(0.4)) > 0.3  # of 0.4 that could be


# One of four.


@pytest.mark.parametrize(("ratio", "masks", "side"), [(0.75, 4, 8), (0.8125, 2, 4), (0.8, 3, 6), (0.9, 1, 14)])
def test_one_of_four_equals_the_plain_loop(ratio: float, masks: int, side: int) -> None:
    keys, cells = KEYS[:5].tolist(), side * side // 4
    shown = side * side - round(ratio * side * side)
    result = OneOfFour(ratio, masks)(KEYS[:5], side).hidden.tolist()
    for mask in range(masks):
        for image, key in enumerate(keys):
            bits = slow_noise(key, 4 * cells)
            order = sorted(range(cells), key=slow_noise(key, cells, 2 << 20).__getitem__)
            hidden = set(range(side * side))
            for cell in (order[(mask * shown + step) % cells] for step in range(shown)):
                block = sorted(range(4), key=lambda one, cell=cell: bits[4 * cell + one])[mask]  # type: ignore[misc]
                row, column = cell // (side // 2) * 2 + block // 2, cell % (side // 2) * 2 + block % 2
                hidden.remove(row * side + column)
            assert result[mask * 5 + image] == as_grid(hidden, side)


def test_each_cell_shows_one_block_at_most_and_four_masks_show_each_block_once() -> None:
    def visible_in_cells(hidden: Tensor) -> Tensor:
        return (~hidden).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum(dim=(2, 4))

    quarter = OneOfFour(0.75, masks=4)(KEYS[:100], 8).hidden
    assert (visible_in_cells(quarter) == 1).all()
    assert ((~quarter).unflatten(0, (4, 100)).sum(0) == 1).all()
    fewer = visible_in_cells(OneOfFour(0.8125)(KEYS, 8).hidden)
    assert fewer.max() == 1 and (fewer.flatten(1).sum(1) == 12).all()
    torch.testing.assert_close(fewer.float().mean(0), torch.full((4, 4), 0.75), rtol=0, atol=0.04)
    often = OneOfFour(0.75)(KEYS, 4).hidden.float().mean(0)
    torch.testing.assert_close(often, torch.full((4, 4), 0.75), rtol=0, atol=0.04)


def test_an_odd_grid_has_no_cells() -> None:
    with pytest.raises(UserError, match="6 or 8 blocks"):
        OneOfFour(0.75)(KEYS[:2], 7)


# Selective blocks.


def slow_selective(key: int, image: Tensor, side: int, seen: int, predict: int, progress: float) -> tuple[set, set]:
    """One image with sorted lists and float64: (hidden, predicted)."""
    blocks = range(side * side)
    histogram = HOG(len(image), image.shape[-1] // side, normalise=False)(image[None])[0].flatten(1).T.double().numpy()
    energy = histogram.sum(axis=1)
    log_p = (energy - energy.mean()) / energy.std()

    def draw(stream: int, among: list[int], count: int) -> list[int]:
        bits = slow_noise(key, side * side, stream)
        score = {b: log_p[b] - math.log(-math.log(slow_uniform(bits[b]))) for b in blocks}
        return sorted(among, key=lambda b: -score[b])[:count]

    chosen = draw(1, list(blocks), math.ceil(seen / 2))
    rest, count = [b for b in blocks if b not in chosen], seen // 2
    direction = histogram / np.linalg.norm(histogram, axis=1, keepdims=True)
    likeness = {b: np.mean([direction[b] @ direction[c] for c in chosen]) for b in rest}
    by_likeness = sorted(rest, key=lambda b: -likeness[b])
    points = [0, 1 / 6, 1 / 6 + 0.02, 0.98, 1]
    similar = round(count * float(np.interp(progress, points, [1, 1, 0, 0, 0])))
    ruled = round(count * float(np.interp(progress, points, [1, 1, 1, 1, 0])))
    taken = by_likeness[:similar] + by_likeness[len(rest) - (ruled - similar) :]
    bits = [number % 2**64 >> 7 for number in slow_noise(key, side * side, 2)]
    taken += sorted((b for b in rest if b not in taken), key=bits.__getitem__)[: count - len(taken)]
    hidden = [b for b in blocks if b not in chosen + taken]
    return set(hidden), set(draw(3, hidden, predict))


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.1767, 0.19, 0.5, 0.985, 0.9931, 1.0])
@pytest.mark.parametrize(("ratio", "side"), [(0.85, 8), (0.6, 8), (0.75, 4)])
def test_selective_equals_the_plain_loop(ratio: float, side: int, progress: float) -> None:
    blocks = side * side
    result = SelectiveBlocks(ratio, predict=0.25)(KEYS[:20], side, IMAGES, torch.tensor(progress))
    for row, key in enumerate(KEYS[:20].tolist()):
        seen = blocks - round(ratio * blocks)
        hidden, predicted = slow_selective(key, IMAGES[row], side, seen, round(0.25 * blocks), progress)
        assert result.hidden[row].tolist() == as_grid(hidden, side)
        assert result.predicted[row].tolist() == as_grid(predicted, side)


def test_the_curriculum_goes_from_similar_to_dissimilar_to_random() -> None:
    curriculum = SelectiveBlocks(0.85).curriculum
    for progress in np.linspace(0, 1, 101).tolist():
        similar, dissimilar = (share.item() for share in curriculum(progress))
        points = [0, 1 / 6, 1 / 6 + 0.02, 0.98, 1]
        assert similar == pytest.approx(np.interp(progress, points, [1, 1, 0, 0, 0]), abs=1e-4)
        assert dissimilar == pytest.approx(np.interp(progress, points, [0, 0, 1, 1, 0]), abs=1e-4)


def test_a_block_is_seen_first_with_the_probability_of_its_edges() -> None:
    image = IMAGES[:1, :, :16, :16]
    energy = HOG(3, 4, normalise=False)(image).sum(dim=1).flatten()
    p = ((energy - energy.mean()) / energy.std(correction=0)).softmax(dim=0)
    hidden = SelectiveBlocks(15 / 16)(KEYS, 4, image.expand(4000, -1, -1, -1)).hidden
    torch.testing.assert_close((~hidden).flatten(1).float().mean(0), p, rtol=0, atol=0.03)


def test_empty_images_are_masked_at_random() -> None:
    hidden = SelectiveBlocks(0.75)(KEYS, 4, torch.zeros(4000, 1, 8, 8)).hidden.float()
    torch.testing.assert_close(hidden.mean(0), torch.full((4, 4), 0.75), rtol=0, atol=0.04)


def test_selective_masking_needs_images_that_its_blocks_divide() -> None:
    with pytest.raises(UserError, match="masking=random"):
        SelectiveBlocks(0.85)(KEYS[:2], 8)
    with pytest.raises(UserError, match="do not divide"):
        SelectiveBlocks(0.85)(KEYS[:2], 7, IMAGES[:2])


def test_masks_on_other_grids() -> None:
    mask = torch.tensor([[[True, False], [False, False]]])
    fine = resize_mask(mask, 4)
    assert fine[0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert torch.equal(resize_mask(fine, 2), mask)
    half = torch.tensor([[[True, False], [True, True]]])
    assert resize_mask(half, 1).item() is False and resize_mask(torch.ones_like(half), 1).item() is True
    with pytest.raises(ValueError, match="does not fit"):
        resize_mask(mask, 3)
