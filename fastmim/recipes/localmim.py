# SPDX-License-Identifier: Apache-2.0
"""LocalMIM: several layers predict gradients, the first ones in fine cells, the last ones in coarse cells."""

from fastmim.config import Config, DataConfig, MethodConfig, OptimConfig


def localmim() -> Config:
    """Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction" (CVPR 2023, arXiv 2303.05251).

    Reproduces: the pre-training of ViT-B, 84.0 % after 1600 epochs: 224 px, 75 % of patches of 16 px dropped; blocks 2,
    4, 10 and 12 (of 12; of other depths the second, fourth, third last and last) predict HOG in cells of 4, 8, 16 and
    32 px, each with a decoder of its own of one block; the losses are added up. AdamW with 2e-4 per 256 images.
    Command: ``fastmim pretrain IMAGES --recipe localmim --model vit_base_patch16_224 --global-batch 2048``
    Expected cost: 0.3 times SimMIM's an epoch; at 128 px (``--resolution 128``) 0.1 times (ViT-B,
    multiply-accumulates). Status: the paper's rows are not measured here; steps of ViT-S at 128 px
    are, in ``results/methods.csv``.

    Differs from the paper: hierarchical networks predict from each of their stages, in cells of its stride: with
    ``--hide pixels``, or with ``--hide compact --masking grid``.
    """
    return Config(
        data=DataConfig(resolution=224, crop_scale=(0.2, 1.0), flip=True),
        method=MethodConfig(recipe="localmim", hide="drop", mask_ratio=0.75, target="hog", scales="localmim"),
        optim=OptimConfig(epochs=1600, warmup=0.025, lr_per_256=2e-4, weight_decay=0.05, betas=(0.9, 0.95)),
    )
