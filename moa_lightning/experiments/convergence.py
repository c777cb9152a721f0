"""Time to a target, and how much faster a variant reaches it, on each axis of training.

The target is the baseline's mean final value unless another is given. A curve reaches it where the best value so far
first comes to it; between two measured points the best value so far is taken as a straight line over the axis. So a
noisy curve gets the benefit of its luckiest point: use a metric whose points are means over much data.

Against the mean, about half of the baseline's own seeds never arrive, which leaves bounds instead of intervals. To
pair by seed, `final_by_seed` gives each seed its baseline run's own final value as its target: the baseline then
reaches all of them, and a variant that is worse somewhere is still counted as such, by a bound.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .ratios import UNKNOWN, Kind, Measured, Ratio, mean_of, ratio_over_seeds
from .statistics import CONFIDENCE
from .traces import AXES, Trace

Targets = float | Mapping[int, float]


def final_mean(baseline: Mapping[int, Trace]) -> float:
    """The mean of the seeds' final values; NaN where one of them is not finite or there are none."""
    finals = [trace.final for trace in baseline.values()]
    return fmean(finals) if finals and all(map(math.isfinite, finals)) else math.nan


def final_by_seed(baseline: Mapping[int, Trace]) -> dict[int, float]:
    """Each seed's own final value, as targets of a comparison paired by seed."""
    return {seed: trace.final for seed, trace in baseline.items()}


def time_to_target(trace: Trace, target: float, axis: str, mode: str) -> Measured:
    """When a curve first reaches a target, in units of the axis.

    Returns:
        Exact between the first and the last point; "at least" the last count where it never arrives (a run that
        diverged included); "at most" the first count where it was there at the first measurement already; unknown where
        the target is not finite.

    Raises:
        UserError: the run did not count this axis.
    """
    x = trace.axis(axis)
    if not math.isfinite(target) or not len(x):
        return UNKNOWN
    sign = 1.0 if mode == "min" else -1.0
    values = np.where(np.isnan(trace.values), math.inf, sign * trace.values)
    best, goal = np.minimum.accumulate(values), sign * target
    arrived = int(np.argmax(best <= goal))
    if best[arrived] > goal:
        return Measured(float(x[-1]), Kind.AT_LEAST)
    if arrived == 0:
        return Measured(float(x[0]), Kind.AT_MOST) if best[0] < goal else Measured(float(x[0]))
    before, after = float(best[arrived - 1]), float(best[arrived])
    share = (before - goal) / (before - after) if math.isfinite(before) else 1.0
    return Measured(float(x[arrived - 1] + share * (x[arrived] - x[arrived - 1])))


@dataclass(frozen=True)
class SpeedUp:
    """How many times less of an axis a variant needs than the baseline to reach the targets."""

    axis: str
    time: Measured  # of the variant to the targets, mean over seeds, in units of the axis
    baseline_time: Measured
    speed_up: Ratio  # baseline's time over the variant's: above 1 the variant is faster
    reached: int  # seeds of the variant that arrive
    seeds: int
    baseline_reached: int
    baseline_seeds: int


def speed_ups(
    variant: Mapping[int, Trace],
    baseline: Mapping[int, Trace],
    mode: str,
    targets: Targets | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, SpeedUp]:
    """Speed-up on each axis that all runs of both have counted.

    Args:
        variant, baseline: curves by seed.
        mode: "min" or "max".
        targets: one value, or one for each seed (`final_by_seed`); None for the baseline's mean final value.
        confidence: of the t interval of the mean log ratio over seeds.
    """
    goal = final_mean(baseline) if targets is None else targets
    result = {}
    for axis in AXES:
        if all(axis in trace.axes for trace in (*variant.values(), *baseline.values())):
            times = [
                {seed: time_to_target(trace, _target(goal, seed), axis, mode) for seed, trace in traces.items()}
                for traces in (variant, baseline)
            ]
            mine, theirs = times
            result[axis] = SpeedUp(
                axis,
                mean_of(list(mine.values())),
                mean_of(list(theirs.values())),
                ratio_over_seeds(theirs, mine, confidence),
                _arrivals(mine),
                len(mine),
                _arrivals(theirs),
                len(theirs),
            )
    return result


def _target(targets: Targets, seed: int) -> float:
    return targets.get(seed, math.nan) if isinstance(targets, Mapping) else targets


def _arrivals(times: Mapping[int, Measured]) -> int:
    return sum(time.kind in (Kind.EXACT, Kind.AT_MOST) for time in times.values())
