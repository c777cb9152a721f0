"""Paired comparison and families of claims: against scipy and statsmodels, and false claims where nothing differs."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.stats.multitest import multipletests

from moa_lightning.errors import UserError
from moa_lightning.experiments.statistics import (
    bootstrap_interval,
    compare,
    compare_weighted,
    holm,
    holm_adjusted,
    judge_family,
    speed_run,
)


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


def test_as_many_more_images_on_all_seeds_are_no_spread() -> None:
    """Accuracies of counts out of 750 as float32 percentages: equal differences, but for their rounding."""
    counts = np.array([641, 655, 662])
    baseline, variant = (by_seed(np.float32(100) * (counts + more) / np.float32(750)) for more in (0, 3))
    raw = np.array(list(variant.values())) - np.array(list(baseline.values()))
    assert raw.std() > 0
    judged = judge_family({"a": compare(variant, baseline, "max")}, {"a": "max"})["a"]
    assert judged.verdict == "the same difference on all 3 seeds: no interval"
    assert judged.paired.mean == pytest.approx(0.4, rel=1e-4)
    same = {seed: value * (1 + 1e-8) for seed, value in baseline.items()}
    assert compare(same, baseline, "max").verdict == "no difference shown"


@pytest.mark.parametrize(("seeds", "sd"), [(2, 0.3), (3, 0.1), (3, 0.3), (5, 0.1)])
def test_coarse_metrics_claim_nothing_by_ties(seeds: int, sd: float) -> None:
    """Accuracies of 750 images move in steps of 0.133 points; 42 null comparisons a family, runs of such an sd. Seeds
    that tie by chance came to p = 0, and to a false claim in 26 % of these families (3 seeds, sd 0.3)."""
    generator = np.random.default_rng(seeds)
    false = ties = 0
    for _ in range(60):
        counts = np.round(7.5 * generator.normal(70, sd, (6, 8, seeds)))
        points = np.float32(100) * counts.astype(np.float32) / np.float32(750)
        points *= 1 + generator.uniform(-2e-6, 2e-6, points.shape)  # as a mean over many batches is rounded
        pairs = {
            (task, variant): compare(by_seed(points[task, variant]), by_seed(points[task, 0]), "max")
            for task in range(6)
            for variant in range(1, 8)
        }
        false += any(p <= 0.05 for p in holm({name: paired.p for name, paired in pairs.items()}).values())
        claimed = {found.verdict for found in judge_family(pairs, dict.fromkeys(pairs, "max")).values()}
        false += bool(claimed & {"better", "worse"})
        ties += any(paired.sd == 0 and paired.mean != 0 for paired in pairs.values())
        assert all(math.isnan(p.p) and "same difference" in p.verdict for p in pairs.values() if p.sd == 0 and p.mean)
    assert ties > (0 if seeds == 5 else 10)
    assert false <= 60 * 0.05


def test_differences_of_differences_by_hand() -> None:
    """(a - b) - (c - d) is 0.1, 0.2 and 0.3; a rounding of its four large terms is no spread."""
    a, b = {0: 1.4, 1: 1.5, 2: 1.6}, {0: 1.1, 1: 1.1, 2: 1.1}
    c, d = {0: 2.2, 1: 2.2, 2: 2.2, 3: 9.0}, {0: 2.0, 1: 2.0, 2: 2.0}
    paired = compare_weighted(((1, a), (-1, b), (-1, c), (1, d)), "max")
    expected = ttest_1samp([0.1, 0.2, 0.3], 0)
    assert (paired.n, paired.mean, paired.p) == (3, pytest.approx(0.2), pytest.approx(expected.pvalue))
    rounded = {seed: 1.4 + 1e-6 * seed for seed in range(3)}
    assert "same difference" in compare_weighted(((1, rounded), (-1, b), (-1, c), (1, d)), "max").verdict


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


@pytest.mark.parametrize("m", [1, 2, 5, 18])
def test_holm_agrees_with_statsmodels(m: int) -> None:
    generator = np.random.default_rng(m)
    for _ in range(3):  # statsmodels takes a tenth of a second each
        p = generator.random(m) ** 3
        ours = holm({f"claim {i}": value for i, value in enumerate(p.tolist())})
        reject, adjusted, *_ = multipletests(p, 0.05, "holm")
        assert list(ours.values()) == pytest.approx(adjusted, rel=1e-12)
        assert [value <= 0.05 for value in ours.values()] == reject.tolist()


def test_a_comparison_without_p_value_counts_in_its_family() -> None:
    """0.02 would stand alone and in a family of two; with a third claim, of which a run diverged, it does not."""
    adjusted = holm({"a": 0.02, "b": 0.9, "diverged": math.nan})
    assert adjusted["a"] == pytest.approx(0.06)
    assert math.isnan(adjusted["diverged"])


def null_grid(generator: np.random.Generator, grids: int, seeds: int) -> np.ndarray:
    """Metrics (grids, tasks, variants, seeds) of 7 variants that do not differ: a seed moves all of them alike."""
    start = generator.normal(0, 0.02, (grids, 3, 1, seeds))
    return start + generator.normal(0, 0.008, (grids, 3, 7, seeds))


def adjusted_p(metrics: np.ndarray) -> np.ndarray:
    """Variants 1 to 6 against variant 0 in all three tasks as one family: (grids, 18)."""
    p = ttest_rel(metrics[:, :, 1:], metrics[:, :, :1], axis=-1).pvalue
    return holm_adjusted(p.reshape(len(metrics), -1))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_families_claim_anything_falsely_in_at_most_five_percent_of_null_grids(seeds: int) -> None:
    """20,000 grids: the standard error of a rate of 5 % is 0.15 points."""
    metrics = null_grid(np.random.default_rng(seeds), 20_000, seeds)
    family_wise = (adjusted_p(metrics) <= 0.05).any(-1).mean()
    alone = (ttest_rel(metrics[:, :, 1:], metrics[:, :, :1], axis=-1).pvalue <= 0.05).any((-1, -2)).mean()
    assert 0.025 < family_wise < 0.055
    assert alone > 0.3  # what each comparison on its own would have claimed


def test_judged_families_are_the_ones_simulated() -> None:
    """compare and judge_family, called as a grid's table calls them, give the verdicts of the arrays above."""
    metrics = null_grid(np.random.default_rng(1), 60, 5)
    metrics[30:, :, 2] -= 0.03  # one variant better everywhere, so that both verdicts occur
    expected = adjusted_p(metrics).reshape(60, 3, 6)
    for grid, wanted in zip(metrics, expected, strict=True):
        pairs = {
            (task, variant): compare(by_seed(grid[task, variant]), by_seed(grid[task, 0]), "min")
            for task in range(3)
            for variant in range(1, 7)
        }
        judged = judge_family(pairs, dict.fromkeys(pairs, "min"))
        for (task, variant), found in judged.items():
            p, difference = wanted[task, variant - 1], pairs[task, variant].mean
            assert found.p_adjusted == pytest.approx(p, rel=1e-9)
            assert found.verdict == ("no difference shown" if p > 0.05 else "better" if difference < 0 else "worse")
    assert (expected[30:, :, 1] <= 0.05).mean() > 0.5


