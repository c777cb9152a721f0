"""Pictures of a grid: convergence on every axis, loss against a tuned option. A line per variant.

A line is the mean over seeds, its band the lowest to the highest seed (traces.py). The value axis leaves out the fall
of the first steps, which would flatten the part that the comparison is about. Colours are Okabe and Ito's, which stay
apart for colour-blind readers.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

from moa_lightning.experiments.grid import Grid, GridTask, Run
from moa_lightning.experiments.traces import AXES, Band, Trace, band, have_range, read_trace

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # for more variants than colours
WARM_UP = 0.15  # share of the steps whose values may leave the value axis
CLOSE_UP = 1 / 3  # share of the steps in the close-up, where variants can be told apart
DOTS_PER_INCH = 200
AXIS_LABELS = {"steps": "steps", "samples": "samples", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}

Traces = Mapping[str, Mapping[int, Trace]]  # variant -> seed -> curve


def read_traces(task: GridTask, finished: Sequence[Run]) -> dict[str, dict[int, Trace]]:
    """The curves of a task's metric, by variant and seed; variants without a run are left out."""
    traces: dict[str, dict[int, Trace]] = {}
    for run in finished:
        if run.task == task.name:
            traces.setdefault(run.variant, {})[run.seed] = read_trace(run.folder / "metrics.csv", task.metric)
    return traces


def draw_convergence(grid: Grid, finished: Sequence[Run]) -> list[Path]:
    """Draw `<out>/<task>.png` for every task with a finished run: its metric against steps, against seconds, and close
    up; returns the paths."""
    paths = []
    for task in grid.tasks:
        traces = read_traces(task, finished)
        if traces:
            path = grid.out / f"{task.name}.png"
            FigureCanvasAgg(_overview(task, traces, grid)).print_png(path)
            paths.append(path)
    return paths


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "moa"}):
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return content.getvalue()


def axes_figure(task: GridTask, traces: Traces, order: Sequence[str]) -> Figure:
    """The metric against everything that all of the runs have counted: steps, tokens or samples, FLOPs, seconds."""
    counted = [name for name in AXES if all(name in t.axes for seeds in traces.values() for t in seeds.values())]
    names = [
        name
        for name in counted
        if (name != "samples" or "tokens" not in counted) and any(have_range(seeds, name) for seeds in traces.values())
    ]
    figure = Figure(figsize=(11, 3.6 * math.ceil(len(names) / 2)), dpi=DOTS_PER_INCH, layout="constrained")
    panels = np.atleast_1d(figure.subplots(math.ceil(len(names) / 2), 2, sharey=True)).ravel()
    for axes, name in zip(panels, names, strict=False):
        for variant, seeds in traces.items():
            if have_range(seeds, name):
                _draw(axes, band(seeds, name), *_look(order, variant), label=variant)
        _style(axes, 0.0, AXIS_LABELS[name])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    bands = [band(seeds, "steps") for seeds in traces.values()]
    panels[0].set_ylim(*_limits(bands, WARM_UP * _last(bands)))
    for axes in panels[::2]:
        axes.set_ylabel(_metric(task))
    _legend(figure, panels[0], traces, task.mode)
    return figure


