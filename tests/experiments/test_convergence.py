"""Curves, times to a target and speed-ups: hand-made curves with known crossings, and planted speed-ups."""

import math
from pathlib import Path

import numpy as np
import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.convergence import final_by_seed, final_mean, speed_ups, time_to_target
from moa_lightning.experiments.ratios import UNKNOWN, Kind, Measured, over, ratio_over_seeds
from moa_lightning.experiments.traces import Trace, band, read_trace


def trace(values: list[float], seconds_per_step: float = 0.5, tokens: bool = True) -> Trace:
    """Measured every 10 steps from step 10; 8 samples, 80 tokens and 1000 FLOPs a step."""
    steps = 10.0 * np.arange(1, len(values) + 1)
    axes = {"steps": steps, "samples": 8 * steps, "flops": 1000 * steps, "seconds": seconds_per_step * steps}
    return Trace(np.array(values), axes | ({"tokens": 80 * steps} if tokens else {}))


def decay(rate: float, noise: float = 0.0, seconds_per_step: float = 0.5, generator=None) -> Trace:
    """exp(-rate · step), sampled on 40 points."""
    values = np.exp(-rate * 10.0 * np.arange(1, 41))
    return trace((values * np.exp(0 if generator is None else generator.normal(0, noise))).tolist(), seconds_per_step)


def test_reads_the_axes_that_a_run_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,samples,tokens,flops,seconds,train/loss,val/loss\n"
        "5,40,,5000.0,1.5,0.9,\n"
        "10,80,,10000.0,3.0,,0.8\n"
        "20,160,,20000.0,6.5,,0.7\n"
        "20,160,,20000.0,6.6,,0.6\n"
    )
    read = read_trace(path, "val/loss")
    assert read.values.tolist() == [0.8, 0.6]
    assert {name: counts.tolist() for name, counts in read.axes.items()} == {
        "steps": [10, 20],
        "samples": [80, 160],
        "flops": [10_000, 20_000],
        "seconds": [3.0, 6.6],
    }
    with pytest.raises(UserError, match="counted steps, samples, flops, seconds"):
        read.axis("tokens")
    for missing in (tmp_path / "none.csv", path):
        with pytest.raises(UserError, match="cannot read the curve of accuracy"):
            read_trace(missing, "accuracy")


def test_a_band_on_equal_counts_keeps_them() -> None:
    joined = band({0: trace([3.0, 2.0]), 4: trace([5.0, 2.5])}, "steps")
    assert joined.x.tolist() == [10, 20]
    assert (joined.mean.tolist(), joined.low.tolist(), joined.high.tolist()) == ([4, 2.25], [3, 2], [5, 2.5])
    assert joined.whole


def test_a_band_on_seconds_covers_what_all_seeds_cover() -> None:
    """The slow seed begins at 10 s, the quick one ends at 15 s; both fall linearly."""
    quick, slow = trace([3.0, 2.0, 1.0], 0.5), trace([3.0, 2.0, 1.0], 1.0)
    joined = band({0: quick, 1: slow}, "seconds", points=6)
    assert (joined.x[0], joined.x[-1]) == (10, 15)
    assert not joined.whole, "the slow seed goes on"
    assert band({1: slow}, "seconds").whole
    assert joined.mean == pytest.approx((np.interp(joined.x, [5, 10, 15], [3, 2, 1]) + 3 - (joined.x - 10) / 10) / 2)
    with pytest.raises(UserError, match="no range of seconds"):
        band({0: quick, 1: trace([3.0, 2.0], 10.0)}, "seconds")


def test_time_to_target_interpolates_the_best_so_far() -> None:
    curve = trace([4.0, 2.0, 3.0, 1.0])
    assert time_to_target(curve, 3.0, "steps", "min") == Measured(15.0)
    assert time_to_target(curve, 3.0, "seconds", "min") == Measured(7.5)
    assert time_to_target(curve, 1.5, "steps", "min") == Measured(35.0)  # from the best so far, 2, not from 3
    assert time_to_target(curve, 2.0, "flops", "min") == Measured(20_000.0)
    assert time_to_target(trace([0.1, 0.5, 0.4, 0.9]), 0.7, "steps", "max") == Measured(35.0)


def test_what_is_not_seen_of_a_time_is_a_bound() -> None:
    curve = trace([4.0, 2.0])
    assert time_to_target(curve, 1.0, "steps", "min") == Measured(20.0, Kind.AT_LEAST)
    assert time_to_target(curve, 5.0, "steps", "min") == Measured(10.0, Kind.AT_MOST)
    assert time_to_target(trace([math.nan, math.nan]), 1.0, "steps", "min") == Measured(20.0, Kind.AT_LEAST)
    assert time_to_target(trace([math.nan, 0.5]), 1.0, "steps", "min") == Measured(20.0)
    assert time_to_target(curve, math.nan, "steps", "min").kind is Kind.UNKNOWN


@pytest.mark.parametrize(
    ("top", "bottom", "kind"),
    [
        (Kind.EXACT, Kind.EXACT, Kind.EXACT),
        (Kind.AT_LEAST, Kind.EXACT, Kind.AT_LEAST),
        (Kind.EXACT, Kind.AT_LEAST, Kind.AT_MOST),
        (Kind.AT_LEAST, Kind.AT_MOST, Kind.AT_LEAST),
        (Kind.AT_LEAST, Kind.AT_LEAST, Kind.UNKNOWN),
        (Kind.AT_MOST, Kind.AT_LEAST, Kind.AT_MOST),
        (Kind.UNKNOWN, Kind.EXACT, Kind.UNKNOWN),
    ],
)
def test_bounds_are_carried_into_ratios(top: Kind, bottom: Kind, kind: Kind) -> None:
    assert over(Measured(6.0, top), Measured(2.0, bottom)).kind is kind