def test_a_family_names_the_comparisons_without_interval_and_reads_each_metric_its_own_way() -> None:
    better = {seed: 1.0 + 0.001 * seed for seed in range(5)}
    pairs = {
        "loss": compare(better, dict.fromkeys(range(5), 2.0), "min"),
        "accuracy": compare(better, dict.fromkeys(range(5), 2.0), "max"),
        "one seed": compare({0: 1.0}, {0: 2.0}, "min"),
        "diverged": compare({0: 1.0, 1: math.nan}, {0: 2.0, 1: 2.0}, "min"),
        "coarse": compare({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25}, "max"),
    }
    judged = judge_family(pairs, {name: "max" if name in ("accuracy", "coarse") else "min" for name in pairs})
    assert {name: found.verdict for name, found in judged.items()} == {
        "loss": "better",
        "accuracy": "worse",
        "one seed": "one seed: no interval",
        "diverged": "not finite on 1 of 2 seeds",
        "coarse": "the same difference on all 2 seeds: no interval",
    }
    assert judged["loss"].family == 5
    assert judged["loss"].p_adjusted == pytest.approx(5 * pairs["loss"].p)


def test_bootstrap_is_refused_below_ten_and_where_runs_diverged() -> None:
    values = np.random.default_rng(0).normal(size=10).tolist()
    assert bootstrap_interval(values[:9]) is None
    assert bootstrap_interval([*values, math.inf]) is None
    low, high = bootstrap_interval(values) or (math.nan, math.nan)
    assert low < np.mean(values) < high
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_bootstrap_covers_what_its_docstring_says() -> None:
    """500 samples of ten normal numbers; the standard error of the coverage is 1.3 points."""
    generator = np.random.default_rng(3)
    intervals = [bootstrap_interval(generator.normal(size=10), resamples=1000) or (1, 1) for _ in range(500)]
    assert 0.87 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.935


def test_speed_run_rule_on_published_runs() -> None:
    """Ten runs of a submission to the benchmark: (3.28 - 3.278188) · sqrt(10) = 0.00573 passes, z = 4.4077."""
    losses = [3.27723, 3.27747, 3.28075, 3.27776, 3.27808, 3.28062, 3.27713, 3.27702, 3.27726, 3.27856]
    run = speed_run(losses, 3.28)
    assert (run.margin, run.required, run.passed) == (pytest.approx(0.00573005), pytest.approx(0.004), True)
    assert run.p == pytest.approx(5.22e-6, rel=1e-3)
    assert run.t_p == pytest.approx(ttest_1samp(losses, 3.28, alternative="less").pvalue)
    earlier = [3.27794, 3.27816, 3.28146, 3.27847, 3.27880, 3.28133, 3.27783, 3.27772, 3.27797, 3.27924]
    assert not speed_run(earlier, 3.28).passed


def test_speed_run_rule_for_other_metrics() -> None:
    accuracy = speed_run([0.71, 0.72, 0.73], 0.7, mode="max", sd=0.01)
    assert accuracy.margin == pytest.approx(0.02 * math.sqrt(3))
    assert accuracy.required == pytest.approx(0.01 * 0.004 / 0.0013)
    assert accuracy.passed
    assert math.isnan(speed_run([1.0], 2.0).t_p)
    with pytest.raises(UserError, match="sd above 0"):
        speed_run([1.0], 2.0, sd=0.0)
