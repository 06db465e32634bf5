# SPDX-License-Identifier: Apache-2.0
"""AdamW with the paper's settings, and the learning rate as a function of the samples seen."""

import math

import torch


def adamw(groups: list[dict[str, object]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in one fused kernel per group."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(seen: int, total: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up to ``peak`` over the share ``warmup`` of ``total`` samples, then half a cosine down to ``floor``.

    Measured in samples, so that it knows nothing of batch sizes and resolutions.
    """
    rise = warmup * total
    if seen < rise:
        return peak * seen / rise
    progress = min(1.0, (seen - rise) / max(total - rise, 1))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
