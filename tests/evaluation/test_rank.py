"""Feature rank and spread of features whose answer is known."""

import pytest
import torch

from moa_lightning.evaluation import FeatureSpectrum, feature_rank, feature_spread


def test_the_rank_counts_equal_singular_values() -> None:
    for rank in (1, 3, 8):
        rows = torch.zeros(40, 8)
        rows[torch.arange(40), torch.arange(40) % rank] = 40.0 / (40 // rank) ** 0.5
        counts = torch.bincount(torch.arange(40) % rank, minlength=rank)
        rows = rows / counts.sqrt()[torch.arange(40) % rank, None]
        assert float(feature_rank(rows)) == pytest.approx(rank, rel=1e-4)


def test_the_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    values = torch.tensor([5.0, 3.0, 2.0])
    left = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))[0]
    p = values / 10
    expected = float(torch.exp(-(p * p.log()).sum()))
    assert float(feature_rank(left * values)) == pytest.approx(expected, rel=1e-4)
    assert float(feature_rank(torch.zeros(4, 3))) == pytest.approx(1.0, rel=1e-4)
    assert feature_rank(torch.full((4, 3), torch.inf)).isnan()


def test_the_spread_is_the_share_of_energy_between_images() -> None:
    assert float(feature_spread(torch.ones(6, 4))) == pytest.approx(0.0, abs=1e-6)
    centred = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(feature_spread(centred)) == pytest.approx(1.0)
    assert float(feature_spread(centred + torch.tensor([0.0, 2.0]))) == pytest.approx(1 / 5)


def test_batches_and_processes_may_divide_the_features_anyhow() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9, 5, 3, 1, 0.1, 0]) + 0.5
    whole = {"feature_rank": feature_rank(features), "feature_spread": feature_spread(features)}
    for sizes in ([50], [0, 20, 30], [1] * 50):
        spectrum = FeatureSpectrum()
        for part in features.split(sizes):
            spectrum.update(part)
        found = spectrum.compute()
        assert {name: float(value) for name, value in found.items()} == pytest.approx(
            {name: float(value) for name, value in whole.items()}, rel=1e-5
        )
    assert FeatureSpectrum().compute() == {}
    spectrum.update(torch.full((2, 6), torch.nan))
    assert all(value.isnan() for value in spectrum.compute().values())
