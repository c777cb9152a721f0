"""KoLeo: features of a batch are pushed apart, so that they fill the sphere instead of collapsing (Sablayrolles et al.,
arXiv 1806.03198; as DINOv2 uses it, Oquab et al., arXiv 2304.07193).

It estimates the entropy of the features' density by the distance of each to its nearest neighbour (Kozachenko and
Leonenko). The neighbours are sought among the samples of one process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast

EPS = 1e-8  # keeps the logarithm of two equal features finite


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest other feature, for (B, D) with B >= 2; a scalar.

    Features are normalised here; the result is in float32 at least.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with without_autocast(features.device.type):
        features = F.normalize(features, dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = features @ features.T
            nearest = similarity.fill_diagonal_(-2.0).argmax(1)  # below every cosine
        distance = F.pairwise_distance(features, features[nearest], eps=EPS)
        return -(distance + EPS).log().mean()
