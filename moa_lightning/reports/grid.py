"""The report of a grid, also while it goes on: answer, convergence, learning rates, scaling, pictures, costs."""

from pathlib import Path

from ..errors import UserError
from ..experiments.grid import Grid, GridTask, Run
from ..experiments.power import MOST_SEEDS
from ..experiments.schedule import Schedule
from ..experiments.state import State, differences, read_result, survey
from ..experiments.table import Row, by_title, headings, make_rows, note
from .content import Block, Code, Picture, Report, Section, Table, Text
from .convergence import convergence, target
from .costs import costs
from .densities import densities
from .mixes import grid_mixes
from .rates import tuned_values
from .run import MIXES, pictures, provenance, samples
from .scaling import scaling_sections


def grid_report(schedule: Schedule) -> Report:
    """The report of a grid as far as it has come.

    Raises:
        UserError: a file of a run is damaged, or all that has finished was made with another configuration.
    """
    grid = schedule.grid
    states = survey(schedule.runs(), allow_changed=True)
    others = [run for run, where in states.items() if where is State.CHANGED]
    changed = len(others)
    results = {run: read_result(run) for run, where in states.items() if where is State.FINISHED}
    if others and not results:
        raise UserError(
            f"{grid.out} has no finished run of this configuration: {changed} were made with another one (first: "
            f"{others[0].folder}, different in {', '.join(differences(others[0]))}); bring back the config files and "
            "options that they were made with, or repeat them with moa ablate --restart-changed"
        )
    finals = [run for run, result in results.items() if run.setting is None and not result.diverged]
    rows = make_rows(schedule, results)
    sections = [Section("Answer", [*_answer(grid, rows), *_plans(schedule)])]
    for task in grid.tasks:
        blocks = [
            *target(grid, task, results),
            *convergence(grid, task, results),
            *tuned_values(schedule, task, results),
            *densities(_folders(grid, task, finals), f"{task.name}-densities"),
            *_shown(task, finals),
        ]
        mixes = _mixes(grid, task, finals)
        sections += [Section(task.name, blocks)] if blocks else []
        sections += [Section(f"{task.name}: what the mix learned", mixes)] if mixes else []
    sections += [
        *scaling_sections(grid, results),
        Section("Cost", costs(grid, results)),
        Section("Configuration", _configs(grid)),
        Section("Where it ran", provenance([run.folder for run in results])),
    ]
    return Report(grid.name, _lead(schedule, rows, len(results), changed), sections)


def _lead(schedule: Schedule, rows: list[Row], finished: int, changed: int) -> str:
    total, verdicts = schedule.total(), [row.difference.verdict for row in rows if row.difference is not None]
    counts = ", ".join(
        f"{verdicts.count(word)} {word}" for word in ("better", "worse", "no difference shown") if word in verdicts
    )
    counts = counts or "none judged yet"
    state = "All runs have finished" if finished == total else f"{finished} of {total} runs have finished"
    grid = schedule.grid
    return (
        f"{len(grid.variants)} variants on {len(grid.tasks)} tasks. {state}; of {grid.claims} comparisons: {counts}."
        + (f" {changed} runs were made with another configuration and are left out." if changed else "")
    )


def _answer(grid: Grid, rows: list[Row]) -> list[Block]:
    """A table a task and test, what the columns mean under the last."""
    names = [name for name in headings(grid) if name not in ("task", "metric")]
    blocks: list[Block] = []
    for title, mine in by_title(rows).items():
        cells = [row.cells() for row in mine]
        blocks.append(Text(title))
        blocks.append(Table(names, [[line[name] for name in names] for line in cells]))
    return [*blocks, Text(note(grid, names))]


def _plans(schedule: Schedule) -> list[Block]:
    """What each pilot has said about the number of seeds."""
    lines = []
    for task in schedule.grid.tasks:
        plan = schedule.plan(task)
        if plan is not None:
            runs = len(schedule.seeds(task))
            asked = f"{MOST_SEEDS:,} or more" if plan.needed >= MOST_SEEDS else str(plan.needed)
            enough = "" if plan.needed <= runs else "fewer than asked for: see the column detectable"
            lines.append([task.name, f"{task.effect:g}", f"{plan.sd:.2g}", asked, str(runs), enough])
    if not lines:
        return []
    note = (
        f"The number of seeds that show the effect with {schedule.grid.seeds.power:.0%} probability, by the spread of "
        "the pilot's paired differences."
    )
    return [Table(("task", "effect", "sd of a difference", "seeds asked for", "seeds", ""), lines, note)]


def _shown(task: GridTask, finals: list[Run], about: str = "") -> list[Block]:
    """Pictures and samples of each variant's first seed."""
    blocks: list[Block] = []
    first = {run.variant: run for run in reversed(finals) if run.task == task.name}
    for variant, run in sorted(first.items()):
        for picture in pictures(run.folder, about):
            name, caption = f"{task.name}-{variant}-{picture.name}", f"{variant}, seed {run.seed}: {picture.caption}"
            blocks.append(Picture(name, picture.content, picture.kind, caption))
        blocks += [Code(f"{variant}, seed {run.seed}: {each.title}", each.text) for each in samples(run.folder, about)]
    return blocks


def _mixes(grid: Grid, task: GridTask, finals: list[Run]) -> list[Block]:
    """Gates of all variants in a table, then the pictures and examples of each one's first seed."""
    return [*grid_mixes(_folders(grid, task, finals)), *_shown(task, finals, MIXES)]


def _folders(grid: Grid, task: GridTask, finals: list[Run]) -> dict[str, list[Path]]:
    """variant -> the folders of its finished runs."""
    ours = [run for run in finals if run.task == task.name]
    return {v.name: [run.folder for run in ours if run.variant == v.name] for v in grid.variants}


def _configs(grid: Grid) -> list[Block]:
    configs = [config for task in grid.tasks for config in task.configs]
    configs += [config for variant in grid.variants for config in variant.configs]
    files = {config.name: config.path for config in configs}
    blocks: list[Block] = []
    if grid.file is not None:
        blocks.append(Code(f"the grid: {grid.file.name}", grid.file.read_text(encoding="utf-8")))
    return [*blocks, *(Code(name, path.read_text(encoding="utf-8")) for name, path in files.items())]
