"""What a grid has cost: each variant against its baseline, then all runs together."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from ..experiments.grid import Grid, GridTask, Run
from ..experiments.progress import duration
from ..experiments.ratios import Measured, ratio_over_seeds
from ..experiments.state import Result
from ..experiments.statistics import CONFIDENCE
from .content import Block, Table, ratio_cell

Finished = Mapping[int, Result]  # by seed


def costs(grid: Grid, results: Mapping[Run, Result]) -> list[Block]:
    """The tables of a grid as far as it has come."""
    lines = [line for task in grid.tasks for line in _variants(grid, task, results)]
    side_by_side = "one run at a time" if grid.jobs == 1 else f"{grid.jobs} runs side by side"
    note = (
        "Of final runs that did not diverge, means over seeds. FLOPs: matrix products of all forward and backward "
        f"passes; seconds: of training, without validation, {side_by_side} as the grid has it, so they hold what else "
        f"the machine did; ratio of seconds: paired by seed, with its {CONFIDENCE:.0%} t interval."
    )
    titles = ("task", "variant", "parameters", "FLOPs", "/ baseline's", "seconds", "/ baseline's", "runs")
    return [*([Table(titles, lines, note)] if lines else []), _totals(grid, results)]


def _variants(grid: Grid, task: GridTask, results: Mapping[Run, Result]) -> list[list[str]]:
    found: dict[str, dict[int, Result]] = {}
    for run, result in results.items():
        if run.task == task.name and run.setting is None and not result.diverged:
            found.setdefault(run.variant, {})[run.seed] = result
    lines = []
    for variant in grid.variants:
        mine = found.get(variant.name)
        if mine is None:
            continue
        parameters = next((result.parameters for result in mine.values() if result.parameters is not None), None)
        flops, seconds = _flops(mine), [result.seconds for result in mine.values()]
        line = [task.name, variant.name, "" if parameters is None else f"{parameters:,}"]
        line += ["" if flops is None else f"{flops:.3g}", "", f"{fmean(seconds):.3g}", "", str(len(mine))]
        other = grid.against(variant)
        if other != variant.name and other in found:
            theirs = _flops(found[other])
            line[4] = f"{flops / theirs:.3f}" if flops and theirs else ""
            ratio = ratio_over_seeds(_times(mine), _times(found[other]))
            line[6] = ratio_cell(ratio) if ratio.n else ""
        lines.append(line)
    return lines


def _flops(found: Finished) -> float | None:
    """Mean over seeds; None where a run, of an older version, did not count them."""
    known = [result.flops for result in found.values() if result.flops is not None]
    return fmean(known) if len(known) == len(found) else None


def _times(found: Finished) -> dict[int, Measured]:
    return {seed: Measured(result.seconds) for seed, result in found.items() if result.seconds > 0}


def _totals(grid: Grid, results: Mapping[Run, Result]) -> Table:
    """What all runs of a kind have taken."""
    lines = []
    for task in grid.tasks:
        for kind, tuning in (("tuning", True), ("final", False)):
            found = [r for run, r in results.items() if run.task == task.name and bool(run.setting) == tuning]
            if found:
                seconds = sum(result.seconds for result in found if not math.isnan(result.seconds))
                diverged = sum(result.diverged for result in found)
                flops = _sum([result.flops for result in found if not result.diverged])
                lines.append([task.name, kind, str(len(found)), str(diverged), flops, duration(seconds)])
    return Table(("task", "runs", "finished", "diverged", "FLOPs", "training time"), lines)


def _sum(flops: Sequence[float | None]) -> str:
    known = [each for each in flops if each is not None]
    return f"{sum(known):.3g}" if known and len(known) == len(flops) else ""
