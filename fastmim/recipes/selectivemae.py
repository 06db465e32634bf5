# SPDX-License-Identifier: Apache-2.0
"""SelectiveMAE: encode the patches that hold something, predict some of the rest."""

from fastmim.config import Config, DataConfig, MethodConfig, OptimConfig


def selectivemae() -> Config:
    """Wang et al., "Harnessing Massive Satellite Imagery with Efficient Masked Image Modeling" (ICCV 2025).

    arXiv 2406.11933. Reproduces: the pre-training of ViT-B/L: 224 px; 15 % of the patches are encoded, half of them
    drawn by the energy of their gradients, the rest by their likeness to those, at first the most alike, later the
    least; 25 % are predicted, drawn by energy too, by 12 blocks of cross-attention (CrossMAE); pixels normalised per
    patch.
    Command: ``fastmim pretrain IMAGES --recipe selectivemae --model vit_large_patch16_224 --global-batch 2048``
    Expected: the authors report more than twice MAE's speed, part of which comes from leaving out images, which
    ``fastmim select`` does. Status: not measured here; ``fastmim bench`` measures its steps.

    Differs from the paper: the exact course of the curriculum is ours, see ``fastmim.mim.selective``.
    """
    return Config(
        data=DataConfig(resolution=224, crop_scale=(0.2, 1.0), flip=True),
        method=MethodConfig(
            recipe="selectivemae", hide="drop", masking="selective", mask_ratio=0.85, predict_ratio=0.25,
            target="pixels_norm", decoder="cross", decoder_dim=512, decoder_depth=12,
        ),
        optim=OptimConfig(epochs=800, warmup=0.05, lr_per_256=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95)),
    )  # fmt: skip
