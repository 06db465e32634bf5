# SPDX-License-Identifier: Apache-2.0
"""What networks cost: weights, and multiply-accumulates of one image, beside what their papers print.

Writes results/costs.csv.

    python benchmarks/costs.py      under a minute on one core; nothing is computed but shapes
"""

from typing import Any, NamedTuple

import rows
import timm
import torch
from timm.layers.config import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

import fastmim.backbones.cmt  # noqa: F401, registers CMT with timm


class Published(NamedTuple):
    """A network under the name of its paper, at the paper's size; millions of weights and billions of products."""

    name: str
    model: str
    params: str
    gmacs: str


# ViT: MAE (He et al. 2022) and DeiT (Touvron et al. 2021); the others from the papers that propose them.
NETWORKS = (
    Published("ViT-B/16", "vit_base_patch16_224", "86.6", "17.6"),
    Published("ViT-L/16", "vit_large_patch16_224", "304.3", "61.6"),
    Published("Swin-B", "swin_base_patch4_window7_224", "87.8", "15.4"),
    Published("Swin-L", "swin_large_patch4_window7_224", "196.5", "34.5"),
    Published("PVTv2-B2", "pvt_v2_b2", "25.4", "4.0"),
    Published("PVTv2-B5", "pvt_v2_b5", "82.0", "11.8"),
    Published("CMT-Ti", "cmt_tiny", "9.5", "0.6"),
    Published("CMT-XS", "cmt_xsmall", "15.2", "1.5"),
    Published("CMT-S", "cmt_small", "25.1", "4.0"),
    Published("CMT-B", "cmt_base", "45.7", "9.3"),
)


def measure(model: str, **arguments: Any) -> tuple[int, int, int]:
    """Side of the images in pixels, weights with a head of 1000 classes, and multiply-accumulates of one image.

    Counted are convolutions and products of matrices, those of attention too; norms, activations and sums are not.
    """
    set_fused_attn(False)  # so that both products of attention are seen as such
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(model, **arguments).eval()
            images = torch.empty(1, *network.pretrained_cfg["input_size"])
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(images)
    finally:
        set_fused_attn(True)
    params = sum(weight.numel() for weight in network.parameters())
    return images.shape[-1], params, counter.get_total_flops() // 2


def row(network: Published) -> dict[str, str]:
    """A line of results/costs.csv, without its origin."""
    px, params, macs = measure(network.model)
    found = {"params_m": params / 1e6, "gmacs": macs / 1e9}
    printed = {"params_m": network.params, "gmacs": network.gmacs}
    return {
        **{"network": network.name, "model": network.model, "px": str(px)},
        **{name: f"{value:.2f}" for name, value in found.items()},
        **{f"{name}_published": value for name, value in printed.items()},
        **{f"{name}_difference": f"{100 * (found[name] / float(printed[name]) - 1):+.1f}" for name in found},
    }


if __name__ == "__main__":
    rows.append("costs", [{**row(network), **rows.origin()} for network in NETWORKS])
