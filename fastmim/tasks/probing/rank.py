# SPDX-License-Identifier: Apache-2.0
"""How many directions features use, which tells a collapse without labels."""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(vectors: Float[Tensor, "N D"]) -> float:
    """How many directions the features use, from 1 (collapsed) to min(N, D): RankMe (Garrido et al. 2023, eq. 1).

    The exponential of the entropy of the singular values, normalised to sum 1; the features are not centred.
    """
    values = torch.linalg.svdvals(vectors.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())
