"""Scaling fits: against scipy's optimiser, planted parameters, and the simulated coverage of the intervals."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from moa_lightning.errors import UserError
from moa_lightning.experiments.ratios import Kind
from moa_lightning.experiments.scaling import fit_scaling, multipliers

SIZES = (1e5, 3e5, 1e6, 3e6)
FLOOR, SCALE, EXPONENT = 1.2, 30.0, 0.25


def runs(noise: np.ndarray, scale: float = SCALE, sizes: tuple[float, ...] = SIZES) -> dict[float, dict[int, float]]:
    """Losses with noise (sizes, seeds)."""
    return {
        size: {seed: FLOOR + scale * size**-EXPONENT + value for seed, value in enumerate(row)}
        for size, row in zip(sizes, noise.tolist(), strict=True)
    }


def shared_noise(generator: np.random.Generator, seeds: int, sd: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Of two variants, with a correlation of one half."""
    common, one, two = generator.normal(0, sd / math.sqrt(2), (3, len(SIZES), seeds))
    return common + one, common + two


def test_planted_parameters_come_back_exactly_without_noise() -> None:
    fit = fit_scaling(runs(np.zeros((4, 2))), resamples=20)
    assert fit.floor.value == pytest.approx(FLOOR, rel=1e-5)
    assert fit.scale.value == pytest.approx(SCALE, rel=1e-4)
    assert fit.exponent.value == pytest.approx(EXPONENT, rel=1e-5)
    assert fit.predict(1e7) == pytest.approx(FLOOR + SCALE * 1e7**-EXPONENT, rel=1e-6)
    assert (fit.sizes, fit.runs, fit.warnings) == (SIZES, 8, ())


def test_agrees_with_scipys_least_squares() -> None:
    for seed in range(5):
        data = runs(np.random.default_rng(seed).normal(0, 0.01, (4, 3)))
        x = np.repeat(SIZES, 3) / SIZES[0]
        y = [loss for found in data.values() for loss in found.values()]
        best, _ = curve_fit(lambda x, e, a, b: e + a * x**-b, x, y, p0=(1, 1, 0.3), bounds=(0, [10, 10, 3]), xtol=1e-14)
        fit = fit_scaling(data, resamples=10)
        assert (fit.floor.value, fit.exponent.value) == (
            pytest.approx(best[0], rel=1e-4),
            pytest.approx(best[2], rel=1e-4),
        )
        assert fit.scale.value * SIZES[0] ** -fit.exponent.value == pytest.approx(best[1], rel=1e-4)


def test_a_floor_below_zero_is_not_fitted() -> None:
    data = {size: {seed: 5.0 - 0.4 * math.log10(size) + 0.001 * seed for seed in range(2)} for size in SIZES}
    fit = fit_scaling(data, resamples=50)
    assert fit.floor.value == 0
    assert fit.warnings == ("the floor is at 0: these sizes show no floor",)


def test_losses_that_rise_with_size_are_named() -> None:
    fit = fit_scaling({size: {0: 1.0 + i, 1: 1.1 + i} for i, size in enumerate(SIZES)}, resamples=50)
    assert "the losses do not fall with size: no power law" in fit.warnings


def test_intervals_cover_planted_parameters_and_multipliers() -> None:
    """120 studies of 4 sizes × 3 seeds; standard error of a coverage of 95 %: 2 points."""
    generator = np.random.default_rng(0)
    hits = np.zeros(5)
    for _ in range(120):
        one, two = shared_noise(generator, 3)
        baseline, variant = runs(one), runs(two, SCALE * 1.3**-EXPONENT)
        fit = fit_scaling(baseline, resamples=200)
        found = multipliers(variant, baseline, (SIZES[0], SIZES[-1]), resamples=200)
        truths = [(fit.floor, FLOOR), (fit.scale, SCALE), (fit.exponent, EXPONENT), *((m, 1.3) for m in found)]
        hits += [interval.low <= truth <= interval.high for interval, truth in truths]
    assert (hits / 120 > 0.895).all()
    assert (hits / 120 < 0.999).any()


def test_multipliers_use_that_seeds_are_shared() -> None:
    """Noise that both variants have alike leaves the gap sharp."""
    noise = np.random.default_rng(1).normal(0, 0.01, (4, 3))
    apart = np.random.default_rng(2).normal(0, 0.01, (4, 3))
    variant, baseline = runs(noise + 0.01 * apart, SCALE * 1.3**-EXPONENT), runs(noise)
    shared = multipliers(variant, baseline, resamples=300)
    alone = multipliers(runs(apart, SCALE * 1.3**-EXPONENT), baseline, resamples=300)
    for sharp, wide in zip(shared, alone, strict=True):
        assert sharp.multiplier.value == pytest.approx(1.3, rel=0.02)
        assert sharp.high - sharp.low < 0.4 * (wide.high - wide.low)
    # inside the sizes hardly anything but the gap is left
    assert shared[1].high - shared[1].low < 0.2 * (alone[1].high - alone[1].low)
    assert [m.size for m in shared] == list(SIZES)
    assert [m.extrapolated for m in shared] == [False, False, False, True]


def test_a_variant_below_the_baselines_floor_has_a_bound() -> None:
    baseline = runs(np.random.default_rng(0).normal(0, 0.002, (4, 3)))
    variant = {size: {seed: loss - 0.8 for seed, loss in found.items()} for size, found in baseline.items()}
    last = multipliers(variant, baseline, resamples=200)[-1]
    assert last.multiplier.kind is Kind.AT_LEAST
    assert last.high == math.inf
    assert last.extrapolated


def test_too_few_sizes_and_failed_runs_are_refused() -> None:
    three = {size: {0: 1.0, 1: 1.1} for size in SIZES[:3]}
    with pytest.raises(UserError, match="needs 4 sizes and 5 runs or more; got 3 sizes and 6 runs"):
        fit_scaling(three)
    with pytest.raises(UserError, match="got 4 sizes and 4 runs"):
        fit_scaling({size: {0: 1.0} for size in SIZES})
    with pytest.raises(UserError, match="finite losses"):
        fit_scaling(runs(np.full((4, 2), math.nan)))
