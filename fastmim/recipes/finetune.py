# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by name: each public function returns a whole ``FinetuneConfig``; ``distill`` a ``DistillConfig``.

Costs are multiply-accumulates of forward and backward passes, three times ``results/costs.csv``'s forward, over the
1,281,167 images of ImageNet-1k: an H100 at 40 % of its 989 TFLOP/s makes 0.71e18 of them in an hour.
"""

import inspect
import sys

from fastmim.config import (
    ClassifyConfig,
    DistillConfig,
    DistillMethodConfig,
    FinetuneConfig,
    LabelledDataConfig,
    TransferOptimConfig,
    nearest,
)
from fastmim.errors import UserError


def names() -> list[str]:
    """The recipes that there are for fine-tuning."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    signatures = {name: inspect.signature(function) for name, function in functions}
    return [name for name, one in signatures.items() if one.return_annotation is FinetuneConfig and not one.parameters]


def load(name: str) -> FinetuneConfig:
    """The configuration of one recipe.

    Raises:
        UserError: no recipe has that name.
    """
    if name not in names():
        raise UserError(f"unknown recipe '{name}'{nearest(name, names())}; there are: {', '.join(names())}")
    config: FinetuneConfig = getattr(sys.modules[__name__], name)()
    return config


def load_distill(name: str) -> DistillConfig:
    """The configuration of distillation.

    Raises:
        UserError: it has another name.
    """
    if name != "distill":
        raise UserError(f"unknown recipe '{name}'; there is: distill")
    return distill()


def default() -> FinetuneConfig:
    """What MAE, SimMIM and FastMIM fine-tune with, for sets of any size: batch and learning rate follow the images.

    RandAugment 9 / 0.5, erasing 0.25, mixup 0.8, cutmix 1, smoothing 0.1, drop path 0.1 (FastMIM's released settings;
    MAE appendix A.2, table 9), layer decay 0.75, 100 epochs at 224 px.
    """
    return FinetuneConfig()


def mild() -> FinetuneConfig:
    """For few images or few epochs: crops of 40 to 100 % of the picture and a mirror, and no other variation.

    The settings are ours. On 1,653 hand photos of 10 classes, in 20 epochs from the demo's run at 64 px (one seed), it
    reached 58.9 % where ``default`` reached 36.9 %: what is right for 100 epochs of a million images is too much for
    few of few.
    Command: ``fastmim finetune LABELLED RUN --recipe mild --epochs 30``
    Expected cost: that of ``default``.
    """
    return FinetuneConfig(
        data=LabelledDataConfig(crop_scale=(0.4, 1.0)),
        method=ClassifyConfig(recipe="mild", rand_augment=None, erase=0, mixup=0, cutmix=0),
    )


def vit_base() -> FinetuneConfig:
    """ViT-B/16 of the paper: 83.8 % after 800 epochs of FastMIM at 128 px.

    Reproduces: 224 px, batch 1024, 2.4e-3, 100 epochs, 5 of warm-up, layer decay 0.70, drop path 0.1 (release notes).
    Command: ``fastmim finetune IMAGENET RUN --recipe vit_base``
    Expected cost: 6.8e18 multiply-accumulates, 10 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("vit_base", "vit_base_patch16_224", lr=2.4e-3, layer_decay=0.70, drop_path=0.1)


def vit_large() -> FinetuneConfig:
    """ViT-L/16. The paper gives no recipe for it (its reviewers noted that): these are MAE's (appendix A.2, table 9).

    Reproduces: MAE's ViT-L at 224 px: batch 1024, 4e-3, 50 epochs, layer decay 0.75, drop path 0.2.
    Command: ``fastmim finetune IMAGENET RUN --recipe vit_large``
    Expected cost: 1.2e19 multiply-accumulates, 17 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("vit_large", "vit_large_patch16_224", lr=4e-3, layer_decay=0.75, drop_path=0.2, epochs=50)


