# SPDX-License-Identifier: Apache-2.0
"""Which maps are predicted from."""

import pytest

from fastmim.backbones.scales import choose_maps
from fastmim.errors import UserError

VIT, SWIN = [16] * 12, [4, 8, 16, 32]


def test_the_maps_of_localmim() -> None:
    assert choose_maps(VIT, "localmim", "vit") == (1, 3, 9, 11)
    assert choose_maps([16] * 24, "localmim", "vit") == (1, 3, 21, 23)
    assert choose_maps(SWIN, "localmim", "swin") == (0, 1, 2, 3)


def test_stages_are_the_last_maps_of_each_stride() -> None:
    assert choose_maps(SWIN, "stages", "swin") == (0, 1, 2, 3)
    assert choose_maps([4, 4, 8, 16, 16, 16], "stages", "x") == (1, 2, 5)
    assert choose_maps([2, *SWIN], "stages", "resnet") == (0, 1, 2, 3, 4)
    assert choose_maps([2, *SWIN], "localmim", "resnet") == (1, 2, 3, 4)


def test_numbers_count_from_both_ends() -> None:
    assert choose_maps(VIT, (-1, 1, -3), "vit") == (1, 9, 11)


@pytest.mark.parametrize(
    ("strides", "scales", "message"),
    [
        (VIT, "stages", "plain network.*say which blocks, as in --scales 4,8,-1, or take --scales localmim"),
        (VIT[:4], "localmim", "7 or more blocks, but 'vit' has 4"),
        (VIT, (1, 12), "12 maps, 0 to 11, and none with the number 12"),
        (VIT, (1, 3), "the last map, -1, is what is handed over.*--discard 8"),
        (VIT, (-1, 11), "several maps are needed, not 1"),
    ],
)
def test_what_cannot_be_is_refused(strides: list[int], scales: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose_maps(strides, scales, "vit")
    assert "\n" not in str(caught.value)
