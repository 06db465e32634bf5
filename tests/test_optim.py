# SPDX-License-Identifier: Apache-2.0
"""The learning rate's curve, and which parameters decay."""

import itertools
import math

import pytest
from timm.models.vision_transformer import VisionTransformer

from fastmim.tasks.param_groups import decay_groups
from fastmim.train.optim import adamw, learning_rate


def test_warm_up_and_cosine_by_samples_seen() -> None:
    rates = [learning_rate(seen, 1000, peak=1.0, warmup=0.1, floor=0.2) for seen in range(1001)]
    assert rates[0] == 0 and rates[50] == pytest.approx(0.5) and rates[100] == pytest.approx(1.0)
    assert rates[550] == pytest.approx(0.6) and rates[1000] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    for seen in (200, 700):
        assert rates[seen] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (seen - 100) / 900)))


def test_no_decay_for_norms_biases_and_tokens() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    decay, keep = decay_groups(model.named_parameters(), 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decay["weight_decay"] == 0.05 and keep["weight_decay"] == 0.0
    assert {names[p].rpartition(".")[2] for p in decay["params"]} == {"weight"}  # type: ignore[attr-defined]
    kept = {names[p] for p in keep["params"]}  # type: ignore[attr-defined]
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= kept
    assert len(decay["params"]) + len(keep["params"]) == len(names)  # type: ignore[arg-type]


def test_only_the_decaying_group_shrinks_without_a_gradient() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    optimizer = adamw(decay_groups(model.named_parameters(), 0.5), lr=0.1, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = parameter.new_zeros(parameter.shape)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    after = dict(model.named_parameters())
    assert (after["blocks.0.mlp.fc1.weight"] - before["blocks.0.mlp.fc1.weight"] * 0.95).abs().max() < 1e-6
    assert (after["pos_embed"] == before["pos_embed"]).all()
