"""Loss against size: for every task that an axis of the grid gives four sizes or more, where less is better."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ..experiments.grid import Grid, GridTask, Run
from ..experiments.plots import COLOURS, svg
from ..experiments.scaling import ScalingFit, fit_scaling, multipliers
from ..experiments.state import Result
from .content import Block, Picture, Section, Table, Text

LEAST_SIZES = 4
Losses = dict[str, dict[float, dict[int, float]]]  # variant -> trained parameters -> seed -> metric


def scaling_sections(grid: Grid, results: Mapping[Run, Result]) -> list[Section]:
    """A section for each task of the grid file that can be fitted."""
    sections = []
    for base in dict.fromkeys(task.base for task in grid.tasks):
        tasks = [task for task in grid.tasks if task.base == base and task.mode == "min"]
        losses = _losses(tasks, results)
        if losses and min(len(found) for found in losses.values()) >= LEAST_SIZES:
            sections.append(Section(f"{base}: loss and size", _blocks(grid, base, tasks[0].final_metric, losses)))
    return sections


def _losses(tasks: list[GridTask], results: Mapping[Run, Result]) -> Losses:
    names, metrics = {task.name for task in tasks}, {task.final_metric for task in tasks}
    losses: Losses = {}
    if len(metrics) != 1:
        return losses
    for run, result in results.items():
        if run.task in names and run.setting is None and result.parameters is not None:
            found = losses.setdefault(run.variant, {}).setdefault(float(result.parameters), {})
            found[run.seed] = result.metrics[next(iter(metrics))]
    return losses


def _blocks(grid: Grid, base: str, metric: str, losses: Losses) -> list[Block]:
    finite = {
        variant: found
        for variant, found in losses.items()
        if all(math.isfinite(loss) for seeds in found.values() for loss in seeds.values())
    }
    fits = {variant: fit_scaling(found) for variant, found in finite.items()}
    lines = [
        [variant, *(f"{v.value:.4g} [{v.low:.4g}, {v.high:.4g}]" for v in (fit.floor, fit.exponent)), f"{fit.sd:.2g}",
         "; ".join(fit.warnings)]
        for variant, fit in fits.items()
    ]  # fmt: skip
    blocks: list[Block] = [
        Picture(f"{base}-scaling", svg(_figure(metric, finite, fits)), "svg", f"{base}: {metric} against size, fitted"),
        Table(
            ("variant", "floor E", "exponent a", "sd of residuals", ""),
            lines,
            "E + A·N^-a with N the trained parameters; 95 % bootstrap intervals over sizes and seeds.",
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
    note = "How many times the parameters the baseline needs, by its fit, for the variant's loss at this size."
    titles = ("variant", "baseline", "parameters", "multiplier", "beyond the sizes measured")
    return [*blocks, Table(titles, rows, note)] if rows else blocks


def _figure(metric: str, losses: Losses, fits: Mapping[str, ScalingFit]) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (variant, found) in enumerate(losses.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(size, loss) for size, seeds in found.items() for loss in seeds.values()]
        axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=5)
        sizes = np.geomspace(min(found), max(found), 60)
        axes.plot(sizes, [fits[variant].predict(size) for size in sizes], color=colour, linewidth=1.4, label=variant)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"{metric} (less is better)")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.legend(loc="outside right center", frameon=False)
    return figure
