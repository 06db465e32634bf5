# SPDX-License-Identifier: Apache-2.0
"""The objective against the released code, and the model's promises."""

import pytest
import torch
from test_targets import GOLDENS, golden_images
from torch import Tensor, nn

from fastmim.mim.decoder import DECODERS, TransformerDecoder, default_size
from fastmim.mim.masking import RandomMasking
from fastmim.mim.model import MIM, masked_loss
from fastmim.mim.targets import HOG


def test_objective_equals_the_released_code() -> None:
    prediction, mask = torch.from_numpy(GOLDENS["obj_pred"]), torch.from_numpy(GOLDENS["obj_mask"])
    loss = masked_loss(prediction, HOG()(golden_images(2, 128)), mask)
    assert loss.item() == pytest.approx(GOLDENS["obj_hog_loss"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_objective_equals_the_plain_loop(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 5, 4, 4, generator=generator)
    target = torch.randn(3, 5, 4, 4, generator=generator)
    mask = RandomMasking(0.5)(torch.arange(3), 2)
    errors = [
        abs(float(prediction[b, c, y, x] - target[b, c, y, x])) ** (2 if kind == "l2" else 1)
        for b in range(3) for c in range(5) for y in range(4) for x in range(4)
        if mask[b, y // 2, x // 2]
    ]  # fmt: skip
    assert masked_loss(prediction, target, mask, kind).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


class TinyBackbone(nn.Module):
    """One convolution of stride 8 on the visible pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, images: Tensor, mask: Tensor, hidden: int) -> list[Tensor]:
        assert (mask.flatten(1).sum(1) == hidden).all()
        visible = ~mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
        return [self.conv(images * visible)]


def tiny_mim(decoder: nn.Module) -> MIM:
    return MIM(TinyBackbone(), decoder, HOG(), RandomMasking(0.75), block=16)  # type: ignore[arg-type]


def test_hidden_pixels_change_the_target_but_not_the_prediction() -> None:
    torch.manual_seed(0)
    mim = tiny_mim(TransformerDecoder(32, 8, 8, 27, fill=False, dim=64, depth=1))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    keys = torch.tensor([5, 6])
    before = mim(images, keys)
    hidden = before.mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(images)
    other = torch.where(hidden, 255 - images.flip(-1), images)
    after = mim(other, keys)
    torch.testing.assert_close(after.prediction, before.prediction)
    assert not torch.allclose(after.target, before.target)


def test_visible_cells_have_no_part_in_the_objective() -> None:
    prediction = torch.zeros(1, 3, 4, 4, requires_grad=True)
    mask = torch.tensor([[[True, False], [False, True]]])
    masked_loss(prediction, torch.ones(1, 3, 4, 4), mask).backward()
    assert prediction.grad is not None
    used = prediction.grad[0, 0] != 0
    assert torch.equal(used, mask[0].repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("stride", "cell"), [(4, 8), (8, 8), (16, 8), (32, 8), (14, 7)])
def test_every_decoder_predicts_on_the_targets_grid(name: str, stride: int, cell: int) -> None:
    size = {"fill": True, "dim": 64, "depth": 1} if name == "transformer" else {}
    decoder = DECODERS[name](48, stride, cell, 27, **size)
    side = 4 * stride
    mask = RandomMasking(0.5)(torch.arange(2), 4 if stride >= cell else 2)
    features = torch.randn(2, 48, side // stride, side // stride)
    assert decoder([features], mask).shape == (2, 27, side // cell, side // cell)


def test_a_filling_decoder_does_not_read_hidden_places() -> None:
    torch.manual_seed(0)
    decoder = TransformerDecoder(8, 8, 8, 27, fill=True, dim=64, depth=1)
    mask = RandomMasking(0.5)(torch.arange(2), 4)
    features = torch.randn(2, 8, 4, 4)
    noisy = torch.where(mask[:, None], torch.randn_like(features), features)
    torch.testing.assert_close(decoder([noisy], mask), decoder([features], mask))


def test_mask_tokens_know_their_place() -> None:
    torch.manual_seed(0)
    decoder = TransformerDecoder(8, 8, 8, 27, fill=True, dim=64, depth=1)
    out = decoder([torch.zeros(1, 8, 4, 4)], torch.ones(1, 4, 4, dtype=torch.bool))
    assert (out[0, :, 0, 0] - out[0, :, 3, 3]).abs().max() > 1e-3


def test_decoder_sizes_of_the_paper() -> None:
    assert default_size(768, hierarchical=False) == (256, 1)  # ViT-B
    assert default_size(1024, hierarchical=True) == (256, 4)  # Swin-B
    assert default_size(192, hierarchical=False) == (128, 1)  # ViT-Ti


def test_all_parameters_learn() -> None:
    mim = tiny_mim(TransformerDecoder(32, 8, 8, 27, fill=False, dim=64, depth=2))
    mim(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([1, 2])).loss.backward()
    assert [name for name, parameter in mim.named_parameters() if parameter.grad is None] == []
