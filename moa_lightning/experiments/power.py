"""How many seeds? Power of the paired t-test, by the noncentral t distribution, without and with a pilot's doubt.

With a known standard deviation the power at n seeds is exact: the statistic is noncentral t with n - 1 degrees of
freedom and noncentrality effect · sqrt(n) / sd. A pilot of three seeds does not know it: its sd is below half the true
one in a fifth of all pilots, and a grid planned by it as if it were the truth has far less power than was asked for.
So `seeds_after_pilot` averages the power over what the pilot leaves open, sd² · df / chi²(df), as Julious and Owen
do ("Sample size calculations for clinical studies allowing for uncertainty about the variance", Pharmaceutical
Statistics 5, 2006): over many pilots, the share of true effects found is then the one promised. The doubt is paid for
in seeds. Cheap help is to pool a pilot's sd over all its variants, `pilot_of_grid`, which leaves much less of it.

A grid judges the pilot's seeds with the later ones (schedule.py), which these formulas do not know of: simulated grids
find as many true effects as promised, and no more false ones (tests/experiments/test_pilot.py).
Families of claims: at `comparisons` > 1 each is planned at alpha / comparisons, Holm's first and hardest step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import chi2
from scipy.stats import t as student

from moa_lightning.errors import UserError

from .statistics import ALPHA

POWER = 0.8
MOST_SEEDS = 100_000
_NODES = 200  # of the averages over an estimated sd


@dataclass(frozen=True)
class Pilot:
    """An estimate of the standard deviation of a paired difference."""

    sd: float
    df: int  # degrees of freedom behind it: pairs - 1 for one comparison


def pilot_of_grid(runs: Mapping[str, Mapping[int, float]]) -> Pilot:
    """Pool a pilot over its variants: metrics by variant and seed, of one task.

    The model: metric = variant + seed + noise of one standard deviation for all variants, so that the difference of any
    two has sqrt(2) times it. The residuals of that two-way layout have (variants - 1)(seeds - 1) degrees of freedom: 12
    instead of 2 for seven variants and three seeds. A variant much noisier than the rest is hidden by it: look at the
    paired sd of each as well.

    Raises:
        UserError: fewer than two variants or seeds in common, or a value that is not finite.
    """
    seeds = sorted(set.intersection(*(set(found) for found in runs.values()))) if runs else []
    values = np.array([[found[seed] for seed in seeds] for found in runs.values()])  # (variants, seeds)
    if len(runs) < 2 or len(seeds) < 2 or not np.isfinite(values).all():
        raise UserError(
            f"a pilot needs two variants or more with finite values on two common seeds or more; got {len(runs)} "
            f"variants and {len(seeds)} common seeds"
        )
    residuals = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    df = (len(runs) - 1) * (len(seeds) - 1)
    return Pilot(math.sqrt(2 * float((residuals**2).sum()) / df), df)


def power(n: int, effect: float, sd: float, alpha: float = ALPHA) -> float:
    """Chance that the two-sided paired t-test of n seeds finds a true mean difference of `effect`.

    Args:
        n: pairs, at least 2.
        effect, sd: of the paired differences, in the metric's units.
        alpha: level of the test.
    """
    return float(_power(n, np.array([abs(effect) / sd]), alpha)[0])


def _power(n: int, ratio: np.ndarray, alpha: float) -> np.ndarray:
    """The same for effects in units of sd (R,), elementwise.

    The tails of the noncentral t by their definition, an average of normal tails over the distribution of the estimated
    sd: scipy 1.17's nct answers NaN for many of these arguments.
    """
    critical = float(student.isf(alpha / 2, n - 1))
    sds, weights = _sd_nodes(n - 1)
    shift, bar = ratio[:, None] * math.sqrt(n), critical * sds
    return (ndtr(shift - bar) + ndtr(-shift - bar)) @ weights


@cache
def _sd_nodes(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of an average over an estimated sd whose true value is 1: sqrt(chi²(df) / df).

    Gauss-Legendre in its logarithm, in which the integrand is smooth for every df.
    """
    x, w = np.polynomial.legendre.leggauss(_NODES)
    low, high = (0.5 * math.log(q / df) for q in (chi2.ppf(1e-14, df), chi2.isf(1e-16, df)))
    logs = low + (high - low) * (x + 1) / 2
    values = np.exp(logs)
    weights = w * chi2.pdf(df * values**2, df) * values**2
    return values, weights / weights.sum()


def detectable_effect(n: int, sd: float, alpha: float = ALPHA, target: float = POWER, comparisons: int = 1) -> float:
    """The smallest true difference that n seeds find with the target power, in the metric's units."""
    _check(1.0, sd, alpha, target, comparisons)
    level = alpha / comparisons

    def missing(ratio: float) -> float:
        return power(n, ratio, 1.0, level) - target

    high = 1.0
    while missing(high) < 0:
        high *= 2
    return sd * float(brentq(missing, 0.0, high, xtol=1e-12))


def seeds_needed(effect: float, sd: float, alpha: float = ALPHA, target: float = POWER, comparisons: int = 1) -> int:
    """The fewest seeds (at least 2) that find `effect` with the target power if `sd` is the true one.

    Raises:
        UserError: an effect of zero, an sd that is not above 0, shares outside (0, 1), or more than 100,000 seeds.
    """
    _check(effect, sd, alpha, target, comparisons)
    return _fewest(lambda n: power(n, effect, sd, alpha / comparisons), target)


def seeds_after_pilot(
    effect: float, pilot: Pilot, alpha: float = ALPHA, target: float = POWER, comparisons: int = 1
) -> int:
    """The fewest seeds that find `effect` with the target power on average over what the pilot leaves open.

    Raises:
        UserError: as `seeds_needed`.
    """
    _check(effect, pilot.sd, alpha, target, comparisons)
    estimates, weights = _sd_nodes(pilot.df)
    ratios = abs(effect) / pilot.sd * estimates  # the true sd is the estimate over what the nodes are
    return _fewest(lambda n: float(_power(n, ratios, alpha / comparisons) @ weights), target)


def _check(effect: float, sd: float, alpha: float, target: float, comparisons: int) -> None:
    if not (math.isfinite(effect) and effect != 0 and math.isfinite(sd) and sd > 0):
        raise UserError(f"the power of a test needs an effect other than 0 and an sd above 0; got {effect} and {sd}")
    if not (0 < alpha < target < 1) or comparisons < 1:
        raise UserError(
            f"the power of a test needs 0 < alpha < power < 1 and one comparison or more; got alpha {alpha}, "
            f"power {target}, {comparisons} comparisons"
        )


def _fewest(reached: Callable[[int], float], target: float) -> int:
    """The smallest n >= 2 with reached(n) >= target; `reached` rises with n."""
    low, high = 1, 2
    while reached(high) < target:
        low, high = high, high * 2
        if high > MOST_SEEDS:
            raise UserError(f"more than {MOST_SEEDS:,} seeds would be needed: the effect is too small for its sd")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= target else (middle, high)
    return high
