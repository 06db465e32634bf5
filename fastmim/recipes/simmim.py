# SPDX-License-Identifier: Apache-2.0
"""SimMIM: hidden patches become a token; one linear layer predicts raw pixels."""

from fastmim.config import Config, DataConfig, MethodConfig, OptimConfig


def simmim() -> Config:
    """Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling" (CVPR 2022, arXiv 2111.09886).

    Reproduces: the pre-training of ViT-B at 224 px (83.8 % after 800 epochs, table 6) and, with ``--resolution 192``,
    of Swin-B (84.0 %): 60 % of blocks of 32 px hidden by a learnt token, a linear layer, absolute error of pixels,
    AdamW with 1e-4 per 256 images, betas 0.9 and 0.999, weight decay 0.05, crops of 67 to 100 %, warm-up over a tenth.
    Command: ``fastmim pretrain IMAGES --recipe simmim --model vit_base_patch16_224 --global-batch 2048``
    Expected cost: 3.1 times FastMIM's an epoch at 128 px (ViT-B, multiply-accumulates). Status: the paper's rows are
    not measured here; steps of ViT-S, Swin-T and ConvNeXt-T are, in ``results/methods.csv``.

    Networks whose first layer is no patch embedding take ``--hide pixels``.
    """
    return Config(
        data=DataConfig(resolution=224, crop_scale=(0.67, 1.0), flip=True),
        method=MethodConfig(
            recipe="simmim", hide="tokens", mask_ratio=0.6, block=32, target="pixels", loss="l1", decoder="linear"
        ),
        optim=OptimConfig(epochs=800, warmup=0.1, lr_per_256=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
    )
