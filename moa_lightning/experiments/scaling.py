"""Scaling fits L = E + A · N^-a over model sizes (or tokens), and a variant's gap as a multiplier of them.

Least squares over all runs (sizes × seeds) with E >= 0, A >= 0. Given a, E and A are linear, so they are solved in
closed form and a is searched in one dimension (variable projection; Golub and Pereyra 1973): no start values, no local
minimum missed on the range 0.01 to 3. The form is the one of Hoffmann et al. (arXiv 2203.15556, section 3.3); their
Huber loss is not taken over, since with a handful of runs an outlier is to be looked at and not to be weighed down.

Intervals: parametric bootstrap. Data are drawn anew around the fitted curve with normal noise, whose sd is the
residuals' own about the curve (runs - 3 degrees of freedom), so that a curve that does not fit widens its intervals;
each draw first draws that sd from what the residuals leave open, sd² · df / chi²(df), without which the intervals would
be too narrow on few runs. The residual bootstrap was not chosen because it redraws from that same small set. Where two
variants share seeds, their noise is drawn with the correlation that their residuals have.

The effective multiplier at size N is m with L_baseline(m · N) = L_variant(N): the baseline needs m times the
parameters (or tokens). Below four sizes three numbers fit anything, so a fit is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from moa_lightning.errors import UserError

from .ratios import UNKNOWN, Kind, Measured
from .statistics import CONFIDENCE

LEAST_SIZES = 4
EXPONENTS = (0.01, 3.0)  # searched
RESAMPLES = 1000
_COARSE, _FINE = 60, 30  # exponents tried on a grid, then golden-section steps
_GOLDEN = (math.sqrt(5) - 1) / 2

Runs = Mapping[float, Mapping[int, float]]  # size -> seed -> final loss


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingFit:
    """A fitted curve; sizes in the units that were given."""

    floor: Interval  # E
    scale: Interval  # A, at sizes in their own units
    exponent: Interval  # a
    sd: float  # of the residuals about the curve, runs - 3 degrees of freedom
    sizes: tuple[float, ...]
    runs: int
    warnings: tuple[str, ...]

    def predict(self, size: float) -> float:
        """The fitted loss; beyond the sizes measured it is an extrapolation."""
        return self.floor.value + self.scale.value * size**-self.exponent.value


@dataclass(frozen=True)
class Multiplier:
    """How many times the size the baseline needs for the variant's loss at one size."""

    size: float
    loss: float  # the variant's, by its fit
    multiplier: Measured  # "at least" the largest of the interval where the baseline's floor lies above that loss
    low: float
    high: float  # infinite where the baseline may never get there
    extrapolated: bool  # the baseline at that size lies outside its measured sizes


