"""Paired comparison: against scipy's paired t-test on random data, and its false claims on data without an effect."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from moa_lightning.experiments.statistics import compare


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_agrees_with_scipy(n: int, confidence: float) -> None:
    generator = np.random.default_rng(n)
    for _ in range(50):
        baseline = generator.normal(1.2, 0.02, n)
        variant = baseline + generator.normal(-0.01, 0.01, n)
        ours = compare(by_seed(variant), by_seed(baseline), "min", confidence)
        theirs = ttest_rel(variant, baseline)
        interval = theirs.confidence_interval(confidence)
        assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-12)
        assert (ours.verdict == "no difference shown") == (theirs.pvalue > 1 - confidence)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_claims_a_difference_in_five_percent_of_null_data(n: int) -> None:
    """4,000 grids in which the variant does nothing: the rate of claims has a standard error of 0.34 points."""
    generator = np.random.default_rng(0)
    claims = 0
    for _ in range(4000):
        start = generator.normal(0, 0.02, n)  # what the seed does to both
        variant, baseline = start + generator.normal(0, 0.008, n), start + generator.normal(0, 0.008, n)
        claims += compare(by_seed(variant), by_seed(baseline), "min").verdict != "no difference shown"
    assert 0.04 < claims / 4000 < 0.06


def test_pairs_by_seed_not_by_position() -> None:
    baseline = {0: 1.0, 1: 2.0, 2: 3.0, 7: 100.0}
    variant = {2: 3.1, 1: 2.2, 0: 1.3, 9: -100.0}
    paired = compare(variant, baseline, "min")
    assert paired.n == 3
    assert paired.mean == pytest.approx(0.2)
    assert paired.sd == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("mode", "shift", "word"), [("min", -1, "better"), ("min", 1, "worse"), ("max", -1, "worse"), ("max", 1, "better")]
)
def test_direction_of_the_metric_decides_the_word(mode: str, shift: float, word: str) -> None:
    variant = {0: shift + 0.01, 1: shift - 0.01, 2: shift + 0.02}
    assert compare(variant, {0: 0.0, 1: 0.0, 2: 0.0}, mode).verdict == word


def test_one_seed_has_no_interval() -> None:
    paired = compare({3: 1.0}, {3: 1.5}, "min")
    assert (paired.n, paired.mean, paired.verdict) == (1, -0.5, "one seed: no interval")
    assert math.isnan(paired.low)
    assert math.isnan(paired.p)


def test_no_common_seed() -> None:
    assert compare({1: 1.0}, {2: 1.0}, "min").verdict == "no seed in common"


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_diverged_run_is_named_not_averaged(lost: float) -> None:
    paired = compare({0: 1.0, 1: lost, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 2.5}, "min")
    assert paired.verdict == "not finite on 1 of 3 seeds"
    assert math.isnan(paired.mean)


def test_a_variant_without_effect_shows_no_difference() -> None:
    same = {0: 1.25, 1: 1.5}
    paired = compare(same, same, "min")
    assert (paired.mean, paired.low, paired.high, paired.p) == (0, 0, 0, 1)
    assert paired.verdict == "no difference shown"
