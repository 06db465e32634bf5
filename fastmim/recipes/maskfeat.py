# SPDX-License-Identifier: Apache-2.0
"""MaskFeat: hidden patches become a token; one linear layer predicts histograms of gradients."""

from fastmim.config import Config, DataConfig, MethodConfig, OptimConfig


def maskfeat() -> Config:
    """Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training" (CVPR 2022, arXiv 2112.09133).

    Reproduces: the pre-training of ViT-B on images, 84.0 % after 1600 epochs: 224 px, 40 % of patches of 16 px hidden
    in rectangles by a learnt token, HOG of 9 bins in cells of 8 px, a linear layer, squared error, AdamW with 1e-4 per
    256 images, betas 0.9 and 0.999, weight decay 0.05, gradients clipped at 0.02.
    Command: ``fastmim pretrain IMAGES --recipe maskfeat --model vit_base_patch16_224 --global-batch 2048``
    Expected cost: that of SimMIM at 224 px. Status: not measured here; ``fastmim bench`` measures its steps.

    Differs from the paper: HOG without a Gaussian window, as in FastMIM; rectangles are drawn at once, not one after
    another.
    """
    return Config(
        data=DataConfig(resolution=224, crop_scale=(0.5, 1.0), flip=True),
        method=MethodConfig(
            recipe="maskfeat", hide="tokens", masking="blockwise", mask_ratio=0.4, target="hog", decoder="linear"
        ),
        optim=OptimConfig(
            epochs=1600, warmup=0.02, lr_per_256=1e-4, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=0.02
        ),
    )
