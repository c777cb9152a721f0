"""Learning-rate sensitivity: basins with known optimum and edges, ends of the grid, ratios between variants."""

import math

import numpy as np
import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.rates import mean_over_seeds, rate_ratios, sensitivity
from moa_lightning.experiments.ratios import Kind, Measured

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def basin(optimum: float, curvature: float = 0.1, floor: float = 1.0) -> dict[float, float]:
    """A parabola over the natural logarithm of the rate."""
    return {rate: floor + curvature * math.log(rate / optimum) ** 2 for rate in RATES}


@pytest.mark.parametrize("optimum", [4e-4, 1e-3, 2.2e-3, 8e-3])
def test_the_optimum_of_a_parabola_is_exact(optimum: float) -> None:
    found = sensitivity(basin(optimum), delta=0.1)
    assert found.optimum == Measured(pytest.approx(optimum))
    assert found.at_edge == ""


def test_the_basin_ends_where_the_interpolated_loss_leaves_it() -> None:
    losses = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.2, 1e-1: 3.2}
    found = sensitivity(losses, delta=0.5)
    assert found.lowest == Measured(pytest.approx(10**-3.5))  # half of the way up to 2.0
    assert found.highest == Measured(pytest.approx(10 ** (-2 + 0.3 / 2.0)))
    assert found.width == Measured(pytest.approx(10 ** (-2 + 0.15 + 3.5)))
    more = sensitivity({rate: -loss for rate, loss in losses.items()}, delta=0.5, mode="max")
    assert (more.optimum, more.highest, more.best) == (found.optimum, found.highest, -1.0)


def test_ends_of_the_grid_are_bounds() -> None:
    rising = sensitivity(basin(1e-5), delta=3.0)
    assert rising.optimum == Measured(pytest.approx(1e-4), Kind.AT_MOST)
    assert rising.at_edge == "the best rate is the lowest that worked: try lower ones"
    falling = sensitivity(basin(1.0), delta=0.1)
    assert falling.optimum == Measured(pytest.approx(3e-2), Kind.AT_LEAST)
    assert falling.highest == Measured(pytest.approx(3e-2), Kind.AT_LEAST)
    assert falling.width.kind is Kind.AT_LEAST
    assert "highest that worked" in falling.at_edge


def test_what_lies_between_a_rate_that_worked_and_one_that_diverged_is_not_known() -> None:
    found = sensitivity(basin(1e-3) | {1e-2: math.nan, 3e-2: math.inf}, delta=10.0)
    assert found.highest == Measured(pytest.approx(3e-3), Kind.AT_LEAST)
    assert sensitivity(dict.fromkeys(RATES, math.nan), delta=0.1).optimum.kind is Kind.UNKNOWN
    last = sensitivity({1e-3: 1.0, 1e-2: 0.9, 1e-1: math.nan}, delta=0.2)
    assert last.optimum == Measured(pytest.approx(1e-2), Kind.AT_LEAST)
    assert "try higher ones" in last.at_edge
    alone = sensitivity({1e-3: math.nan, 1e-2: 0.9, 1e-1: math.nan}, delta=0.2)
    assert alone.optimum.kind is Kind.UNKNOWN


def test_equal_ratios_of_a_coarse_grid_make_no_interval() -> None:
    """Two seeds at whose best rates the losses of both sides are mirror images: the same ratio to the bit."""
    variant = {rate: {0: loss, 1: loss} for rate, loss in basin(3e-3).items()}
    baseline = {rate: {0: loss, 1: loss} for rate, loss in basin(1e-3).items()}
    found = rate_ratios(variant, baseline, delta=0.1).optimum
    assert found.words == "the same ratio on all 2 seeds: no interval"
    assert found.ratio == Measured(pytest.approx(3.0))
    assert math.isnan(found.low)


def test_ratios_between_variants_are_recovered() -> None:
    """Six seeds, the variant's best rate 1.7 times the baseline's; both scatter."""
    generator = np.random.default_rng(0)
    shifts = np.exp(generator.normal(0, 0.05, (2, 6)))

    def runs(optimum: float, shifts: np.ndarray) -> dict[float, dict[int, float]]:
        curves = [basin(optimum * shift) for shift in shifts]
        return {rate: {seed: curve[rate] for seed, curve in enumerate(curves)} for rate in RATES}

    found = rate_ratios(runs(1.7e-3, shifts[0]), runs(1e-3, shifts[1]), delta=0.15)
    assert found.optimum.low < 1.7 < found.optimum.high
    assert found.optimum.words == "larger"
    assert found.highest.low < 1.7 < found.highest.high
    assert found.width.low < 1.0 < found.width.high


def test_a_ratio_of_optima_at_the_grids_end_is_a_bound() -> None:
    variant = {rate: {0: loss, 1: loss} for rate, loss in basin(1.0).items()}
    baseline = {rate: {0: loss, 1: loss} for rate, loss in basin(1e-3).items()}
    found = rate_ratios(variant, baseline, delta=0.1).optimum
    assert found.ratio == Measured(pytest.approx(30.0), Kind.AT_LEAST)
    assert math.isnan(found.low)


def test_means_need_the_same_seeds_at_every_rate() -> None:
    assert mean_over_seeds({1e-3: {0: 1.0, 1: 3.0}, 1e-2: {0: 2.0, 1: math.inf}}) == {1e-3: 2.0, 1e-2: math.inf}
    with pytest.raises(UserError, match="different seeds"):
        mean_over_seeds({1e-3: {0: 1.0}, 1e-2: {1: 2.0}})


@pytest.mark.parametrize(
    ("losses", "delta"), [({1e-3: 1.0, 1e-2: 1.0}, 0.1), (basin(1e-3), 0.0), ({0.0: 1.0} | basin(1), 0.1)]
)
def test_what_cannot_be_judged_is_said(losses: dict[float, float], delta: float) -> None:
    with pytest.raises(UserError, match="three rates above 0 or more"):
        sensitivity(losses, delta)
