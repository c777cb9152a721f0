"""Learning-rate sensitivity: the best rate, what other rates lose, the basin of rates that do nearly as well.

Losses are looked at over the logarithm of the rate, and between measured points the curve is the parabola through the
two and the next one towards the lowest. The optimum is the minimum of the parabola about the lowest point; the basin
holds the rates around it whose loss stays within `delta` of that minimum, so the optimum always lies in its basin.
(Straight lines down to the lowest point would leave the basin at once where a step of the grid changes the loss much,
and the basins of all variants would end beside the same tried rate.) At an end of the grid nothing lies beyond to
compare with, and beside a rate at which a run diverged nothing is known of the way there: an optimum or a basin's edge
in such a place is a bound ("at least", "at most"), and a ratio built on it is one as well.

What a grid says without any interpolation is `lost_at`: how much worse the tried rates are that are twice or half the
best one. Three points, of one or two seeds, always make a parabola; this shows the points.

The claim under test ([S] of arXiv 2605.26647: MoA holds a peak rate 1.5-2 times the baseline's) is about
`Sensitivity.highest`, the largest tolerable rate, `Sensitivity.optimum`, and the loss at twice the best rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moa_lightning.errors import UserError

from .ratios import UNKNOWN, Kind, Measured, Ratio, over, ratio_over_seeds
from .statistics import CONFIDENCE

MULTIPLES = (1 / 10, 1 / 4, 1 / 3, 1 / 2, 2.0, 3.0, 4.0, 10.0)  # of the best rate, at which others are looked at
NEAR = 0.12  # a tried rate stands for a multiple that it misses by this share at most: 1, 3, 10 are a factor 3 apart

Losses = Mapping[float, Mapping[int, float]]  # rate -> seed -> final loss


@dataclass(frozen=True)
class Sensitivity:
    """How a loss depends on the learning rate, of one seed or of the mean over seeds."""

    best: float  # of the losses measured; NaN where all runs diverged
    optimum: Measured  # by the parabola
    lowest: Measured  # ends of the basin, which the optimum lies in
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
        delta: by how much a loss may be worse than the optimum's to belong to the basin, in the metric's units.
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
        return Sensitivity(math.nan, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
    x, at = np.log(rates), int(np.argmin(values))
    optimum, lowest, highest = _basin(x, values, at, delta)
    width = over(highest, lowest)
    return Sensitivity(sign * float(values[at]), optimum, lowest, highest, width)


def _basin(x: np.ndarray, values: np.ndarray, at: int, delta: float) -> tuple[Measured, Measured, Measured]:
    """The optimum and the ends of its basin."""
    below, above = at > 0 and math.isfinite(values[at - 1]), at + 1 < len(x) and math.isfinite(values[at + 1])
    if below and above:
        return _around(x, values, at, delta)
    best = math.exp(x[at])
    if not below and not above:  # tried alone, or between two rates that diverged
        return UNKNOWN, UNKNOWN, UNKNOWN
    # The optimum may lie anywhere beyond, and lower: the basin's other end then lies nearer to it than what is found.
    if above:
        end = _edge(x, values, at, 1, values[at] + delta)
        return Measured(best, Kind.AT_MOST), Measured(best, Kind.AT_MOST), _bounded(end, Kind.AT_MOST)
    end = _edge(x, values, at, -1, values[at] + delta)
    return Measured(best, Kind.AT_LEAST), _bounded(end, Kind.AT_LEAST), Measured(best, Kind.AT_LEAST)


def _around(x: np.ndarray, values: np.ndarray, at: int, delta: float) -> tuple[Measured, Measured, Measured]:
    """The same where both neighbours of the lowest point have a value."""
    slope, curvature = _parabola(x[at - 1 : at + 2] - x[at], values[at - 1 : at + 2] - values[at])
    shift = -slope / (2 * curvature) if curvature > 0 else 0.0
    minimum = values[at] - curvature * shift**2
    reach = math.sqrt(delta / curvature) if curvature > 0 else math.inf

    def end(step: int) -> Measured:
        if reach < abs(x[at + step] - x[at] - shift):
            return Measured(math.exp(x[at] + shift + step * reach))
        return _edge(x, values, at + step, step, minimum + delta)

    return Measured(math.exp(x[at] + shift)), end(-1), end(1)


def _parabola(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope at 0 and curvature of the parabola through (0, 0), the middle one of three points, and the two others."""
    left, right = float(y[0] / x[0]), float(y[2] / x[2])
    curvature = (left - right) / float(x[0] - x[2])
    return left - curvature * float(x[0]), curvature