def swin_base() -> FinetuneConfig:
    """Swin-B of the paper: 84.1 % after 400 epochs of FastMIM at 128 px (windows of 4, which become 7 at 224 px).

    Reproduces: 224 px, batch 1024, 4e-3, 100 epochs, 5 of warm-up, layer decay 0.80, drop path 0.1 (release notes).
    Command: ``fastmim finetune IMAGENET RUN --recipe swin_base``
    Expected cost: 5.9e18 multiply-accumulates, 8 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("swin_base", "swin_base_patch4_window7_224", lr=4e-3, layer_decay=0.80, drop_path=0.1)


def swin_large() -> FinetuneConfig:
    """Swin-L. The paper's recipe is not public: these are Swin-B's with drop path 0.3, as SimMIM has for its Swin-L.

    Command: ``fastmim finetune IMAGENET RUN --recipe swin_large``
    Expected cost: 1.3e19 multiply-accumulates, 19 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("swin_large", "swin_large_patch4_window7_224", lr=4e-3, layer_decay=0.80, drop_path=0.3)


def pvt_v2_b2() -> FinetuneConfig:
    """PVTv2-B2 of the paper: 82.5 % after 800 epochs, whose released weights are of a run that predicts pixels.

    The paper's recipe is not public: these are Swin-B's.
    Command: ``fastmim finetune IMAGENET RUN --recipe pvt_v2_b2``
    Expected cost: 1.5e18 multiply-accumulates, 2 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("pvt_v2_b2", "pvt_v2_b2", lr=4e-3, layer_decay=0.80, drop_path=0.1)


def pvt_v2_b5() -> FinetuneConfig:
    """PVTv2-B5. The paper's recipe is not public: these are Swin-B's with PVTv2-B5's own drop path of 0.3.

    Command: ``fastmim finetune IMAGENET RUN --recipe pvt_v2_b5``
    Expected cost: 4.5e18 multiply-accumulates, 6 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("pvt_v2_b5", "pvt_v2_b5", lr=4e-3, layer_decay=0.80, drop_path=0.3)


def cmt_small() -> FinetuneConfig:
    """CMT-S of the paper: 83.9 % after 800 epochs of FastMIM at 128 px; the released code cannot fine-tune it.

    The paper's recipe is not public: these are Swin-B's.
    Command: ``fastmim finetune IMAGENET RUN --recipe cmt_small``
    Expected cost: 1.5e18 multiply-accumulates, 2 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("cmt_small", "cmt_small", lr=4e-3, layer_decay=0.80, drop_path=0.1)


def cmt_base() -> FinetuneConfig:
    """CMT-B at the 256 px of its paper (Guo et al. 2021); FastMIM has no figure for it. Settings are Swin-B's.

    Command: ``fastmim finetune IMAGENET RUN --recipe cmt_base``
    Expected cost: 3.6e18 multiply-accumulates, 5 hours of an H100. Status: its steps are tested, the result is not
    measured here.
    """
    return _recipe("cmt_base", "cmt_base", lr=4e-3, layer_decay=0.80, drop_path=0.3, resolution=256)


def distill() -> DistillConfig:
    """VanillaKD (Hao et al. 2023, arXiv 2305.15781): plain logits, strong augmentation, a schedule of 300 epochs.

    Command: ``fastmim distill LABELLED RUN --model mobilenetv3_small_100``
    Status: steps are tested; what it gains is for the user's own set to show. The paper's gains come with schedules of
    up to 1200 epochs.
    """
    return DistillConfig(
        method=DistillMethodConfig(drop_path=0.0),
        optim=TransferOptimConfig(epochs=300, layer_decay=1.0),
    )


def _recipe(
    name: str,
    model: str,
    *,
    lr: float,
    layer_decay: float,
    drop_path: float,
    epochs: float = 100,
    resolution: int = 224,
) -> FinetuneConfig:
    """AdamW as MAE has it, a batch of 1024, 5 epochs of warm-up, and the default's ways to vary images."""
    return FinetuneConfig(
        data=LabelledDataConfig(resolution=resolution),
        method=ClassifyConfig(recipe=name, model=model, drop_path=drop_path),
        optim=TransferOptimConfig(
            epochs=epochs, warmup=5 / epochs, global_batch=1024, lr=lr, layer_decay=layer_decay, weight_decay=0.05,
            min_lr=1e-6,
        ),
    )  # fmt: skip
