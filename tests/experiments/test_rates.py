"""Learning-rate sensitivity: basins with known optimum and edges, ends of the grid, ratios between variants."""

import math

import numpy as np
import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.rates import best_tried, lost_at, mean_over_seeds, rate_ratios, sensitivity
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
    """In decades about the lowest point: 0.6 t² - 0.4 t, lowest at t = 1/3; a decade on, 0.9 t² + 1.1 t above 1.2."""
    losses = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.2, 1e-1: 3.2}
    found = sensitivity(losses, delta=0.5)
    assert found.optimum == Measured(pytest.approx(10 ** (-3 + 1 / 3)))
    assert found.lowest == Measured(pytest.approx(10 ** (-3 + 1 / 3 - math.sqrt(0.5 / 0.6))))
    right = (math.sqrt(1.1**2 + 4 * 0.9 * (0.3 - 0.4 / 6)) - 1.1) / 1.8  # to 0.5 above the parabola's minimum
    assert found.highest == Measured(pytest.approx(10 ** (-2 + right)))
    assert found.width.value == pytest.approx(found.highest.value / found.lowest.value)
    more = sensitivity({rate: -loss for rate, loss in losses.items()}, delta=0.5, mode="max")
    assert (more.optimum, more.highest, more.best) == (found.optimum, found.highest, -1.0)


@pytest.mark.parametrize("delta", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("optimum", [4e-4, 9e-4, 2.2e-3, 8e-3])
def test_the_basin_of_a_parabola_is_exact_and_holds_the_optimum(optimum: float, delta: float) -> None:
    """Also where no tried rate but the best lies in it."""
    found, reach = sensitivity(basin(optimum), delta), math.sqrt(delta / 0.1)
    assert found.lowest.value < found.optimum.value < found.highest.value
    if found.highest.kind is Kind.EXACT:
        assert found.highest.value == pytest.approx(optimum * math.exp(reach))
    if found.lowest.kind is Kind.EXACT:
        assert found.lowest.value == pytest.approx(optimum * math.exp(-reach))


def test_a_factor_smaller_than_the_grids_step_is_seen() -> None:
    """Rates a factor 2 apart, of which the middle one is best for both, as in the grids of docs/results.md."""
    rates = (0.004, 0.008, 0.016)

    def runs(optimum: float) -> dict[float, dict[int, float]]:
        return {rate: {100: 1.8 + 0.12 * math.log(rate / optimum) ** 2} for rate in rates}

    variant, baseline = runs(0.0105), runs(0.0105 / 1.5)
    assert best_tried(variant) == best_tried(baseline) == 0.008
    for found in (ratios := rate_ratios(variant, baseline, delta=0.01)).optimum, ratios.highest:
        assert found.ratio == Measured(pytest.approx(1.5))


def test_what_is_lost_beside_the_best_rate_is_as_measured() -> None:
    losses = {0.001: {0: 3.0, 1: 3.2}, 0.002: {0: 2.0, 1: 2.1}, 0.004: {0: 2.3, 1: 2.0}, 0.008: {0: math.nan, 1: 4.0}}
    assert best_tried(losses) == 0.002
    assert lost_at(losses, 2.0) == {0: pytest.approx(0.3), 1: pytest.approx(-0.1)}
    assert lost_at(losses, 1 / 2) == {0: 1.0, 1: pytest.approx(1.1)}
    assert math.isnan(lost_at(losses, 4.0)[0])
    assert lost_at(losses, 1 / 4) is None, "not tried"
    assert lost_at(losses, 3.0) is None, "neither 2 nor 4"
    score = {rate: {seed: -loss for seed, loss in found.items()} for rate, found in losses.items()}
    assert lost_at(score, 2.0, "max") == lost_at(losses, 2.0)
    thirds = {0.001: {0: 1.0}, 0.003: {0: 0.5}, 0.01: {0: 0.7}}
    assert lost_at(thirds, 3.0) == {0: pytest.approx(0.2)}
    assert lost_at(thirds, 1 / 3) == {0: pytest.approx(0.5)}
    assert math.isnan(best_tried({0.1: {0: math.nan}, 0.2: {0: math.inf}}))
    assert lost_at({0.1: {0: math.nan}, 0.2: {0: math.inf}}, 2.0) is None


def test_ends_of_the_grid_are_bounds() -> None:
    rising = sensitivity(basin(1e-5), delta=3.0)
    assert rising.optimum == Measured(pytest.approx(1e-4), Kind.AT_MOST)
    assert rising.highest.kind is Kind.AT_MOST, "the loss may fall on the way to lower rates, and the basin with it"
    assert rising.at_edge == "the best rate is the lowest that worked: try lower ones"
    falling = sensitivity(basin(1.0), delta=0.1)
    assert falling.optimum == Measured(pytest.approx(3e-2), Kind.AT_LEAST)
    assert falling.highest == Measured(pytest.approx(3e-2), Kind.AT_LEAST)
    assert falling.lowest.kind is Kind.AT_LEAST
    assert falling.width.kind is Kind.UNKNOWN
    assert "highest that worked" in falling.at_edge
    assert sensitivity(basin(1.0), delta=10.0).lowest.kind is Kind.UNKNOWN, "all tried, yet they may all be too low"


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
