"""Numbers of seeds: against statsmodels, and simulated from the pilot to the grid's verdict."""

import math

import numpy as np
import pytest
from scipy.stats import chi2, ttest_rel
from statsmodels.stats.power import TTestPower

from moa_lightning.errors import UserError
from moa_lightning.experiments.power import (
    Pilot,
    detectable_effect,
    pilot_of_grid,
    power,
    seeds_after_pilot,
    seeds_needed,
)
from moa_lightning.experiments.statistics import holm_adjusted


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 18])
def test_power_agrees_with_statsmodels(n: int, alpha: float) -> None:
    for ratio in (0.05, 0.3, 0.8, 1.2):
        theirs = TTestPower().power(ratio, n, alpha)
        if math.isfinite(theirs):  # it is NaN at high power and small alpha
            assert power(n, -0.01 * ratio, 0.01, alpha) == pytest.approx(theirs, rel=1e-7)


def test_power_is_the_level_without_effect_and_one_at_a_huge_effect() -> None:
    assert power(5, 1e-12, 1.0, 0.01) == pytest.approx(0.01, rel=1e-9)
    assert power(40, 1000.0, 1.0) == pytest.approx(1.0, abs=1e-12)


def test_seeds_needed_is_the_first_number_that_reaches_the_power() -> None:
    for effect in (0.3, 0.9, 2.0):
        n = seeds_needed(effect, 1.0)
        assert power(n, effect, 1.0) >= 0.8 > power(n - 1, effect, 1.0)
        assert n == math.ceil(TTestPower().solve_power(effect, power=0.8, alpha=0.05))
    assert seeds_needed(0.9, 1.0, comparisons=18) == seeds_needed(0.9, 1.0, alpha=0.05 / 18)


def test_detectable_effect_is_the_inverse() -> None:
    for n in (2, 3, 8):
        effect = detectable_effect(n, 0.007)
        assert power(n, effect, 0.007) == pytest.approx(0.8, rel=1e-9)
        assert seeds_needed(effect * 1.001, 0.007) == n


def test_a_grids_pilot_is_unbiased_and_has_all_its_freedom() -> None:
    """2,000 pilots of 7 variants on 3 seeds: df · sd² / (2 · 0.008²) must be chi-square with 12 degrees of freedom."""
    generator = np.random.default_rng(1)
    scaled = []
    for _ in range(2000):
        noise = generator.normal(0, 0.008, (7, 3)) + generator.normal(0, 1, 3) + generator.normal(0, 1, (7, 1))
        pilot = pilot_of_grid({str(i): dict(enumerate(row.tolist())) for i, row in enumerate(noise)})
        assert pilot.df == 12
        scaled.append(12 * pilot.sd**2 / (2 * 0.008**2))
    assert np.mean(scaled) == pytest.approx(12, rel=0.03)
    assert np.var(scaled) == pytest.approx(24, rel=0.15)


@pytest.mark.parametrize("df", [2, 12])
@pytest.mark.parametrize(("effect", "comparisons"), [(0.7, 1), (1.5, 18)])
def test_seeds_after_a_pilot_keep_the_promised_power(df: int, effect: float, comparisons: int) -> None:
    """Over 100 evenly spread outcomes of the pilot, the exact power of the grids planned by them; the rule that takes
    the pilot at its word falls short."""
    outcomes = np.sqrt(chi2.ppf((np.arange(100) + 0.5) / 100, df) / df)

    def mean_power(seeds: list[int]) -> float:
        return float(np.mean([power(n, effect, 1.0, 0.05 / comparisons) for n in seeds]))

    assured = [seeds_after_pilot(effect, Pilot(sd, df), comparisons=comparisons) for sd in outcomes]
    trusting = [seeds_needed(effect, sd, comparisons=comparisons) for sd in outcomes]
    assert 0.795 <= mean_power(assured) < 0.88
    assert mean_power(trusting) < (0.72 if df == 2 else 0.79)


def test_from_pilot_to_seeds_to_grid() -> None:
    """A variant of seven is better in one of three tasks; the share of grids in which its family's verdict says so."""
    generator = np.random.default_rng(2)
    effect, sd = 0.012, 0.006  # of one run: a difference has sqrt(2) times that

    def grid(seeds: int, grids: int) -> np.ndarray:
        start = generator.normal(0, 0.02, (grids, 3, 1, seeds))
        metrics = start + generator.normal(0, sd, (grids, 3, 7, seeds))
        metrics[:, 0, 3] -= effect
        return metrics

    found, sizes = [], []
    for pilot in grid(3, 150):
        by_variant = {str(i): dict(enumerate(row.tolist())) for i, row in enumerate(pilot[0])}
        n = seeds_after_pilot(effect, pilot_of_grid(by_variant), comparisons=18)
        metrics = grid(n, 60)
        p = holm_adjusted(ttest_rel(metrics[:, :, 1:], metrics[:, :, :1], axis=-1).pvalue.reshape(60, 18))
        difference = (metrics[:, 0, 3] - metrics[:, 0, 0]).mean(-1)
        found.append(((p[:, 2] <= 0.05) & (difference < 0)).mean())
        sizes.append(n)
    assert 0.78 < np.mean(found) < 0.93  # standard error 1.5 points; Holm finds a little more than Bonferroni
    assert 10 <= np.median(sizes) <= 16


@pytest.mark.parametrize(("effect", "sd"), [(0.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1e-6, 1.0)])
def test_what_cannot_be_planned_is_said(effect: float, sd: float) -> None:
    with pytest.raises(UserError):
        seeds_needed(effect, sd)


def test_a_pilot_needs_two_variants_and_two_seeds() -> None:
    for runs in (
        {},
        {"a": {0: 1.0, 1: 2.0}},
        {"a": {0: 1.0}, "b": {0: 2.0}},
        {"a": {0: 1.0, 1: math.nan}} | {"b": {0: 1, 1: 2}},
    ):
        with pytest.raises(UserError, match="a pilot needs"):
            pilot_of_grid(runs)
