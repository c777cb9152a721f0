"""KoLeo against distances written out in float64, and what it does to a batch."""

import math

import pytest
import torch

from moa_lightning.losses import koleo_loss


def features() -> torch.Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_minus_the_mean_logarithm_of_the_distance_to_the_nearest_other() -> None:
    rows = [row / row.norm() for row in features()]
    nearest = [min(float((a - b).norm()) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    expected = -sum(map(math.log, nearest)) / len(rows)
    assert koleo_loss(features()).item() == pytest.approx(expected, rel=1e-6)
    assert koleo_loss(100 * features()).item() == pytest.approx(expected, rel=1e-6)


def test_its_gradient_pushes_features_apart_and_is_finite_for_equal_ones() -> None:
    x = (torch.ones(8, 5) + 0.01 * features()[:8].float()).requires_grad_()
    before = koleo_loss(x)
    before.backward()
    assert koleo_loss(x - 1e-3 * x.grad / x.grad.norm()) < before - 1e-3
    equal = torch.ones(4, 5, requires_grad=True)
    koleo_loss(equal).backward()
    assert equal.grad.isfinite().all()
