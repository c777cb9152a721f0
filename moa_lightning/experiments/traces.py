"""A run's metric along its training, on every axis that was counted, and the band of several seeds' curves.

Axes: steps, samples, tokens, FLOPs (matrix products of forward and backward), seconds of training. They are the
counters of metrics.csv (callbacks/convergence.py); one that a task or an older run did not count is missing, not zero.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moa_lightning.errors import UserError

AXES = ("steps", "samples", "tokens", "flops", "seconds")
_COLUMNS = {"steps": "step"}  # names in metrics.csv, where they differ


@dataclass(frozen=True)
class Trace:
    """One seed's metric over its training; all arrays (P,), one entry a measured point, in order of steps."""

    values: np.ndarray
    axes: Mapping[str, np.ndarray]  # by names of AXES, those that were counted; each never falls

    def axis(self, name: str) -> np.ndarray:
        """The counts of one axis; UserError where the run did not count it."""
        if name not in self.axes:
            raise UserError(f"no curve against {name}: the run counted {', '.join(self.axes)}")
        return self.axes[name]

    @property
    def final(self) -> float:
        """The last value, NaN without any point."""
        return float(self.values[-1]) if len(self.values) else math.nan


def read_trace(path: Path, metric: str) -> Trace:
    """The points of a metrics.csv where the metric was logged; of several at one step the last counts.

    Raises:
        UserError: the file cannot be read or does not hold the metric.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = {int(row["step"]): row for row in csv.DictReader(file) if row.get(metric)}
        points = [rows[step] for step in sorted(rows)]
        if not points:
            raise KeyError(metric)
        axes = {}
        for name in AXES:
            cells = [point.get(_COLUMNS.get(name, name)) for point in points]
            if all(cells):
                axes[name] = np.array([float(cell) for cell in cells if cell])
        return Trace(np.array([float(point[metric]) for point in points]), axes)
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the curve of {metric} in {path} ({error!r}): repeat the run") from error


@dataclass(frozen=True)
class Band:
    """Curves of several seeds on one axis; all arrays (G,)."""

    axis: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray  # the lowest seed
    high: np.ndarray  # the highest seed
    seeds: int
    whole: bool  # it goes to the last point of every seed


def have_range(traces: Mapping[int, Trace], axis: str) -> bool:
    """Whether all seeds were somewhere on an axis at once: single points in seconds never are."""
    xs = [trace.axis(axis) for trace in traces.values()]
    return max(x[0] for x in xs) <= min(x[-1] for x in xs)


def band(traces: Mapping[int, Trace], axis: str, points: int = 200) -> Band:
    """Join seeds where all of them have been.

    Where every seed was measured at the same counts, as on the axis of steps, these are the points. Elsewhere (seconds
    never agree) each curve is interpolated linearly on `points` even counts of the range that all seeds cover. A seed
    that is NaN or infinite somewhere makes the band so there.

    Raises:
        UserError: no seeds, an axis that a run did not count, or no count that all seeds cover.
    """
    if not traces:
        raise UserError("a band of curves needs one finished seed or more")
    xs = [trace.axis(axis) for trace in traces.values()]
    start, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    if not have_range(traces, axis):
        raise UserError(f"the seeds' curves have no range of {axis} in common")
    if all(np.array_equal(x, xs[0]) for x in xs):
        x = xs[0]
        values = np.stack([trace.values for trace in traces.values()])
    else:
        x = np.linspace(start, end, points)
        values = np.stack([np.interp(x, own, trace.values) for own, trace in zip(xs, traces.values(), strict=True)])
    whole = all(own[-1] == end for own in xs)
    return Band(axis, x, values.mean(0), values.min(0), values.max(0), len(values), whole)