def test_a_curve_that_starts_at_its_target_has_no_ratio() -> None:
    start = time_to_target(Trace(np.array([1.0, 0.5]), {"steps": np.array([0.0, 10.0])}), 1.0, "steps", "min")
    assert start == Measured(0.0)
    assert over(start, Measured(5.0)) == over(Measured(5.0), start) == UNKNOWN
    assert ratio_over_seeds({0: start}, {0: Measured(5.0)}).ratio == UNKNOWN


def test_a_ratio_is_the_t_interval_of_logs() -> None:
    """Log ratios 0, log 2, log 4: mean log 2, standard error log 2 / sqrt(3), t of 2 degrees of freedom 4.302653."""
    found = ratio_over_seeds({s: Measured(2.0**s) for s in range(3)}, {s: Measured(1.0) for s in range(4)})
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert found.ratio == Measured(pytest.approx(2.0))
    assert (found.n, found.low, found.high) == (3, pytest.approx(2 / math.exp(half)), pytest.approx(2 * math.exp(half)))
    assert found.words == "no difference shown"


def test_a_ratio_with_bounds_is_a_bound_without_interval() -> None:
    top = {0: Measured(2.0), 1: Measured(8.0, Kind.AT_LEAST)}
    found = ratio_over_seeds(top, dict.fromkeys(range(2), Measured(1.0)))
    assert found.ratio == Measured(pytest.approx(4.0), Kind.AT_LEAST)
    assert math.isnan(found.low)
    assert found.words == "at least 4: a bound on 1 of 2 seeds, so no interval"
    mixed = ratio_over_seeds(top | {0: Measured(2.0, Kind.AT_MOST)}, dict.fromkeys(range(2), Measured(1.0)))
    assert (mixed.ratio.kind, mixed.inexact) == (Kind.UNKNOWN, 2)


def test_a_planted_speed_up_is_found_on_every_axis() -> None:
    """Twice the rate of decay at 1.25 times the seconds a step: 2 in steps, samples, tokens and FLOPs, 1.6 in time."""
    baseline = {seed: decay(0.010 + 0.001 * seed) for seed in range(4)}
    variant = {seed: decay(0.020 + 0.002 * seed, seconds_per_step=0.625) for seed in range(4)}
    found = speed_ups(variant, baseline, "min", targets=0.1)
    assert set(found) == {"steps", "samples", "tokens", "flops", "seconds"}
    for axis, speed_up in found.items():
        assert speed_up.speed_up.ratio.value == pytest.approx(1.6 if axis == "seconds" else 2.0, rel=0.01)
        assert speed_up.speed_up.words == "larger"
        assert (speed_up.reached, speed_up.baseline_reached) == (4, 4)


def test_intervals_of_a_speed_up_cover_the_truth() -> None:
    """500 grids of 5 seeds whose times to the target scatter by 5 %; standard error of the coverage 1 point."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        shared = generator.normal(0, 0.2, 5)
        rates = 0.015 * np.exp(shared + generator.normal(0, 0.05, (2, 5)))
        baseline = {seed: decay(rate) for seed, rate in enumerate(rates[0])}
        variant = {seed: decay(1.3 * rate) for seed, rate in enumerate(rates[1])}
        ratio = speed_ups(variant, baseline, "min", targets=0.3)["steps"].speed_up
        covered.append(ratio.low <= 1.3 <= ratio.high)
    assert 0.92 < np.mean(covered) < 0.98


def test_the_default_target_leaves_bounds_and_targets_by_seed_do_not() -> None:
    """A baseline seed above the mean never reaches it; its own final value it does, at the end."""
    baseline = {0: decay(0.010), 1: decay(0.012)}
    variant = {0: decay(0.015), 1: decay(0.018)}
    by_mean = speed_ups(variant, baseline, "min")["steps"]
    assert final_mean(baseline) == pytest.approx((math.exp(-4) + math.exp(-4.8)) / 2)
    assert (by_mean.baseline_reached, by_mean.reached) == (1, 2)
    assert by_mean.speed_up.ratio.kind is Kind.AT_LEAST
    by_seed = speed_ups(variant, baseline, "min", targets=final_by_seed(baseline))["steps"]
    assert (by_seed.baseline_reached, by_seed.speed_up.inexact) == (2, 0)
    assert by_seed.speed_up.ratio.value == pytest.approx(1.5, rel=0.01)


def test_a_diverged_baseline_gives_no_target_and_a_diverged_variant_a_bound() -> None:
    good, bad = {0: decay(0.01), 1: decay(0.01)}, {0: decay(0.01), 1: trace([math.nan] * 40)}
    assert speed_ups(good, bad, "min")["steps"].speed_up.ratio.kind is Kind.UNKNOWN
    found = speed_ups(bad, good, "min")["steps"]
    assert (found.reached, found.seeds) == (1, 2)
    assert found.speed_up.ratio == Measured(pytest.approx(1.0), Kind.AT_MOST)


def test_an_axis_that_one_run_lacks_is_left_out() -> None:
    found = speed_ups({0: trace([2.0, 1.0], tokens=False)}, {0: trace([2.0, 1.0])}, "min")
    assert "tokens" not in found
    assert "samples" in found
