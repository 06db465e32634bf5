# SPDX-License-Identifier: Apache-2.0
"""FastMIM-P: FastMIM whose images grow during pre-training."""

from fastmim.config import Config, update
from fastmim.recipes.fastmim import fastmim


def fastmim_p() -> Config:
    """Guo et al. (arXiv 2212.06593), the progressive variant: small images first, larger ones towards the end.

    Reproduces: no row of the paper; its schedule of sizes, epochs and batches is not public, and the released code
    stops at the first change of size. Ours: 128 px for 70 % of the run, 160 px for 20 %, 192 px for 10 %, all of them
    multiples of 32 px, so that every network and its windows can follow; batch and learning rate know nothing of it.
    Command: ``fastmim pretrain IMAGES --recipe fastmim_p --model vit_base_patch16_224`` (``--phases`` for others)
    Expected cost: 1.26 times FastMIM's at 128 px by pixels (0.7 + 0.2 * 1.56 + 0.1 * 2.25), a half of 192 px
    throughout. Status: measured on small sets only, see ``results/phases.csv``.
    """
    return update(fastmim(), {"recipe": "fastmim_p", "phases": ((128, 0.7), (160, 0.2), (192, 0.1))})
