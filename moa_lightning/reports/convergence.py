"""How a grid's variants come to their end: whether a target was reached, curves, times, and speed-ups."""

import math
from collections.abc import Mapping

from ..experiments.convergence import SpeedUp, final_by_seed, speed_ups, time_to_target
from ..experiments.grid import Grid, GridTask, Run
from ..experiments.plots import AXIS_LABELS, Traces, axes_figure, read_traces, svg
from ..experiments.ratios import Kind, mean_of
from ..experiments.state import Result
from ..experiments.statistics import SPEED_RUN_SD, SPEED_RUN_STEP, speed_run
from ..experiments.traces import AXES
from .content import Block, Picture, Table, Text, ratio_cell


def target(grid: Grid, task: GridTask, results: Mapping[Run, Result]) -> list[Block]:
    """Whether each variant's runs have reached the task's target, by modded-nanogpt's rules."""
    if task.target is None:
        return []
    lines = []
    for variant in grid.variants_of(task):
        mine = [
            r for run, r in results.items() if (run.task, run.variant, run.setting) == (task.name, variant.name, None)
        ]
        values = [result.metrics[task.final_metric] for result in mine]
        if not values or not all(map(math.isfinite, values)):
            lines.append([variant.name, str(len(values)), "", "", "", "a run diverged" if values else "no run yet"])
            continue
        found = speed_run(values, task.target, task.mode, task.target_sd or SPEED_RUN_SD)
        words = "reached" if found.passed else "not shown"
        if found.observed_sd > found.sd:
            words += ", but the runs' own sd is larger than the assumed one"
        p = "" if math.isnan(found.t_p) else f"{found.t_p:.2g}"
        lines.append([variant.name, str(found.n), f"{found.mean:.5g}", f"{found.margin:.3g}", p, words])
    sd = task.target_sd or SPEED_RUN_SD
    note = (
        f"modded-nanogpt's rule: (target - mean) · sqrt(n) of at least {SPEED_RUN_STEP / SPEED_RUN_SD * sd:.3g}, for a "
        f"standard deviation of one run of {sd:g} that is assumed; p: of a one-sided t-test, which assumes none (its "
        "wall-clock rule asks for 0.01)."
    )
    title = Text(f"{task.final_metric} {'≤' if task.mode == 'min' else '≥'} {task.target:g}")
    return [title, Table(("variant", "runs", "mean", "margin", "p", ""), lines, note)]


def convergence(grid: Grid, task: GridTask, results: Mapping[Run, Result]) -> list[Block]:
    """Curves on all axes, and how much of each a variant needs to come to its baseline's end, and to the target."""
    traces = read_traces(task, [run for run, r in results.items() if run.setting is None and not r.diverged])
    if not traces:
        return []
    order = [variant.name for variant in grid.variants]
    caption = (
        f"{task.name}: {task.metric} on the validation split against each axis that the runs counted; "
        "mean over seeds, band from the lowest to the highest"
    )
    blocks: list[Block] = [Picture(f"{task.name}-convergence", svg(axes_figure(task, traces, order)), "svg", caption)]
    found = {
        names: speed_ups(traces[names[0]], traces[names[1]], task.mode, final_by_seed(traces[names[1]]))
        for names in _pairs(grid, traces)
    }
    if found:
        note = (
            "How many times less a variant needs to reach the final value of its baseline's run with the same seed: "
            "above 1 it is faster; with 95 % t interval over seeds. Seeds that never reach it make it a bound."
        )
        lines = [
            [*names, *(f"{each.time} / {each.baseline_time}" for each in ups.values())] for names, ups in found.items()
        ]
        blocks.append(_speed_ups(found, note))
        axes = [AXIS_LABELS[axis] for axis in next(iter(found.values()))]
        note = "What both needed on average to get there, variant / baseline, in units of each axis."
        blocks.append(Table(("variant", "baseline", *axes), lines, note))
    return [*blocks, *_to_target(grid, task, traces, results)]


def _pairs(grid: Grid, traces: Traces) -> list[tuple[str, str]]:
    """The variants that have a curve, each with its baseline."""
    names = [(variant.name, grid.against(variant)) for variant in grid.variants]
    return [(name, other) for name, other in names if name != other and name in traces and other in traces]


def _speed_ups(found: Mapping[tuple[str, str], Mapping[str, SpeedUp]], note: str) -> Table:
    axes = [AXIS_LABELS[axis] for axis in next(iter(found.values()))]
    lines = [
        [
            *names,
            *(ratio_cell(each.speed_up) for each in ups.values()),
            f"{ups['steps'].reached} of {ups['steps'].seeds}",
        ]
        for names, ups in found.items()
    ]
    return Table(("variant", "baseline", *axes, "seeds that reach it"), lines, note)


def _to_target(grid: Grid, task: GridTask, traces: Traces, results: Mapping[Run, Result]) -> list[Block]:
    """What each variant needs to come to the task's target, where the curves are of the metric that has it."""
    if task.target is None:
        return []
    if task.test_metric is not None:
        return [Text(f"No time to the target: {task.test_metric} is measured once, at the end of a run.")]
    every = [trace for seeds in traces.values() for trace in seeds.values()]
    axes = [axis for axis in AXES if all(axis in trace.axes for trace in every)]
    lines = []
    for variant in grid.variants:
        if variant.name not in traces:
            continue
        times = {
            axis: [time_to_target(trace, task.target, axis, task.mode) for trace in traces[variant.name].values()]
            for axis in axes
        }
        reached = sum(time.kind in (Kind.EXACT, Kind.AT_MOST) for time in times["steps"])
        runs = sum((run.task, run.variant, run.setting) == (task.name, variant.name, None) for run in results)
        lines.append([variant.name, *(str(mean_of(each)) for each in times.values()), f"{reached} of {runs}"])
    note = (
        f"What a variant needed until {task.metric} first came to {task.target:g}, mean over its runs that did not "
        "diverge, between two validations along a straight line; runs that never reach it make it a bound."
    )
    labels = [AXIS_LABELS[axis] for axis in axes]
    blocks: list[Block] = [Table(("variant", *labels, "runs that reach it"), lines, note)]
    pairs = _pairs(grid, traces)
    found = {names: speed_ups(traces[names[0]], traces[names[1]], task.mode, task.target) for names in pairs}
    if found:
        note = f"How many times less a variant needs than its baseline until {task.metric} comes to {task.target:g}."
        blocks.append(_speed_ups(found, note))
    return blocks