def rates_figure(task: GridTask, option: str, losses: Mapping[str, Mapping[float, Mapping[int, float]]]) -> Figure:
    """The metric against a tuned number: a point a run, a line through the means; diverged runs as crosses on top.

    Args:
        losses: variant -> value of the option -> seed -> metric.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    order = list(losses)
    for variant, found in losses.items():
        colour, dash = _look(order, variant)
        values = sorted(found)
        finite = [value for value in values if all(map(math.isfinite, found[value].values()))]
        axes.plot(
            finite, [fmean(found[value].values()) for value in finite], color=colour, linestyle=dash, label=variant
        )
        for value in values:
            points = list(found[value].values())
            kept = [point for point in points if math.isfinite(point)]
            axes.plot([value] * len(kept), kept, ".", color=colour, markersize=5)
            if len(kept) < len(points):
                axes.plot([value], [1.0], "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
    if min(value for found in losses.values() for value in found) > 0:
        axes.set_xscale("log")
    _style(axes, None, option)
    axes.xaxis.set_major_locator(FixedLocator(sorted({v for found in losses.values() for v in found})))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(_metric(task))
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _overview(task: GridTask, traces: Traces, grid: Grid) -> Figure:
    figure = Figure(figsize=(12, 3.6), dpi=DOTS_PER_INCH, layout="constrained")
    by_steps, by_seconds, at_end = figure.subplots(1, 3)
    by_seconds.sharey(by_steps)
    order = [variant.name for variant in grid.variants]
    bands = {variant: band(seeds, "steps") for variant, seeds in traces.items()}
    for variant, seeds in traces.items():
        look = _look(order, variant)
        _draw(by_steps, bands[variant], *look, label=variant)
        if have_range(seeds, "seconds"):
            _draw(by_seconds, band(seeds, "seconds"), *look)
        _draw(at_end, bands[variant], *look)
    last = _last(bands.values())
    for axes, start, label in (
        (by_steps, 0.0, "steps"),
        (by_seconds, 0.0, "training time in seconds"),
        (at_end, last * (1 - CLOSE_UP), "steps, the last third"),
    ):
        _style(axes, start, label)
    by_steps.set_ylim(*_limits(bands.values(), WARM_UP * last))
    at_end.set_ylim(*_limits(bands.values(), last * (1 - CLOSE_UP)))
    by_steps.set_ylabel(_metric(task))
    _legend(figure, by_steps, traces, task.mode)
    figure.suptitle(f"{task.name}: {task.metric}, {_seeds(traces)}", fontsize=12, x=0.01, ha="left")
    return figure


def _look(order: Sequence[str], variant: str) -> tuple[str, object]:
    """Colour and dash of a variant by its place in the grid."""
    position = list(order).index(variant)
    return COLOURS[position % len(COLOURS)], DASHES[position // len(COLOURS) % len(DASHES)]


def _draw(axes: Axes, curve: Band, colour: str, dash: object, label: str = "") -> None:
    axes.margins(x=0.02)
    axes.plot(curve.x, curve.mean, color=colour, linestyle=dash, linewidth=1.6, label=label)
    if curve.whole:  # elsewhere the line ends where the first seed did, above the final value in the legend
        axes.plot(curve.x[-1:], curve.mean[-1:], color=colour, marker="o", markersize=4)
    axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)


def _metric(task: GridTask) -> str:
    return f"{task.metric} ({'less' if task.mode == 'min' else 'more'} is better)"


def _last(bands: Iterable[Band]) -> float:
    return max((float(each.x[-1]) for each in bands), default=1.0)


def _style(axes: Axes, start: float | None, label: str) -> None:
    axes.set_xlabel(label)
    if start is not None:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=start)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes, traces: Traces, mode: str) -> None:
    """Names with their final values, the best first: it reads like the ends of the lines, without overlaps."""
    lines, names = axes.get_legend_handles_labels()
    finals = {variant: fmean(trace.final for trace in seeds.values()) for variant, seeds in traces.items()}
    sign = 1 if mode == "min" else -1
    ranked = sorted(
        zip(lines, names, strict=True), key=lambda pair: (math.isnan(finals[pair[1]]), sign * finals[pair[1]])
    )
    labels = [f"{name}  {finals[name]:#.4g}" for _, name in ranked]
    handles = [line for line, _ in ranked]
    figure.legend(handles, labels, title="at the end", loc="outside right center", frameon=False, alignment="left")


def _limits(bands: Iterable[Band], begin: float) -> tuple[float | None, float | None]:
    """Value limits that hold all bands from the step `begin` on, with a margin."""
    kept = [
        float(value)
        for curve in bands
        for step, low, high in zip(curve.x, curve.low, curve.high, strict=True)
        for value in (low, high)
        if step >= begin and math.isfinite(value)
    ]
    if not kept or min(kept) == max(kept):
        return None, None
    margin = 0.05 * (max(kept) - min(kept))
    return min(kept) - margin, max(kept) + margin


def _seeds(traces: Traces) -> str:
    counts = sorted({len(seeds) for seeds in traces.values()})
    if counts == [1]:
        return "one seed"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean of {number} seeds, band from the lowest to the highest"
