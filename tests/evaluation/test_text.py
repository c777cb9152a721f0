"""Loss, perplexity and bits per byte of text, by definition."""

import math

import pytest
import torch

from moa_lightning.evaluation import TextMetrics


def test_uniform_bytes_cost_eight_bits() -> None:
    metrics = TextMetrics()
    targets = torch.randint(0, 256, (3, 10))
    metrics.update(torch.full((3, 10), math.log(256)), targets, torch.ones(256, dtype=torch.int64))
    found = metrics.compute()
    assert found["loss"].item() == pytest.approx(math.log(256), rel=1e-6)
    assert found["perplexity"].item() == pytest.approx(256, rel=1e-5)
    assert found["bits_per_byte"].item() == pytest.approx(8, rel=1e-6)


def test_longer_tokens_are_divided_by_their_bytes() -> None:
    """Tokens 0, 1, 2 stand for 1, 2 and 5 bytes."""
    metrics = TextMetrics()
    nll, targets = torch.tensor([[0.5, 1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 2, 2]])
    metrics.update(nll, targets, torch.tensor([1, 2, 5]))
    found = metrics.compute()
    assert found["loss"].item() == pytest.approx(7.5 / 4)
    assert found["bits_per_byte"].item() == pytest.approx(7.5 / math.log(2) / 13)


def test_targets_that_do_not_count_are_left_out() -> None:
    metrics = TextMetrics()
    nll, targets = torch.tensor([1.0, 2.0, 999.0]), torch.tensor([3, 4, -100])
    metrics.update(nll, targets, torch.ones(5, dtype=torch.int64))
    assert metrics.compute()["loss"].item() == pytest.approx(1.5)


def test_every_token_weighs_the_same_in_batches_of_any_size() -> None:
    nll, targets, ones = torch.rand(12), torch.randint(0, 5, (12,)), torch.ones(5, dtype=torch.int64)
    whole, parts = TextMetrics(), TextMetrics()
    whole.update(nll, targets, ones)
    for part in (slice(0, 1), slice(1, 9), slice(9, 12)):
        parts.update(nll[part], targets[part], ones)
    for name, value in whole.compute().items():
        assert parts.compute()[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_small_losses_are_not_lost_in_a_large_sum() -> None:
    metrics = TextMetrics()
    ones, targets = torch.ones(5, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    metrics.update(torch.full((1000,), 1e5), targets, ones)
    metrics.update(torch.full((1000,), 1e-4), targets, ones)
    assert metrics.nll.item() - 1e8 == pytest.approx(0.1, rel=1e-3)


def test_bfloat16_losses_are_counted_like_their_values() -> None:
    metrics = TextMetrics()
    nll = torch.full((4096,), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    metrics.update(nll, torch.zeros(4096, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    assert metrics.compute()["loss"] == 1.0
