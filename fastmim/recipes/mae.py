# SPDX-License-Identifier: Apache-2.0
"""MAE: hidden patches are not encoded; a deep, narrow decoder predicts normalised pixels."""

from fastmim.config import Config, DataConfig, MethodConfig, OptimConfig


def mae() -> Config:
    """He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022, arXiv 2111.06377).

    Reproduces: the pre-training of ViT-B, 83.6 % after 1600 epochs (table 3; 83.3 % after 800): 224 px, 75 % of patches
    of 16 px dropped, a decoder of 8 blocks of 512 channels, pixels normalised per patch, AdamW with 1.5e-4 per 256
    images, betas 0.9 and 0.95, weight decay 0.05, warm-up over 40 epochs (appendix A.1).
    Command: ``fastmim pretrain IMAGES --recipe mae --model vit_base_patch16_224 --global-batch 4096``
    Expected cost: 1.7 times FastMIM's an epoch at 128 px (ViT-B, multiply-accumulates). Status: not measured
    here; ``fastmim bench`` measures its steps.

    Differs from the paper: the class token takes no part in the decoder, and positions are as timm's network has them.
    For ViT and its relatives; networks with convolutions or windows cannot drop patches, and take
    ``--hide compact --masking grid`` instead.
    """
    return Config(
        data=DataConfig(resolution=224, crop_scale=(0.2, 1.0), flip=True),
        method=MethodConfig(
            recipe="mae", hide="drop", mask_ratio=0.75, target="pixels_norm", decoder_dim=512, decoder_depth=8
        ),
        optim=OptimConfig(epochs=1600, warmup=0.025, lr_per_256=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95)),
    )
