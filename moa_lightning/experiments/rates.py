"""Learning-rate sensitivity: the best rate, the basin of rates that do nearly as well, and how two variants differ.

Losses are looked at over the logarithm of the rate. The best rate is the minimum of the parabola through the lowest
measured point and its two neighbours; the basin holds the rates around the lowest point whose loss, interpolated
linearly between neighbours, stays within `delta` of it. At an end of the grid nothing lies beyond to compare with, and
beside a rate at which a run diverged nothing is known of the way there: an optimum or a basin's edge in such a place is
a bound ("at least", "at most"), and a ratio built on it is one as well.

The claim under test ([S] of arXiv 2605.26647: MoA holds a peak rate 1.5-2 times the baseline's) is about
`Sensitivity.highest`, the largest tolerable rate, and `Sensitivity.optimum`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moa_lightning.errors import UserError

from .ratios import UNKNOWN, Kind, Measured, Ratio, ratio_over_seeds
from .statistics import CONFIDENCE


@dataclass(frozen=True)
class Sensitivity:
    """How a loss depends on the learning rate, of one seed or of the mean over seeds."""

    best_rate: float  # the measured one of the lowest loss; NaN where all runs diverged
    best: float  # its loss
    optimum: Measured  # by the parabola
    lowest: Measured  # ends of the basin
    highest: Measured
    width: Measured  # highest / lowest

    @property
    def at_edge(self) -> str:
        """ "", or what to say of an optimum at an end of the grid, or beside a rate that diverged."""
        if self.optimum.kind is Kind.AT_LEAST:
            return "the best rate is the highest that worked: try higher ones"
        return "the best rate is the lowest that worked: try lower ones" if self.optimum.kind is Kind.AT_MOST else ""


def sensitivity(losses: Mapping[float, float], delta: float, mode: str = "min") -> Sensitivity:
    """Judge one curve of loss against rate.

    Args:
        losses: rate -> final loss; NaN or infinite where the run diverged.
        delta: by how much a loss may be worse than the lowest to belong to the basin, in the metric's units.
        mode: "max" for a metric of which more is better.

    Raises:
        UserError: fewer than three rates, a rate not above 0, or a delta not above 0.
    """
    rates = np.array(sorted(losses))
    if len(rates) < 3 or rates[0] <= 0 or not delta > 0:
        raise UserError(
            f"the basin of learning rates needs three rates above 0 or more and a delta above 0; got {len(rates)} "
            f"rates and delta {delta}"
        )
    sign = 1.0 if mode == "min" else -1.0
    values = np.array([sign * losses[rate] for rate in rates.tolist()])
    values = np.where(np.isfinite(values), values, math.inf)
    if np.isinf(values).all():
        return Sensitivity(math.nan, math.nan, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
    x, at = np.log(rates), int(np.argmin(values))
    lowest = _edge(x, values, at, -1, delta)
    highest = _edge(x, values, at, 1, delta)
    return Sensitivity(
        float(rates[at]), sign * float(values[at]), _optimum(x, values, at), lowest, highest, _width(lowest, highest)
    )


def _optimum(x: np.ndarray, values: np.ndarray, at: int) -> Measured:
    if at in (0, len(x) - 1):
        return Measured(math.exp(x[at]), Kind.AT_MOST if at == 0 else Kind.AT_LEAST)
    before, after = np.isinf(values[[at - 1, at + 1]])
    if before or after:  # no parabola, and the optimum may lie anywhere on the way to the rate that diverged
        return UNKNOWN if before and after else Measured(math.exp(x[at]), Kind.AT_MOST if before else Kind.AT_LEAST)
    left, right = x[at - 1] - x[at], x[at + 1] - x[at]
    # the parabola through the points (left, a), (0, 0), (right, b)
    a, b = values[at - 1] - values[at], values[at + 1] - values[at]
    curvature = (a / left - b / right) / (left - right)
    slope = a / left - curvature * left
    shift = -slope / (2 * curvature) if curvature > 0 else 0.0
    return Measured(math.exp(x[at] + shift))


def _edge(x: np.ndarray, values: np.ndarray, at: int, step: int, delta: float) -> Measured:
    """Where the basin ends on one side (step -1 or 1)."""
    limit = values[at] + delta
    here = at
    while 0 <= here + step < len(x):
        following = here + step
        if values[following] > limit:
            if math.isinf(values[following]):
                break
            share = (limit - values[here]) / (values[following] - values[here])
            return Measured(math.exp(x[here] + share * (x[following] - x[here])))
        here = following
    return Measured(math.exp(x[here]), Kind.AT_LEAST if step > 0 else Kind.AT_MOST)


def _width(lowest: Measured, highest: Measured) -> Measured:
    """A basin open at either end is at least this wide."""
    exact = lowest.kind is Kind.EXACT and highest.kind is Kind.EXACT
    return Measured(highest.value / lowest.value, Kind.EXACT if exact else Kind.AT_LEAST)


def mean_over_seeds(losses: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    """rate -> mean loss; a rate at which one seed diverged counts as diverged.

    Raises:
        UserError: the rates were not run on the same seeds, so that their means could not be compared.
    """
    if len({frozenset(found) for found in losses.values()}) > 1:
        raise UserError("the learning rates were run on different seeds; run the missing ones before comparing rates")
    return {rate: float(np.mean(list(found.values()))) for rate, found in losses.items()}


@dataclass(frozen=True)
class RateRatios:
    """A variant's rates over the baseline's, paired by seed."""

    optimum: Ratio
    highest: Ratio  # the largest tolerable rates
    width: Ratio  # of the basins


def rate_ratios(
    variant: Mapping[float, Mapping[int, float]],
    baseline: Mapping[float, Mapping[int, float]],
    delta: float,
    mode: str = "min",
    confidence: float = CONFIDENCE,
) -> RateRatios:
    """Compare two variants' curves, given as rate -> seed -> final loss, seed by seed; t intervals of log ratios."""
    mine, theirs = ({s: sensitivity(c, delta, mode) for s, c in _by_seed(runs).items()} for runs in (variant, baseline))

    def ratio(field: str) -> Ratio:
        top, bottom = ({s: getattr(found, field) for s, found in side.items()} for side in (mine, theirs))
        return ratio_over_seeds(top, bottom, confidence)

    return RateRatios(ratio("optimum"), ratio("highest"), ratio("width"))


def _by_seed(losses: Mapping[float, Mapping[int, float]]) -> dict[int, dict[float, float]]:
    """seed -> rate -> loss, for the seeds that were run at every rate."""
    seeds = set.intersection(*(set(found) for found in losses.values())) if losses else set()
    return {seed: {rate: found[seed] for rate, found in losses.items()} for seed in sorted(seeds)}
