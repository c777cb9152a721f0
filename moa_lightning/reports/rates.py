"""The metric against the tuned option, where one numeric option was tuned: what other values lose, plot, basins."""

import math
from collections.abc import Mapping
from statistics import fmean

from ..experiments.grid import GridTask, Run
from ..experiments.plots import rates_figure, svg
from ..experiments.rates import MULTIPLES, Losses, best_tried, lost_at, mean_over_seeds, rate_ratios, sensitivity
from ..experiments.schedule import Schedule, setting_name, settings
from ..experiments.state import Result
from ..experiments.statistics import CONFIDENCE, compare
from ..experiments.table import interval
from .content import Block, Picture, Table, Text, ratio_cell

WITHOUT_EFFECT = 0.01  # of the best value, stands for the smallest difference that matters where a task names none
LEAST_VALUES = 3  # of an option, for a curve


def tuned_values(schedule: Schedule, task: GridTask, results: Mapping[Run, Result]) -> list[Block]:
    """What tuning has shown of a task's option beyond the choice, or a sentence on why nothing."""
    if schedule.grid.tuning is None or not task.tune:
        return []
    option = next(iter(task.tune))
    names = [each.rpartition(".")[2] for each in task.tune]
    nothing = f"{task.name} has no plot of {task.metric} against {' and '.join(names)}: "
    if len(names) > 1:
        return [Text(f"{nothing}they were tuned together. runs.csv holds every run.")]
    if not all(map(_is_number, task.tune[option])):
        return [Text(f"{nothing}its values are not numbers. runs.csv holds every run.")]
    losses = {
        variant.name: found
        for variant in schedule.grid.variants
        if (found := _losses(schedule, task, variant.name, option, results))
    }
    if not losses:
        return [Text(f"{nothing}the tuning runs of no variant have all finished.")]
    values = sorted({value for found in losses.values() for value in found})
    tables = _lost(schedule, task, names[0], losses) if values[0] > 0 else []  # no multiples of a best value of 0
    if len(values) < LEAST_VALUES:
        tried = " and ".join(f"{value:g}" for value in values)
        return [*tables, Text(f"{nothing}only {tried} {'was' if len(values) == 1 else 'were'} tried.")]
    caption = f"{task.name}: {task.metric} against {names[0]}; a point a run, lines through means, crosses: diverged"
    figure = svg(rates_figure(task, names[0], losses))
    plot = Picture(f"{task.name}-{names[0]}", figure, "svg", caption)
    return [plot, *tables, *(_basins(schedule, task, losses) if values[0] > 0 else [])]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _losses(
    schedule: Schedule, task: GridTask, variant: str, option: str, results: Mapping[Run, Result]
) -> dict[float, dict[int, float]]:
    """value of the option -> seed -> metric, {} while runs are missing."""
    by_name = {(run.variant, run.setting, run.seed): result for run, result in results.items() if run.task == task.name}
    found: dict[float, dict[int, float]] = {}
    assert schedule.grid.tuning is not None
    for setting in settings(task):
        for seed in schedule.grid.tuning.seeds:
            result = by_name.get((variant, setting_name(setting), seed))
            if result is None:
                return {}
            found.setdefault(float(setting[option]), {})[seed] = result.metrics[task.metric]
    return found


def _lost(schedule: Schedule, task: GridTask, name: str, losses: Mapping[str, Losses]) -> list[Block]:
    """By how much the metric is worse at multiples of each variant's best value, and than for its baseline."""
    grid = schedule.grid
    lost = {
        variant: {multiple: lost_at(found, multiple, task.mode) for multiple in MULTIPLES}
        for variant, found in losses.items()
    }
    multiples = [each for each in MULTIPLES if any(found[each] is not None for found in lost.values())]
    if not multiples:
        return []
    lines, differences = [], []
    for variant in grid.variants:
        if variant.name not in losses:
            continue
        mine, best = lost[variant.name], best_tried(losses[variant.name], task.mode)
        there = "all diverged" if math.isnan(best) else f"{fmean(losses[variant.name][best].values()):.5g}"
        lines.append([variant.name, "" if math.isnan(best) else f"{best:g}", there])
        lines[-1] += [_mean(mine[multiple]) for multiple in multiples]
        other = grid.against(variant)
        if other != variant.name and other in losses:
            theirs = [lost[other][multiple] for multiple in multiples]
            cells = [_difference(mine[each], its) for each, its in zip(multiples, theirs, strict=True)]
            differences += [[variant.name, other, *cells]] if any(cells) else []
    assert grid.tuning is not None
    seeds = len(grid.tuning.seeds)
    over = f"mean over {seeds} tuning seeds" if seeds > 1 else "one tuning seed, so no interval"
    columns = [_times(multiple) for multiple in multiples]
    note = (
        f"How much worse {task.metric} is at multiples of a variant's best {name}, which is the same runs' choice; "
        f"{over}; as tried, nothing interpolated; empty: not tried."
    )
    blocks: list[Block] = [Table(("variant", f"best {name}", task.metric, *columns), lines, note)]
    if differences:
        note = (
            "The same, variant minus baseline, each at multiples of its own best value; paired by tuning seed, with "
            f"the {CONFIDENCE:.0%} t interval: below 0 the variant bears it better."
        )
        blocks.append(Table(("variant", "baseline", *columns), differences, note))
    return blocks


def _times(multiple: float) -> str:
    return f"× {multiple:g}" if multiple > 1 else f"× 1/{1 / multiple:g}"


def _mean(lost: Mapping[int, float] | None) -> str:
    if lost is None:
        return ""
    diverged = sum(not math.isfinite(value) for value in lost.values())
    return f"{diverged} of {len(lost)} diverged" if diverged else f"{fmean(lost.values()):+.2g}"


def _difference(mine: Mapping[int, float] | None, theirs: Mapping[int, float] | None) -> str:
    if mine is None or theirs is None or len(mine.keys() & theirs.keys()) < 2:
        return ""
    paired = compare(mine, theirs, "min")
    return paired.verdict if math.isnan(paired.mean) else interval(paired)


def _basins(schedule: Schedule, task: GridTask, losses: Mapping[str, Losses]) -> list[Block]:
    """Optimum and basin of each variant by the curve between the values tried, and ratios to its baseline's."""
    grid = schedule.grid
    means = [value for found in losses.values() for value in mean_over_seeds(found).values() if math.isfinite(value)]
    best = min if task.mode == "min" else max
    delta = task.effect or WITHOUT_EFFECT * abs(best(means, default=0.0))
    if delta == 0:
        return []  # nothing to measure a basin by
    lines = []
    for variant in grid.variants:
        if variant.name not in losses:
            continue
        one = sensitivity(mean_over_seeds(losses[variant.name]), delta, task.mode)
        line = [variant.name, str(one.optimum), f"{one.lowest} to {one.highest}", str(one.width)]
        other = grid.against(variant)
        if other != variant.name and other in losses:
            ratios = rate_ratios(losses[variant.name], losses[other], delta, task.mode)
            line += [ratio_cell(ratios.optimum), ratio_cell(ratios.highest)]
        else:
            line += ["", ""]
        lines.append([*line, one.at_edge])
    titles = ("variant", "optimum", "basin", "width", "optimum / baseline's", "largest / baseline's", "")
    note = (
        f"Optimum: of the parabola through the best value tried and its neighbours; basin: values around it whose "
        f"{task.metric} is less than {delta:.2g} worse than there, interpolated by parabolas; ratios over the tuning "
        "seeds."
    )
    return [Table(titles, lines, note)]
