# SPDX-License-Identifier: Apache-2.0
"""The objective against the released code, and the model's promises."""

import pytest
import torch
from test_targets import GOLDENS, golden_images
from torch import Tensor, nn

from fastmim.mim.decoder import TransformerDecoder, default_size
from fastmim.mim.masking import RandomBlocks
from fastmim.mim.model import MaskedImageModel, masked_loss
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
    mask = RandomBlocks(0.5)(torch.arange(3), 2).hidden
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


def tiny_mim(decoder: nn.Module, masks: int = 1, predict: float | None = None) -> MaskedImageModel:
    return MaskedImageModel(TinyBackbone(), RandomBlocks(0.75, masks, predict), HOG(), decoder, block=16)  # type: ignore[arg-type]


def images_of(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def decoder_of(width: int = 32) -> TransformerDecoder:
    return TransformerDecoder(width, 8, 8, 27, fill=False, dim=64, depth=1, grid=8)


def test_hidden_pixels_change_the_target_but_not_the_prediction() -> None:
    torch.manual_seed(0)
    mim = tiny_mim(decoder_of())
    images, keys = images_of(), torch.tensor([5, 6])
    before = mim(images, keys)
    hidden = before.masks.hidden.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(images)
    other = torch.where(hidden, 255 - images.flip(-1), images)
    after = mim(other, keys)
    torch.testing.assert_close(after.predictions, before.predictions)
    assert not torch.allclose(after.targets[0], before.targets[0])


def test_several_masks_are_as_many_single_ones() -> None:
    """One decoded image and one target under four masks: the mean of what each mask alone would say."""
    torch.manual_seed(0)
    mim = tiny_mim(decoder_of(), masks=4)
    images, keys = images_of(), torch.tensor([5, 6])
    out = mim(images, keys)
    assert len(out.masks.hidden) == len(out.predictions[0]) == 8 and len(out.targets[0]) == 2
    # Of four quarters, each block is shown once.
    assert (out.masks.hidden.unflatten(0, (4, 2)).sum(0) == 3).all()
    losses = [
        masked_loss(out.predictions[0][2 * k : 2 * k + 2], out.targets[0], out.masks.hidden[2 * k : 2 * k + 2])
        for k in range(4)
    ]
    assert out.loss.item() == pytest.approx(sum(one.item() for one in losses) / 4, rel=1e-5)


def test_a_part_of_the_hidden_is_predicted() -> None:
    torch.manual_seed(0)
    out = tiny_mim(decoder_of(), predict=0.25)(images_of(), torch.tensor([5, 6]))
    assert out.masks.predicted.flatten(1).sum(1).tolist() == [4, 4] and out.masks.hidden_count == 12
    assert out.loss.item() == pytest.approx(masked_loss(out.predictions[0], out.targets[0], out.masks.predicted).item())


class TwoMaps(TinyBackbone):
    """A map of stride 8, and its mean over 2 x 2 of them."""

    def forward(self, images: Tensor, mask: Tensor, hidden: int) -> list[Tensor]:
        (fine,) = super().forward(images, mask, hidden)
        return [fine, nn.functional.avg_pool2d(fine, 2)]


def test_losses_of_several_scales_add_up() -> None:
    torch.manual_seed(0)
    fine, coarse = decoder_of(), TransformerDecoder(32, 16, 32, 27, fill=False, dim=64, depth=1, grid=4)
    targets = [HOG(cell=8), HOG(cell=32)]
    mim = MaskedImageModel(TwoMaps(), RandomBlocks(0.75), targets, [fine, coarse], block=16)
    out = mim(images_of(), torch.tensor([5, 6]))
    assert [one.shape[-1] for one in out.predictions] == [8, 2]
    # A cell of 32 px counts as much as of its four blocks is hidden.
    share = out.masks.hidden.unflatten(2, (2, 2)).unflatten(1, (2, 2)).float().mean((2, 4))
    errors = (out.predictions[1] - out.targets[1]).square().mean(1)
    coarsest = (errors * share).sum() / share.sum()
    expected = masked_loss(out.predictions[0], out.targets[0], out.masks.hidden) + coarsest
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="2 targets need as many decoders, not 1"):
        MaskedImageModel(TwoMaps(), RandomBlocks(0.75), targets, fine)


@pytest.mark.parametrize("cells", [2, 4, 8, 16, 32])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(cells: int) -> None:
    """However it is cut into micro-batches, and however large cells are beside blocks."""
    random = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(8, 3, cells, cells, generator=random) for _ in range(2))
    mask = RandomBlocks(0.75)(torch.arange(8), 16).predicted
    parts = [masked_loss(prediction[k : k + 1], target[k : k + 1], mask[k : k + 1]).item() for k in range(8)]
    assert sum(parts) / 8 == pytest.approx(masked_loss(prediction, target, mask).item(), rel=1e-5)


def test_visible_cells_have_no_part_in_the_objective() -> None:
    prediction = torch.zeros(1, 3, 4, 4, requires_grad=True)
    mask = torch.tensor([[[True, False], [False, True]]])
    masked_loss(prediction, torch.ones(1, 3, 4, 4), mask).backward()
    assert prediction.grad is not None
    used = prediction.grad[0, 0] != 0
    assert torch.equal(used, mask[0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_decoder_sizes_of_the_paper() -> None:
    assert default_size(768, hierarchical=False) == (256, 1)  # ViT-B
    assert default_size(1024, hierarchical=True) == (256, 4)  # Swin-B
    assert default_size(192, hierarchical=False) == (128, 1)  # ViT-Ti


def test_all_parameters_learn() -> None:
    mim = tiny_mim(decoder_of())
    mim(images_of(), torch.tensor([1, 2])).loss.backward()
    assert [name for name, parameter in mim.named_parameters() if parameter.grad is None] == []
