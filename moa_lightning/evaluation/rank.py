"""How much room features take up: two figures that need no labels and fall when a representation collapses.

The feature rank is RankMe (Garrido et al., arXiv 2210.02885): the exponential of the entropy of the singular values.
The spread is the share of the features' energy that differs between images.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

EPS = 1e-7  # as in RankMe, added to each share


def feature_rank(features: Tensor) -> Tensor:
    """Between 1, all features on one line, and min(n, D): exp of the entropy of the singular values of (n, D).

    Float32 scalar. Features are not centred, as in the paper; NaN where they are not finite, 1 where all are zero.
    """
    features = features.float()
    nothing = features.new_full((), float("nan"))
    if not features.isfinite().all():
        return nothing
    return _rank(torch.linalg.svdvals(features))


def _rank(values: Tensor) -> Tensor:
    """From singular values (D,)."""
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + EPS
    return torch.exp(-(shares * shares.log()).sum()).clamp_min(1.0)


def feature_spread(features: Tensor) -> Tensor:
    """Variance over images by mean square, summed over dimensions, of (n, D): 0 for equal features, 1 for centred ones.

    A scalar in [0, 1], float32; NaN where features are not finite.
    """
    features = features.float()
    energy = features.square().sum()
    return (features - features.mean(0)).square().sum() / energy.clamp_min(torch.finfo(features.dtype).tiny)


class FeatureSpectrum(Metric):
    """Rank and spread of features that come in batches, over all processes: from number, sum and XᵀX in float64.

    Whatever their number they take D² values, and batches and processes may divide them anyhow.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "products"):  # (), and by broadcasting (D,) and (D, D)
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Features (B, D)."""
        x = features.double()
        self.count = self.count + len(x)
        self.total = self.total + x.sum(0)
        self.products = self.products + x.mT @ x

    def compute(self) -> dict[str, Tensor]:
        """feature_rank and feature_spread, float64 scalars; nothing before features have come."""
        if not self.count > 0:
            return {}
        energy = self.products.diagonal().sum()
        centred = energy - self.total.square().sum() / self.count
        spread = centred.clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
        if not self.products.isfinite().all():
            return {"feature_rank": energy * torch.nan, "feature_spread": energy * torch.nan}
        values = torch.linalg.eigvalsh(self.products).clamp_min(0).sqrt()
        return {"feature_rank": _rank(values), "feature_spread": spread}
