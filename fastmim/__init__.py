# SPDX-License-Identifier: Apache-2.0
"""fastmim: pre-train any vision backbone on your own unlabelled images, several times faster.

``fastmim.pretrain(data="images/", model="vit_small_patch16_224", out="runs/a")`` does it; the public names below are
imported when they are first used, so that ``import fastmim`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "pretrain": "fastmim.runs",
    "resume": "fastmim.runs",
    "probe": "fastmim.runs",
    "finetune": "fastmim.transfer",
    "distill": "fastmim.transfer",
    "cross_validate": "fastmim.transfer",
    "predict": "fastmim.predicting",
    "select": "fastmim.choose",
    "embed": "fastmim.embedding.embed",
    "scan": "fastmim.data.sources.scan",
    "prepare_images": "fastmim.data.prepared.prepare",
    "bench": "fastmim.speed.compare",
    "compare": "fastmim.comparing.compare",
    "Run": "fastmim.run_folder",
    "Config": "fastmim.config",
    "UserError": "fastmim.errors",
    "MaskedImageModel": "fastmim.mim.model",
    "HOG": "fastmim.mim.targets",
    "HOGColour": "fastmim.mim.targets",
    "Pixels": "fastmim.mim.targets",
    "RandomBlocks": "fastmim.mim.masking",
    "Masks": "fastmim.mim.masking",
    "LinearDecoder": "fastmim.mim.decoder",
    "TransformerDecoder": "fastmim.mim.decoder",
    "CrossDecoder": "fastmim.mim.decoder",
    "Backbone": "fastmim.backbones.adapter",
    "Stage": "fastmim.backbones.adapter",
    "HidingBackbone": "fastmim.backbones.hiding",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 (the keys are strings)

if TYPE_CHECKING:
    from fastmim.backbones.adapter import Backbone as Backbone
    from fastmim.backbones.adapter import Stage as Stage
    from fastmim.backbones.hiding import HidingBackbone as HidingBackbone
    from fastmim.choose import select as select
    from fastmim.comparing.compare import compare as compare
    from fastmim.config import Config as Config
    from fastmim.data.prepared.prepare import prepare_images as prepare_images
    from fastmim.data.sources.scan import scan as scan
    from fastmim.embedding.embed import embed as embed
    from fastmim.errors import UserError as UserError
    from fastmim.mim.decoder import CrossDecoder as CrossDecoder
    from fastmim.mim.decoder import LinearDecoder as LinearDecoder
    from fastmim.mim.decoder import TransformerDecoder as TransformerDecoder
    from fastmim.mim.masking import Masks as Masks
    from fastmim.mim.masking import RandomBlocks as RandomBlocks
    from fastmim.mim.model import MaskedImageModel as MaskedImageModel
    from fastmim.mim.targets import HOG as HOG
    from fastmim.mim.targets import HOGColour as HOGColour
    from fastmim.mim.targets import Pixels as Pixels
    from fastmim.predicting import predict as predict
    from fastmim.run_folder import Run as Run
    from fastmim.runs import pretrain as pretrain
    from fastmim.runs import probe as probe
    from fastmim.runs import resume as resume
    from fastmim.speed.compare import bench as bench
    from fastmim.transfer import cross_validate as cross_validate
    from fastmim.transfer import distill as distill
    from fastmim.transfer import finetune as finetune


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastmim' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
