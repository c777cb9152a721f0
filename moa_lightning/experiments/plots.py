"""Convergence pictures: one PNG a task, its metric against steps, against seconds, and close up; a line per variant.

A line is the mean over seeds, its band the lowest to the highest seed. Steps at which every seed of a variant was
measured are drawn, at the mean of the seeds' seconds. The value axis leaves out the fall of the first steps, which
would flatten the part that the comparison is about. Colours are Okabe and Ito's, which stay apart for colour-blind
readers.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Grid, GridTask, Run

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # for more variants than colours
WARM_UP = 0.15  # share of the steps whose values may leave the value axis
CLOSE_UP = 1 / 3  # share of the steps in the close-up, where variants can be told apart
DOTS_PER_INCH = 200


@dataclass(frozen=True)
class Curve:
    """A variant's metric over its seeds; all lists have one entry a measured step."""

    variant: str
    seeds: int
    steps: list[int]
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def draw_convergence(grid: Grid, finished: list[Run]) -> list[Path]:
    """Draw `<out>/<task>.png` for every task with a finished run; returns the paths."""
    paths = []
    for task in grid.tasks:
        curves = []
        for variant in grid.variants:
            runs = [run for run in finished if (run.task, run.variant) == (task.name, variant.name)]
            if runs:
                curves.append(
                    make_curve(variant.name, [read_points(run.folder / "metrics.csv", task.metric) for run in runs])
                )
        if curves:
            path = grid.out / f"{task.name}.png"
            FigureCanvasAgg(_figure(task, curves, grid)).print_png(path)
            paths.append(path)
    return paths


def read_points(path: Path, metric: str) -> dict[int, tuple[float, float]]:
    """step -> (seconds, value) where the metric was logged; the last one of a step counts."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(metric)]
        return {int(row["step"]): (float(row["seconds"]), float(row[metric])) for row in rows}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the curve of {metric} in {path} ({error!r}): repeat the run.") from error


def make_curve(variant: str, seeds: list[dict[int, tuple[float, float]]]) -> Curve:
    """Join the seeds' points at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(points) for points in seeds)))
    values = [[points[step][1] for points in seeds] for step in steps]
    return Curve(
        variant=variant,
        seeds=len(seeds),
        steps=steps,
        seconds=[fmean(points[step][0] for points in seeds) for step in steps],
        mean=[fmean(each) for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
    )


def _figure(task: GridTask, curves: list[Curve], grid: Grid) -> Figure:
    figure = Figure(figsize=(12, 3.6), dpi=DOTS_PER_INCH, layout="constrained")
    by_steps, by_seconds, at_end = figure.subplots(1, 3)
    by_seconds.sharey(by_steps)
    order = [variant.name for variant in grid.variants]
    for curve in curves:
        position = order.index(curve.variant)
        colour, dash = COLOURS[position % len(COLOURS)], DASHES[position // len(COLOURS) % len(DASHES)]
        for axes, x in ((by_steps, curve.steps), (by_seconds, curve.seconds), (at_end, curve.steps)):
            axes.margins(x=0.02)
            axes.plot(x, curve.mean, color=colour, linestyle=dash, linewidth=1.6, label=curve.variant)
            axes.plot(x[-1:], curve.mean[-1:], color=colour, marker="o", markersize=4)
            axes.fill_between(x, curve.low, curve.high, color=colour, alpha=min(0.14, 0.6 / len(curves)), linewidth=0)
    last = max((curve.steps[-1] for curve in curves if curve.steps), default=1)
    for axes, start, label in (
        (by_steps, 0.0, "steps"),
        (by_seconds, 0.0, "training time in seconds"),
        (at_end, last * (1 - CLOSE_UP), "steps, the last third"),
    ):
        _style(axes, start, label)
    by_steps.set_ylim(*_limits(curves, WARM_UP * last))
    at_end.set_ylim(*_limits(curves, last * (1 - CLOSE_UP)))
    by_steps.set_ylabel(f"{task.metric} ({'less' if task.mode == 'min' else 'more'} is better)")
    _legend(figure, by_steps, curves, task.mode)
    figure.suptitle(f"{task.name}: {task.metric}, {_seeds(curves)}", fontsize=12, x=0.01, ha="left")
    return figure


def _style(axes: Axes, start: float, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(left=start)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes, curves: list[Curve], mode: str) -> None:
    """Names with their final values, the best first: it reads like the ends of the lines, without overlaps."""
    lines, names = axes.get_legend_handles_labels()
    finals = {curve.variant: curve.mean[-1] if curve.mean else math.nan for curve in curves}
    sign = 1 if mode == "min" else -1
    ranked = sorted(
        zip(lines, names, strict=True), key=lambda pair: (math.isnan(finals[pair[1]]), sign * finals[pair[1]])
    )
    labels = [f"{name}  {finals[name]:#.4g}" for _, name in ranked]
    handles = [line for line, _ in ranked]
    figure.legend(handles, labels, title="at the end", loc="outside right center", frameon=False, alignment="left")


def _limits(curves: list[Curve], begin: float) -> tuple[float | None, float | None]:
    """Value limits that hold all bands from the step `begin` on, with a margin."""
    kept = [
        value
        for curve in curves
        for step, low, high in zip(curve.steps, curve.low, curve.high, strict=True)
        for value in (low, high)
        if step >= begin and math.isfinite(value)
    ]
    if not kept or min(kept) == max(kept):
        return None, None
    margin = 0.05 * (max(kept) - min(kept))
    return min(kept) - margin, max(kept) + margin


def _seeds(curves: list[Curve]) -> str:
    counts = sorted({curve.seeds for curve in curves})
    if counts == [1]:
        return "one seed"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean of {number} seeds, band from the lowest to the highest"
