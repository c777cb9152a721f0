"""Ratios of quantities that may be known only as bounds, paired by seed, on a logarithmic scale.

A run that never reaches a target, or whose best learning rate is the grid's last, still says something: "longer than
this", "at least that". Dropping such seeds would keep the fortunate ones and bias the answer; so each quantity is
measured with the kind of knowledge that it is, and kinds are carried into the ratio. A t interval of the mean log ratio
is given only where every seed is exact and they differ; else the answer is a bound of the geometric mean, or nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from .statistics import CONFIDENCE, compare


class Kind(StrEnum):
    """What is known of a quantity."""

    EXACT = "exact"
    AT_LEAST = "at least"
    AT_MOST = "at most"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Measured:
    """A quantity that is not negative, or a bound of it. The value of an unknown one is NaN."""

    value: float
    kind: Kind = Kind.EXACT

    def __str__(self) -> str:
        if self.kind is Kind.UNKNOWN:
            return "unknown"
        return f"{self.value:.3g}" if self.kind is Kind.EXACT else f"{self.kind} {self.value:.3g}"


UNKNOWN = Measured(math.nan, Kind.UNKNOWN)
_KINDS: dict[tuple[int, ...], Kind] = {(): Kind.EXACT, (1,): Kind.AT_LEAST, (-1,): Kind.AT_MOST}


@dataclass(frozen=True)
class Ratio:
    """A ratio over seeds, as its geometric mean."""

    n: int  # seeds in common
    ratio: Measured
    low: float  # t interval of the geometric mean; NaN unless all seeds are exact and there are two or more
    high: float
    inexact: int  # seeds of which a bound or nothing is known
    words: str


def over(top: Measured, bottom: Measured) -> Measured:
    """top / bottom, as exactly as the two are known; unknown where one is 0, such as the time to a target that a curve
    starts from."""
    if Kind.UNKNOWN in (top.kind, bottom.kind) or 0 in (top.value, bottom.value):
        return UNKNOWN
    directions = {_direction(top.kind), -_direction(bottom.kind)} - {0}
    if len(directions) > 1:
        return UNKNOWN
    return Measured(top.value / bottom.value, _KINDS[tuple(directions)])


def _direction(kind: Kind) -> int:
    """1 where the truth may lie above the value, -1 below, 0 for an exact one."""
    return {Kind.AT_LEAST: 1, Kind.AT_MOST: -1}.get(kind, 0)


def mean_of(quantities: Sequence[Measured]) -> Measured:
    """The arithmetic mean, as exactly as its parts are known."""
    directions = {_direction(quantity.kind) for quantity in quantities} - {0}
    if not quantities or len(directions) > 1 or any(quantity.kind is Kind.UNKNOWN for quantity in quantities):
        return UNKNOWN
    return Measured(fmean(quantity.value for quantity in quantities), _KINDS[tuple(directions)])


def ratio_over_seeds(
    top: Mapping[int, Measured], bottom: Mapping[int, Measured], confidence: float = CONFIDENCE
) -> Ratio:
    """The ratio top / bottom paired by seed.

    Where some seeds are bounds of one direction, the geometric mean with the bounds in their place is a bound of the
    same direction; where they point both ways, or a seed is unknown, nothing is claimed.
    """
    seeds = sorted(top.keys() & bottom.keys())
    ratios = {seed: over(top[seed], bottom[seed]) for seed in seeds}
    inexact = sum(ratio.kind is not Kind.EXACT for ratio in ratios.values())
    if not seeds:
        return Ratio(0, UNKNOWN, math.nan, math.nan, 0, "no seed in common")
    kinds = {ratio.kind for ratio in ratios.values()} - {Kind.EXACT}
    if len(kinds) > 1 or Kind.UNKNOWN in kinds:
        words = f"unknown or bounds of both directions on {inexact} of {len(seeds)} seeds: nothing is claimed"
        return Ratio(len(seeds), UNKNOWN, math.nan, math.nan, inexact, words)
    logs = {seed: math.log(ratio.value) for seed, ratio in ratios.items()}
    paired = compare(logs, dict.fromkeys(logs, 0.0), "max", confidence)
    mean = math.exp(paired.mean)
    if kinds:
        (kind,) = kinds
        words = f"{kind} {mean:.3g}: a bound on {inexact} of {len(seeds)} seeds, so no interval"
        return Ratio(len(seeds), Measured(mean, kind), math.nan, math.nan, inexact, words)
    if len(seeds) == 1:
        return Ratio(1, Measured(mean), math.nan, math.nan, 0, "one seed: no interval")
    if paired.sd == 0 and paired.mean != 0:  # as rates of a grid easily are
        words = f"the same ratio on all {len(seeds)} seeds: no interval"
        return Ratio(len(seeds), Measured(mean), math.nan, math.nan, 0, words)
    low, high = math.exp(paired.low), math.exp(paired.high)
    words = "no difference shown" if low <= 1 <= high else "larger" if low > 1 else "smaller"
    return Ratio(len(seeds), Measured(mean), low, high, 0, words)