@dataclass(frozen=True)
class _Curves:
    """Parameters of B curves, each (B,); sizes are relative to `unit`."""

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    unit: float

    def at(self, size: float) -> np.ndarray:
        return self.floor + self.scale * (size / self.unit) ** -self.exponent

    def size_of(self, loss: np.ndarray) -> np.ndarray:
        """The size of a loss: infinite at the floor and below, NaN for a curve that does not fall."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(self.scale > 0, (loss - self.floor) / self.scale, math.nan)
            return self.unit * np.where(share <= 0, math.inf, share ** (-1 / self.exponent))


def fit_scaling(runs: Runs, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0) -> ScalingFit:
    """Fit one variant's losses.

    Args:
        runs: size -> seed -> final loss; four sizes or more, five runs or more.
        confidence: of the bootstrap's percentile intervals.
        seed: of the bootstrap.

    Raises:
        UserError: too few sizes or runs, a size not above 0, a loss that is not finite.
    """
    sizes, losses = _table(runs)
    best, drawn, sd, _ = _bootstrap([(sizes, losses)], np.eye(1), resamples, seed)[0]
    unit_power = best.unit**best.exponent, drawn.unit**drawn.exponent
    tail = (1 - confidence) / 2

    def interval(value: np.ndarray, values: np.ndarray) -> Interval:
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(float(value[0]), float(low), float(high))

    return ScalingFit(
        floor=interval(best.floor, drawn.floor),
        scale=interval(best.scale * unit_power[0], drawn.scale * unit_power[1]),
        exponent=interval(best.exponent, drawn.exponent),
        sd=sd,
        sizes=tuple(sorted(runs)),
        runs=len(losses),
        warnings=_warnings(best),
    )


def multipliers(
    variant: Runs,
    baseline: Runs,
    sizes: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Multiplier]:
    """The variant's gap as a size multiplier, at each of `sizes` (default: those of the variant).

    Raises:
        UserError: as `fit_scaling`, for either variant.
    """
    tables = [_table(variant), _table(baseline)]
    correlation = np.eye(2)
    paired = len(variant) == len(baseline) and _seeds(variant) == _seeds(baseline)
    if paired:  # run i of both tables is then the same seed at the same place in the order of sizes
        residuals = [losses - _fit(x / x[0], losses[None])(x / x[0])[0] for x, losses in tables]
        norms = [math.sqrt(float(r @ r)) for r in residuals]
        if min(norms) > 0:
            correlation[0, 1] = correlation[1, 0] = float(residuals[0] @ residuals[1]) / (norms[0] * norms[1])
    (mine, mine_drawn, *_), (theirs, theirs_drawn, *_) = _bootstrap(tables, correlation, resamples, seed)
    tail, found = (1 - confidence) / 2, []
    for size in sorted(variant) if sizes is None else sizes:
        loss = mine.at(size)
        value = float(theirs.size_of(loss)[0]) / size
        drawn = theirs_drawn.size_of(mine_drawn.at(size)) / size
        drawn = np.sort(drawn[~np.isnan(drawn)])
        low, high = (math.nan, math.nan) if len(drawn) == 0 else _percentiles(drawn, tail)
        inside = min(baseline) <= value * size <= max(baseline)
        found.append(Multiplier(size, float(loss[0]), _measured(value, low), low, high, not inside))
    return found


def _measured(value: float, low: float) -> Measured:
    if math.isnan(value):
        return UNKNOWN
    return Measured(low, Kind.AT_LEAST) if math.isinf(value) else Measured(value)


def _percentiles(ordered: np.ndarray, tail: float) -> tuple[float, float]:
    """Of sorted values that may be infinite at the end, rounded outwards."""
    last = len(ordered) - 1
    return float(ordered[math.floor(tail * last)]), float(ordered[math.ceil((1 - tail) * last)])


def _seeds(runs: Runs) -> list[list[int]]:
    return [sorted(runs[size]) for size in sorted(runs)]


def _table(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and losses (n,), ordered by size and seed."""
    pairs = [(size, runs[size][seed]) for size in sorted(runs) for seed in sorted(runs[size])]
    if len(runs) < LEAST_SIZES or len(pairs) <= LEAST_SIZES:
        raise UserError(
            f"a scaling fit needs {LEAST_SIZES} sizes and {LEAST_SIZES + 1} runs or more; got {len(runs)} sizes and "
            f"{len(pairs)} runs"
        )
    if min(runs) <= 0 or not all(math.isfinite(number) for pair in pairs for number in pair):
        raise UserError("a scaling fit needs sizes above 0 and finite losses; leave out no run: repeat the failed ones")
    sizes, losses = np.array(pairs, dtype=np.float64).T
    return sizes, losses


def _warnings(curve: _Curves) -> tuple[str, ...]:
    found = []
    exponent = float(curve.exponent[0])
    if curve.scale[0] == 0:
        found.append("the losses do not fall with size: no power law")
    elif not EXPONENTS[0] * 1.01 < exponent < EXPONENTS[1] * 0.99:
        found.append(f"the exponent {exponent:.2g} is at the end of the range searched: the sizes do not determine it")
    if curve.floor[0] == 0:
        found.append("the floor is at 0: these sizes show no floor")
    return tuple(found)


