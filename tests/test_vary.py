# SPDX-License-Identifier: Apache-2.0
"""Ways to vary crops: whatever is drawn, an image comes out."""

import pytest
import torch

from fastmim.data.vary import RandAugment


@pytest.mark.parametrize("words", ["rand-m10-n3-inc1", "rand-m1-n3"])
def test_no_draw_fails(words: str) -> None:
    """At both ends of its range posterize would keep no bit, which Pillow refuses."""
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = RandAugment(words, side=32, mean=(0.5, 0.5, 0.5))
    varied = [change(image, key) for key in range(60)]
    assert all(one.shape == image.shape for one in varied)
    assert torch.equal(change(image, 7), varied[7])
