"""Loss against size: wherever an axis of the grid gives a task four sizes or more, of nets or of budgets in tokens (or
samples), and less is better. Other axes of that task make fits of their own."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ..experiments.grid import Grid, GridTask, Run
from ..experiments.plots import COLOURS, svg
from ..experiments.scaling import LEAST_SIZES, Interval, ScalingFit, fit_scaling, multipliers
from ..experiments.state import Result
from .content import Block, Picture, Section, Table, Text

LEAST_RUNS = 5
Losses = dict[str, dict[float, dict[int, float]]]  # variant -> size -> seed -> metric
UNITS = {"parameters": "trained parameters", "tokens": "tokens", "samples": "samples"}  # of sizes, in this order


def scaling_sections(grid: Grid, results: Mapping[Run, Result]) -> list[Section]:
    """A section for each task of the grid file that can be fitted."""
    sections = []
    for name, tasks in _along_an_axis(grid).items():
        for unit in UNITS:
            losses = _losses(tasks, results, unit)
            if losses and all(map(_enough, losses.values())):
                blocks = _blocks(grid, f"{name}-{unit}", tasks[0].final_metric, losses, UNITS[unit])
                sections.append(Section(f"{name}: loss and {unit}", blocks))
                break
    return sections


def _along_an_axis(grid: Grid) -> dict[str, list[GridTask]]:
    """Tasks that differ in one axis only, by a name for what they share."""
    groups: dict[str, list[GridTask]] = {}
    for task in grid.tasks:
        for axis in task.axes if task.mode == "min" else ():
            rest = [f"{other} {value}" for other, value in task.axes.items() if other != axis]
            groups.setdefault(", ".join([f"{task.base}-{axis}", *rest]), []).append(task)
    return {name: tasks for name, tasks in groups.items() if len(tasks) >= LEAST_SIZES}


def _losses(tasks: list[GridTask], results: Mapping[Run, Result], unit: str) -> Losses:
    metrics = {task.name: task.final_metric for task in tasks}
    losses: Losses = {}
    for run, result in results.items():
        size = getattr(result, unit) if run.task in metrics and run.setting is None else None
        if size is not None:
            found = losses.setdefault(run.variant, {}).setdefault(float(size), {})
            found[run.seed] = result.metrics[metrics[run.task]]
    return losses


def _enough(found: Mapping[float, Mapping[int, float]]) -> bool:
    return len(found) >= LEAST_SIZES and sum(map(len, found.values())) >= LEAST_RUNS


def _blocks(grid: Grid, base: str, metric: str, losses: Losses, sizes: str) -> list[Block]:
    finite = {
        variant: found
        for variant, found in losses.items()
        if all(math.isfinite(loss) for seeds in found.values() for loss in seeds.values())
    }
    fits = {variant: fit_scaling(found) for variant, found in finite.items()}
    lines = [
        [variant, *map(_interval, (fit.floor, fit.scale, fit.exponent)), f"{fit.sd:.2g}", "; ".join(fit.warnings)]
        for variant, fit in fits.items()
    ]
    blocks: list[Block] = [
        Picture(
            f"{base}-scaling",
            svg(_figure(metric, finite, fits, sizes)),
            "svg",
            f"{base}: {metric} against size, fitted",
        ),
        Table(
            ("variant", "floor E", "scale A", "exponent a", "sd of residuals", ""),
            lines,
            f"E + A·N^-a with N the {sizes}; 95 % bootstrap intervals over sizes and seeds.",
        ),
    ]
    if missing := sorted(set(losses) - set(finite)):
        blocks.append(Text(f"Not fitted, as a run diverged: {', '.join(missing)}."))
    rows = []
    for variant in grid.variants:
        other = grid.against(variant)
        if variant.name != other and variant.name in finite and other in finite:
            for found in multipliers(finite[variant.name], finite[other]):
                interval = f"{found.multiplier} [{found.low:.2f}, {found.high:.2f}]"
                rows.append([variant.name, other, f"{found.size:,.0f}", interval, "yes" if found.extrapolated else ""])
    note = "How many times the size the baseline needs, by its fit, for the variant's loss at this size."
    titles = ("variant", "baseline", sizes, "multiplier", "beyond the sizes measured")
    return [*blocks, Table(titles, rows, note)] if rows else blocks


def _interval(found: Interval) -> str:
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def _figure(metric: str, losses: Losses, fits: Mapping[str, ScalingFit], unit: str) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (variant, found) in enumerate(losses.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(size, loss) for size, seeds in found.items() for loss in seeds.values()]
        axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=5)
        sizes = np.geomspace(min(found), max(found), 60)
        axes.plot(sizes, [fits[variant].predict(size) for size in sizes], color=colour, linewidth=1.4, label=variant)
    axes.set_xscale("log")
    axes.set_xlabel(unit)
    axes.set_ylabel(f"{metric} (less is better)")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.legend(loc="outside right center", frameon=False)
    return figure
