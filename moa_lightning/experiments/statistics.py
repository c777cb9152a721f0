"""Is a variant better than the baseline? Differences paired by seed, with Student's t interval; claims by family.

Seeds are shared between variants (same data order, same start where shapes agree), so the difference within a seed is
much less noisy than the runs themselves, and the paired t-test is the right one (Student 1908; any textbook). It
holds its 5 % already at three seeds, where a percentile bootstrap claims an effect far too often. An interval stands
alone; a family of claims (all variants on all tasks of a grid, say) is judged together by Holm's step-down method
(Scandinavian Journal of Statistics 6, 1979), which keeps the chance of any false claim at 5 % whatever the
dependence between the comparisons, as variants that share a baseline are dependent. So an interval may leave out zero
where the family's verdict is "no difference shown": the verdict is the claim, the interval is for reading.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

import numpy as np
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

from moa_lightning.errors import UserError

CONFIDENCE = 0.95
ALPHA = 0.05  # chance of any false claim in a family
LEAST_FOR_BOOTSTRAP = 10
RESOLUTION = 1e-5  # of a metric, relative: means of float32 values over hundreds of batches
SPEED_RUN_SD = 0.0013  # of one run's loss, assumed by modded-nanogpt's rule
SPEED_RUN_STEP = 0.004  # its threshold, at that standard deviation

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Paired:
    """Variant minus baseline over the seeds that both have. Without two finite pairs the later fields are NaN;
    where all differences are equal and not zero, those after `sd`."""

    n: int  # pairs
    mean: float
    sd: float  # of the differences, n - 1 in the denominator
    low: float  # interval of the mean
    high: float
    t: float  # mean over its standard error
    p: float  # two-sided
    verdict: str  # in words
    differences: tuple[float, ...] = ()  # by seed, in their order


def compare(
    variant: Mapping[int, float], baseline: Mapping[int, float], mode: str, confidence: float = CONFIDENCE
) -> Paired:
    """Compare two variants' final metrics, given by seed.

    Args:
        variant, baseline: seed -> metric.
        mode: "min" where less is better, "max" where more is.
        confidence: of the two-sided interval.

    Differences that are equal but for the rounding of float32 metrics have sd 0, and those that are not zero have no
    interval and no p value: a coarse metric (counts of images) on few seeds comes to them by chance.
    """
    return compare_weighted(((1, variant), (-1, baseline)), mode, confidence)


def compare_weighted(
    sides: Sequence[tuple[float, Mapping[int, float]]], mode: str, confidence: float = CONFIDENCE
) -> Paired:
    """The same for any weighted sum of metrics within a seed, such as a difference of differences.

    Args:
        sides: weight, seed -> metric.
        mode, confidence: as in `compare`.
    """
    seeds = sorted(set.intersection(*(set(side) for _, side in sides)))
    pairs = [sum(weight * side[seed] for weight, side in sides) for seed in seeds]
    n = len(pairs)
    lost = sum(not math.isfinite(pair) for pair in pairs)
    if n == 0:
        return _without_interval(0, math.nan, "no seed in common")
    if lost:
        return _without_interval(n, math.nan, f"not finite on {lost} of {n} seeds")
    if n == 1:
        return _without_interval(1, pairs[0], "one seed: no interval")
    mean, sd = fmean(pairs), stdev(pairs)
    noise = RESOLUTION * max(abs(side[seed]) for _, side in sides for seed in seeds)
    if sd <= noise:  # rounding alone: counts of as many more images, as percentages
        if abs(mean) > noise:
            verdict = f"the same difference on all {n} seeds: no interval"
            return Paired(n, mean, 0.0, math.nan, math.nan, math.nan, math.nan, verdict, tuple(pairs))
        mean, sd = 0.0, 0.0
    error = sd / math.sqrt(n)
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * error
    statistic = mean / error if error else 0.0
    p = float(2 * student.sf(abs(statistic), n - 1))
    return Paired(
        n, mean, sd, mean - half, mean + half, statistic, p, _verdict(mean - half, mean + half, mode), tuple(pairs)
    )


def _without_interval(n: int, mean: float, verdict: str) -> Paired:
    return Paired(n, mean, math.nan, math.nan, math.nan, math.nan, math.nan, verdict)


def _verdict(low: float, high: float, mode: str) -> str:
    """Words follow the interval: it must leave out zero."""
    if low <= 0 <= high:
        return "no difference shown"
    return _direction(low, mode)


def _direction(difference: float, mode: str) -> str:
    return "better" if (difference > 0) == (mode == "max") else "worse"


def holm_adjusted(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values of families (..., m); reject where the result is at most alpha.

    A NaN (a comparison that has no p value: too few seeds, a run that diverged) stays NaN and counts in its family as
    if it were 1: how many claims there are was settled before the runs, so that a failed one makes no other easier.
    """
    p = np.asarray(p, dtype=np.float64)
    known = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(known, axis=-1, kind="stable")
    ordered = np.take_along_axis(known, order, axis=-1)
    steps = ordered * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    result = np.empty_like(adjusted)
    np.put_along_axis(result, order, adjusted, axis=-1)
    return np.where(np.isnan(p), np.nan, result)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p values by name; NaN as `holm_adjusted` has it."""
    adjusted = holm_adjusted(np.array(list(p_values.values())))
    return dict(zip(p_values, adjusted.tolist(), strict=True))


@dataclass(frozen=True)
class Judged:
    """A comparison as a member of its family."""

    paired: Paired
    p_adjusted: float  # by Holm; NaN where the comparison has no p value
    family: int  # comparisons in the family, those without a p value included
    verdict: str  # "better", "no difference shown", "worse", or why there is no interval


def judge_family(
    comparisons: Mapping[Name, Paired], modes: Mapping[Name, str], alpha: float = ALPHA
) -> dict[Name, Judged]:
    """Turn the comparisons of a family of claims into verdicts.

    Args:
        comparisons: all claims that were declared, finished or not.
        modes: "min" or "max" of each comparison's metric, by the same names.
        alpha: chance of one false claim or more in the family.

    A comparison whose differences are all equal and not zero has no spread to judge by (a coarse metric on few seeds
    does that by chance): it gets no verdict either, and counts like the other ones without an interval.
    """
    adjusted = holm({name: paired.p for name, paired in comparisons.items()})
    judged = {}
    for name, paired in comparisons.items():
        p = adjusted[name]
        if math.isnan(p):
            verdict = paired.verdict
        else:
            verdict = _direction(paired.mean, modes[name]) if p <= alpha else "no difference shown"
        judged[name] = Judged(paired, p, len(comparisons), verdict)
    return judged


def bootstrap_interval(
    differences: Sequence[float], confidence: float = CONFIDENCE, resamples: int = 10_000
) -> tuple[float, float] | None:
    """BCa bootstrap interval of the mean (Efron 1987), to describe skewed differences; it decides nothing.

    BCa and not the percentile interval because it follows skewness, the one thing that it can show beside the t
    interval. Both are too narrow on few values: on normal data BCa covers 90 % instead of 95 % at n = 10.

    Returns:
        (low, high), the same on every call; None below 10 values or where one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < LEAST_FOR_BOOTSTRAP or not np.isfinite(values).all():
        return None
    if (values == values[0]).all():
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class SpeedRun:
    """Whether runs have reached a target by modded-nanogpt's rules."""

    n: int
    mean: float
    margin: float  # (target - mean) · sqrt(n), the sign turned for metrics of which more is better
    required: float
    passed: bool  # margin >= required
    p: float  # one-sided, of the margin if one run's standard deviation is the assumed one
    sd: float  # the assumed one
    observed_sd: float  # of these runs; NaN for one. Larger than the assumed one: do not trust `passed`
    t_p: float  # one-sided, by a t-test with the observed one; NaN for one run


