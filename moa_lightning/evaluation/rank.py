"""How much room features take up: two figures that need no labels and fall when a representation collapses.

The feature rank is RankMe (Garrido et al., arXiv 2210.02885): the exponential of the entropy of the singular values.
The spread is the share of the features' energy that differs between images.
"""

import torch
from torch import Tensor

EPS = 1e-7  # as in RankMe, added to each share


def feature_rank(features: Tensor) -> Tensor:
    """Between 1, all features on one line, and min(n, D): exp of the entropy of the singular values of (n, D).

    Float32 scalar. Features are not centred, as in the paper; NaN where they are not finite, 1 where all are zero.
    """
    features = features.float()
    nothing = features.new_full((), float("nan"))
    if not features.isfinite().all():
        return nothing
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + EPS
    return torch.exp(-(shares * shares.log()).sum()).clamp_min(1.0)


def feature_spread(features: Tensor) -> Tensor:
    """Variance over images by mean square, summed over dimensions, of (n, D): 0 for equal features, 1 for centred ones.

    A scalar in [0, 1], float32; NaN where features are not finite.
    """
    features = features.float()
    energy = features.square().sum()
    return (features - features.mean(0)).square().sum() / energy.clamp_min(torch.finfo(features.dtype).tiny)
