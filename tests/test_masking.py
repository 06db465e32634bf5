# SPDX-License-Identifier: Apache-2.0
"""Masks: exact counts, one function of the sample's key, every block equally likely."""

import pytest
import torch

from fastmim.mask import resize_mask
from fastmim.mim.masking import MASKINGS, RandomMasking

KEYS = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize(("ratio", "side"), [(0.75, 8), (0.6, 7), (0.4, 14), (0.9, 4)])
def test_exactly_the_share_is_hidden_in_every_image(name: str, ratio: float, side: int) -> None:
    mask = MASKINGS[name](ratio)(KEYS[:100], side)
    assert mask.dtype == torch.bool and mask.shape == (100, side, side)
    assert (mask.flatten(1).sum(1) == round(ratio * side * side)).all()


def test_a_mask_follows_from_its_key_alone() -> None:
    masking = RandomMasking(0.75)
    whole = masking(KEYS[:50], 8)
    backwards = masking(KEYS[:50].flip(0), 8).flip(0)
    alone = torch.cat([masking(key[None], 8) for key in KEYS[:50]])
    assert torch.equal(whole, backwards) and torch.equal(whole, alone)


def test_every_block_and_every_pair_of_blocks_is_equally_likely() -> None:
    mask = RandomMasking(0.75)(KEYS, 4).flatten(1).float()
    # 4,000 draws: the standard error of a frequency is at most 0.008; five of them.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.75), rtol=0, atol=0.04)
    pairs = mask.T @ mask / len(mask)
    other = pairs[~torch.eye(16, dtype=torch.bool)]
    torch.testing.assert_close(other, torch.full_like(other, 12 * 11 / (16 * 15)), rtol=0, atol=0.04)


def test_neighbouring_keys_have_unrelated_masks() -> None:
    mask = RandomMasking(0.5)(torch.arange(4000), 4).flatten(1).float()
    agreement = (mask[1:] == mask[:-1]).float().mean()
    assert abs(agreement.item() - 0.5) < 0.02


def test_masks_on_other_grids() -> None:
    mask = torch.tensor([[[True, False], [False, False]]])
    fine = resize_mask(mask, 4)
    assert fine[0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert torch.equal(resize_mask(fine, 2), mask)
    half = torch.tensor([[[True, False], [True, True]]])
    assert resize_mask(half, 1).item() is False and resize_mask(torch.ones_like(half), 1).item() is True
    with pytest.raises(ValueError, match="does not fit"):
        resize_mask(mask, 3)