def _edge(x: np.ndarray, values: np.ndarray, here: int, step: int, limit: float) -> Measured:
    """Where the curve leaves the basin on the way outwards (step -1 or 1) from a point of it."""
    while 0 <= here + step < len(x) and values[here + step] <= limit:
        here += step
    after, before = here + step, here - step
    if not 0 <= after < len(x) or math.isinf(values[after]):
        return Measured(math.exp(x[here]), Kind.AT_LEAST if step > 0 else Kind.AT_MOST)
    width, rise, room = abs(x[after] - x[here]), values[after] - values[here], limit - values[here]
    slope, curvature = rise / width, 0.0
    if 0 <= before < len(x) and math.isfinite(values[before]):
        three = [before, here, after]
        slope, curvature = _parabola(step * (x[three] - x[here]), values[three] - values[here])
    # slope · t + curvature · t² = room, once between here and after
    root = math.sqrt(max(0.0, slope**2 + 4 * curvature * room))
    share = 2 * room / (slope + root) if slope > 0 else (root - slope) / (2 * curvature)
    return Measured(math.exp(x[here] + step * share))


def _bounded(end: Measured, kind: Kind) -> Measured:
    """An end that lies there or nearer to the optimum; unknown where it may lie farther out as well."""
    return Measured(end.value, kind) if end.kind is Kind.EXACT else UNKNOWN


def mean_over_seeds(losses: Losses) -> dict[float, float]:
    """rate -> mean loss; a rate at which one seed diverged counts as diverged.

    Raises:
        UserError: the rates were not run on the same seeds, so that their means could not be compared.
    """
    if len({frozenset(found) for found in losses.values()}) > 1:
        raise UserError("the learning rates were run on different seeds; run the missing ones before comparing rates")
    return {rate: float(np.mean(list(found.values()))) for rate, found in losses.items()}


def best_tried(losses: Losses, mode: str = "min") -> float:
    """The rate that tuning chooses, by the mean over seeds; NaN where a run diverged at each of them."""
    means = {rate: mean for rate, mean in mean_over_seeds(losses).items() if math.isfinite(mean)}
    return (min if mode == "min" else max)(means, key=means.__getitem__, default=math.nan)


def lost_at(losses: Losses, multiple: float, mode: str = "min") -> dict[int, float] | None:
    """By how much the metric at `multiple` times the best tried rate is worse than at the best one, by seed.

    Returns:
        Not finite for a seed that diverged there; None where no rate near that multiple was tried.
    """
    best = best_tried(losses, mode)
    wanted = math.log(best * multiple)
    rate = min(losses, key=lambda rate: abs(math.log(rate) - wanted)) if math.isfinite(best) else None
    if rate is None or rate == best or abs(math.log(rate) - wanted) > NEAR:
        return None
    sign = 1.0 if mode == "min" else -1.0
    return {seed: sign * (value - losses[best][seed]) for seed, value in losses[rate].items()}


@dataclass(frozen=True)
class RateRatios:
    """A variant's rates over the baseline's, paired by seed."""

    optimum: Ratio
    highest: Ratio  # the largest tolerable rates
    width: Ratio  # of the basins


def rate_ratios(
    variant: Losses,
    baseline: Losses,
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


def _by_seed(losses: Losses) -> dict[int, dict[float, float]]:
    """seed -> rate -> loss, for the seeds that were run at every rate."""
    seeds = set.intersection(*(set(found) for found in losses.values())) if losses else set()
    return {seed: {rate: found[seed] for rate, found in losses.items()} for seed in sorted(seeds)}
