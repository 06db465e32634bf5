# SPDX-License-Identifier: Apache-2.0
"""The schemas of runs, in four sections: what can change the result (data, method, optim), and what cannot (system).

Every leaf name is unique within a kind of run, so the same words work flat on the command line (``--mask-ratio 0.6``),
flat in Python (``mask_ratio=0.6``) and nested or flat in YAML. ``None`` always means "chosen from the network, the data
and the machine"; the value that was chosen is what the run folder's ``config.yaml`` holds.

This package imports neither torch nor timm: ``--help`` must answer at once.
"""

from fastmim.config.finetune import (
    ClassifyConfig,
    DistillConfig,
    DistillMethodConfig,
    FinetuneConfig,
    LabelledDataConfig,
    TransferConfig,
    TransferOptimConfig,
)
from fastmim.config.parts import ImagesConfig, OptimConfig, RunConfig, Section, SystemConfig, listed
from fastmim.config.pretrain import Config, DataConfig, MethodConfig, PretrainSystemConfig
from fastmim.config.words import WORDS, ConfigT, locate, nearest, option_words, sections, update, validate

__all__ = [
    "WORDS",
    "ClassifyConfig",
    "Config",
    "ConfigT",
    "DataConfig",
    "DistillConfig",
    "DistillMethodConfig",
    "FinetuneConfig",
    "ImagesConfig",
    "LabelledDataConfig",
    "MethodConfig",
    "OptimConfig",
    "PretrainSystemConfig",
    "RunConfig",
    "Section",
    "SystemConfig",
    "TransferConfig",
    "TransferOptimConfig",
    "listed",
    "locate",
    "nearest",
    "option_words",
    "sections",
    "update",
    "validate",
]