def speed_run(values: Sequence[float], target: float, mode: str = "min", sd: float = SPEED_RUN_SD) -> SpeedRun:
    """modded-nanogpt's rule that runs have reached a target, for any metric.

    Its optimiser benchmark accepts n runs, none left out, at a fixed step if (3.28 - mean) · sqrt(n) >= 0.004. The
    number behind it is a standard deviation of 0.0013 of one run's loss, which makes it z >= 3.08, p = 0.001. The
    rule scales with `sd`: margin >= 3.08 sd. It *assumes* that standard deviation and never looks at the runs' own, so
    `sd` has to come from many earlier runs of the same kind. The wall-clock speed-run asks for p < 0.01 instead, by a
    t-test that assumes none: that is `t_p`.

    Source: github.com/KellerJordan/modded-nanogpt, README.md and records/track_3_optimization.

    Raises:
        UserError: no values, or an sd that is not above 0.
    """
    if not values or not sd > 0:
        raise UserError(f"the speed-run rule needs one run or more and an sd above 0; got {len(values)} runs, sd {sd}")
    n, mean = len(values), fmean(values)
    gap = (target - mean) if mode == "min" else (mean - target)
    margin, required = gap * math.sqrt(n), SPEED_RUN_STEP * (sd / SPEED_RUN_SD)
    observed = stdev(values) if n > 1 else math.nan
    t = margin / observed if observed else math.copysign(math.inf, margin) if margin else 0.0
    t_p = math.nan if n == 1 else float(student.sf(t, n - 1))
    return SpeedRun(n, mean, margin, required, margin >= required, float(norm.sf(margin / sd)), sd, observed, t_p)
