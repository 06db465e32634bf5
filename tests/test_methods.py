# SPDX-License-Identifier: Apache-2.0
"""Every masking, target, decoder and way of hiding, on every kind of network, at every size: it works or is refused.

One contract for all: predictions on the target's grid, finite, a gradient for every parameter, and no input of the
encoder that depends on hidden pixels.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmim import recipes
from fastmim.config import Config, MethodConfig, update
from fastmim.errors import UserError
from fastmim.mim.decoder import DECODERS
from fastmim.mim.masking import MASKINGS
from fastmim.mim.model import MaskedImageModel
from fastmim.mim.targets import TARGETS
from fastmim.run_network import build_network
from fastmim.tasks.pretrain import build_mim
from fastmim.tasks.resolve import resolve

WIDTHS = (16, 32, 48, 64)
# Tiny networks of each kind, their stride, and the ways in which they can hide.
NETWORKS: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "vit_tiny_patch16_224": (
        {"embed_dim": 32, "depth": 2, "num_heads": 2}, 16, {"pixels", "tokens", "drop", "compact"},
    ),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}, 32, {"pixels", "tokens", "compact"},
    ),
    "pvt_v2_b0": ({"embed_dims": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}, 32, {"pixels", "compact"}),
    "convnext_atto": ({"dims": list(WIDTHS), "depths": [1, 1, 1, 1]}, 32, {"pixels", "compact"}),
    "resnet10t": ({"channels": list(WIDTHS)}, 32, {"pixels", "compact"}),
    "hiera_tiny_224": (
        {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}, 32, {"pixels", "drop", "compact"},
    ),
}  # fmt: skip
HIDING = ("pixels", "tokens", "drop", "compact")


def possible(stride: int, ways: set[str], size: int, hide: str, masking: str, decoder: str) -> bool:
    """What should work, by the rules that the documentation tells."""
    if hide not in ways or (hide == "compact" and masking != "grid"):
        return False
    if hide == "compact" and (size // 2) % stride:
        return False  # the network sees images of half the side
    if masking == "grid" and hide != "compact" and size // max(stride, 16) % 2:
        return False  # cells of 2 x 2 blocks
    return not (decoder == "linear" and hide in ("drop", "compact"))


def config_of(network: str, size: int, **words: Any) -> Config:
    base = {
        "model": network,
        "model_args": NETWORKS[network][0],
        "resolution": size,
        "decoder_dim": 32,
        "decoder_depth": 1,
    }
    fixed = {"global_batch": 16, "micro_batch": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return update(Config(), {**base, **fixed, **words})


def images_of(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


KEYS = torch.tensor([3, 4])


def check(mim: MaskedImageModel, size: int) -> None:
    out = mim.train()(images_of(size), KEYS, 0.5)
    assert out.loss.isfinite() and out.loss > 0
    for prediction, target in zip(out.predictions, out.targets, strict=True):
        assert prediction.shape[1:] == target.shape[1:] and len(prediction) == mim.masking.masks * len(target)
        assert prediction.isfinite().all()
    assert (out.masks.predicted <= out.masks.hidden).all()
    out.loss.backward()
    assert [name for name, value in mim.named_parameters() if value.requires_grad and value.grad is None] == []


@torch.no_grad()
def check_no_leak(mim: MaskedImageModel, size: int) -> None:
    """Other pixels under the same mask leave the encoder's maps as they are; other visible pixels do not."""
    mim.eval()
    images, other = (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    masks = mim.masking(KEYS, size // mim.block, images, 0.5)
    hidden, count = masks.hidden[:2], masks.hidden_count
    under = hidden.repeat_interleave(mim.block, 1).repeat_interleave(mim.block, 2)[:, None]
    before = mim.backbone(images, hidden, count)
    for a, b, c in zip(
        before,
        mim.backbone(torch.where(under, other, images), hidden, count),
        mim.backbone(torch.where(under, images, other), hidden, count),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("size", [96, 128, 192, 224])
@pytest.mark.parametrize("network", NETWORKS)
def test_all_with_all(network: str, size: int) -> None:
    _, stride, ways = NETWORKS[network]
    built: dict[str, Any] = {}
    for number, (hide, masking, target, decoder) in enumerate(itertools.product(HIDING, MASKINGS, TARGETS, DECODERS)):
        # Several masks where there may be, and a part of the hidden blocks, now and then.
        words: dict[str, Any] = {"hide": hide, "masking": masking, "target": target, "decoder": decoder}
        words["masks"] = 2 if masking in ("random", "grid") and number % 2 else 1
        words["predict_ratio"] = 0.25 if number % 3 == 0 else None
        torch.manual_seed(0)
        try:
            config = config_of(network, size, **words)
            if hide not in built:
                built[hide] = build_network(config, None)
            backbone = copy.deepcopy(built[hide])
            mim = build_mim(resolve(config, backbone, 100), backbone)
        except UserError as error:
            assert not possible(stride, ways, size, hide, masking, decoder), (words, error)
            assert "\n" not in str(error)
            continue
        assert possible(stride, ways, size, hide, masking, decoder), words
        check(mim, size)
        if target == "hog" and decoder == "transformer":
            check_no_leak(mim, size)


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_leaks(name: str) -> None:
    """Each method with its own settings, on a small network of the kind that it is for."""
    recipe = recipes.load(name)
    network = "swin_tiny_patch4_window7_224" if "swin" in recipe.method.model else "vit_tiny_patch16_224"
    arguments = {**NETWORKS[network][0], "depth": 8} if "vit" in network else NETWORKS[network][0]
    words = {"model": network, "model_args": arguments, "decoder_dim": 32, "decoder_depth": 1, "global_batch": 16}
    config = update(recipe, {**words, "mean": (0.5,) * 3, "std": (0.2,) * 3})
    backbone = build_network(config, None)
    mim = build_mim(resolve(config, backbone, 100), backbone)
    size = config.data.course[0][0]
    check_no_leak(mim, size)
    check(mim, size)


@pytest.mark.parametrize("network", NETWORKS)
def test_several_scales_on_every_network(network: str) -> None:
    scales = (0, -1) if "vit" in network else "stages"
    for hide in sorted(NETWORKS[network][2]):
        words: dict[str, Any] = {"scales": scales, "hide": hide}
        if hide == "compact":
            words |= {"masking": "grid", "mask_ratio": 0.8125, "block": 32}
        config = config_of(network, 128, **words)
        try:
            backbone = build_network(config, None)
            mim = build_mim(resolve(config, backbone, 100), backbone)
        except UserError as error:
            assert ("hiera" in network and hide == "drop") or "compact" in str(error), error
            continue
        assert len(mim.targets) == len(backbone.stages) >= 2
        check(mim, 128)
        check_no_leak(mim, 128)


def test_maps_that_are_split_into_blocks_predict_cells_of_their_new_stride() -> None:
    """As the recipe localmim says of hierarchical networks, with the block that is chosen for them."""
    words = {"scales": "localmim", "hide": "compact", "masking": "grid"}
    config = config_of("swin_tiny_patch4_window7_224", 128, **words)
    backbone = build_network(config, None)
    mim = build_mim(resolve(config, backbone, 100), backbone)
    assert mim.block == 16 and [target.cell for target in mim.targets] == [4, 8, 16, 16]
    check(mim, 128)
    check_no_leak(mim, 128)


def test_words_of_the_schema_are_those_of_the_tables() -> None:
    fields = MethodConfig.model_fields
    for name, table in (("masking", MASKINGS), ("target", TARGETS), ("decoder", DECODERS)):
        assert set(fields[name].annotation.__args__) == set(table)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "convnext_atto", "hide": "drop"}, "cannot hide by 'drop'; what works: compact, pixels"),
        ({"scales": "stages"}, "plain network.*say which blocks"),
        ({"decoder": "linear", "hide": "drop"}, "use decoder=transformer, or hide=tokens"),
        ({"hide": "compact"}, "hide=compact needs masking=grid"),
        ({"masking": "grid", "mask_ratio": 0.5}, "0.75, or more"),
        ({"masking": "selective", "masks": 2}, "'random' and 'grid' make several"),
        ({"predict_ratio": 0.9}, "predict_ratio 0.9 is above mask_ratio 0.75"),
        ({"predict_ratio": 0.001}, "predict_ratio 0.001 is 0 of 64 blocks"),
        ({"masking": "grid", "resolution": 112}, "7 blocks of 16 px; nearest that work: 96, 128"),
        ({"scales": (0, -1), "resolution": 80, "block": 16, "model_args": {"depth": 4}}, None),
        ({"discard": 12}, "discard"),
        (
            {"decoder": "cross", "block": 8},
            "of 16 px, but a block has 8 px; use a --block that is a multiple",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words: dict[str, Any], message: str | None) -> None:
    def attempt() -> None:
        fixed = {"global_batch": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3, "model": "vit_tiny_patch16_224"}
        config = update(Config(), {**fixed, **words})
        backbone = build_network(config, None)
        build_mim(resolve(config, backbone, 100), backbone)

    if message is None:
        attempt()
        return
    with pytest.raises(UserError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