def _bootstrap(
    tables: list[tuple[np.ndarray, np.ndarray]], correlation: np.ndarray, resamples: int, seed: int
) -> list[tuple[_Curves, _Curves, float, int]]:
    """For each table: its fit, the fits of its redrawn data, the sd about the curve and its degrees of freedom.

    Args:
        correlation: of the tables' noise, run by run; the identity where tables differ in length.
    """
    generator = np.random.default_rng(seed)
    same = len({len(losses) for _, losses in tables}) == 1
    mixing = np.linalg.cholesky(correlation + 1e-12 * np.eye(len(tables)))
    noise = [generator.standard_normal((resamples, len(losses))) for _, losses in tables]
    doubt = [chi2.rvs(len(losses) - 3, size=(resamples, 1), random_state=generator) for _, losses in tables]
    if same:  # tables that share noise share what is not known of its sd
        noise = list(np.einsum("ij,jbn->ibn", mixing, np.stack(noise)))
        doubt = [doubt[0]] * len(tables)
    results = []
    for (sizes, losses), unit_noise, chi_square in zip(tables, noise, doubt, strict=True):
        x, df = sizes / sizes[0], len(losses) - 3
        fitted = _fit(x, losses[None])
        curve = fitted(x)
        sd = math.sqrt(float(((losses - curve[0]) ** 2).sum()) / df)
        sds = sd * np.sqrt(df / chi_square)
        drawn = _fit(x, curve + sds * unit_noise)
        results.append((fitted.curves(sizes[0]), drawn.curves(sizes[0]), sd, df))
    return results


@dataclass(frozen=True)
class _Solution:
    """Least-squares solutions of B data sets, each (B,), and their squared residuals; x are relative sizes."""

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    squares: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.floor[:, None] + self.scale[:, None] * x ** -self.exponent[:, None]

    def curves(self, unit: float) -> _Curves:
        return _Curves(self.floor, self.scale, self.exponent, unit)


def _fit(x: np.ndarray, y: np.ndarray) -> _Solution:
    """Fit B data sets y (B, n) at relative sizes x (n,)."""
    logs = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), _COARSE)
    squares = np.stack([_solve(x, y, np.full(len(y), log)).squares for log in logs])  # (coarse, B)
    best = squares.argmin(0)
    low, high = logs[np.maximum(best - 1, 0)], logs[np.minimum(best + 1, _COARSE - 1)]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = _solve(x, y, left).squares, _solve(x, y, right).squares
    for _ in range(_FINE):
        to_left = at_left <= at_right
        low, high = np.where(to_left, low, left), np.where(to_left, right, high)
        new = np.where(to_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = _solve(x, y, new).squares
        left, right = np.where(to_left, new, right), np.where(to_left, left, new)
        at_left, at_right = np.where(to_left, at_new, at_right), np.where(to_left, at_left, at_new)
    return _solve(x, y, (low + high) / 2)


def _solve(x: np.ndarray, y: np.ndarray, log_exponent: np.ndarray) -> _Solution:
    """E >= 0 and A >= 0 for given exponents (B,), in closed form."""
    exponent = np.exp(log_exponent)
    z = x ** -exponent[:, None]  # (B, n)
    z_mean, y_mean = z.mean(1), y.mean(1)
    centred = z - z_mean[:, None]
    scale = np.maximum((centred * y).sum(1) / (centred**2).sum(1), 0.0)
    floor = y_mean - scale * z_mean
    below = floor < 0
    scale = np.where(below, np.maximum((z * y).sum(1) / (z * z).sum(1), 0.0), scale)
    floor = np.where(below, 0.0, floor)
    squares = ((y - floor[:, None] - scale[:, None] * z) ** 2).sum(1)
    return _Solution(floor, scale, exponent, squares)
