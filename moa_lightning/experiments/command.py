"""`moa ablate GRID.yaml`: run a grid, then say in a table and in pictures what came out."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moa_lightning.errors import UserError
from moa_lightning.experiments import worker
from moa_lightning.experiments.grid import Grid, Seeds
from moa_lightning.experiments.grid_file import check_seeds, load_grid
from moa_lightning.experiments.runner import Failure, make_schedule, run_grid
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.state import State, read_result, survey
from moa_lightning.parser import Parser

FILE_WIDTH = 120  # columns of a table that goes into a file
INTERRUPTED = 130  # exit status after Ctrl-C, by convention 128 + SIGINT


def ablate_command(
    argv: list[str],
    resolve: Callable[[str], Path] | None = None,
    fit: worker.Fit = worker.moa,
    preload: tuple[str, ...] = worker.PRELOAD,
    job: tuple[str, ...] = worker.COMMAND,
) -> int:
    """The command; returns its exit status: 0, 1 where a run failed, 130 after an interrupt.

    Args:
        argv: what follows `moa ablate`.
        resolve: finds the file of a config fragment; by default in the working folder, then in the package.
        fit, preload: what a run calls in its process, and what is imported for it beforehand.
        job: the command that executes a run's folder as a job of a batch system.

    Raises:
        UserError: for a mistake in the grid file or the options.
    """
    options = _parser().parse_args(argv)
    grid = _load(options, resolve or _resolve_config)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, FILE_WIDTH))
    schedule = make_schedule(grid)
    if options.dry_run:
        worker.warm_up(preload)  # sizes are measured in processes forked from it
        return _dry_run(schedule, console, allow_changed=options.restart_changed)
    failures: list[Failure] = []
    if not options.table_only:
        try:
            failures = run_grid(schedule, console, options.restart_changed, fit, preload, job)
        except KeyboardInterrupt as stop:
            console.print(str(stop) or "Stopped.", markup=False, soft_wrap=True)
            return INTERRUPTED
    try:
        _report(schedule, console, allow_changed=options.restart_changed)
    finally:
        for failure in failures:
            text = f"FAILED {failure.run.name}: {failure.reason} ({failure.run.folder / 'log.txt'})"
            console.print(text, style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def _resolve_config(name: str) -> Path:
    from moa_lightning.configs import resolve_config

    return resolve_config(name)


def _parser() -> Parser:
    parser = Parser(
        "moa ablate",
        description="Train tasks x variants x seeds, skip what is finished, compare with the baseline.",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="the grid file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs, instead of the grid's `out`")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, instead of the grid's `jobs`")
    parser.add_argument("--seeds", metavar="0,1,2", help="seeds, instead of the grid's")
    parser.add_modules("as importing it runs its code")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print each run's state and command, train nothing")
    what.add_argument("--table-only", action="store_true", help="train nothing, read the finished runs")
    parser.add_argument(
        "--restart-changed",
        action="store_true",
        help="delete and repeat runs that were made with another configuration",
    )
    return parser


def _load(options: argparse.Namespace, resolve: Callable[[str], Path]) -> Grid:
    grid = load_grid(resolve(options.grid), resolve)
    for module in sorted(grid.modules - set(options.modules)):
        raise UserError(
            f"{options.grid} imports '{module}', which runs its code; if you trust it, add --import {module}."
        )
    if options.out is not None:
        grid = replace(grid, out=options.out)
    if options.jobs is not None:
        if options.jobs < 1:
            raise UserError(f"--jobs {options.jobs}: give the number of runs at a time, 1 or more.")
        grid = replace(grid, jobs=options.jobs)
    if options.seeds is not None:
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        except ValueError:
            raise UserError(
                f"--seeds {options.seeds}: give whole numbers with commas between, such as 0,1,2."
            ) from None
        fixed = check_seeds(seeds, "--seeds")
        if grid.tuning is not None and (both := sorted(set(fixed) & set(grid.tuning.seeds))):
            raise UserError(f"--seeds {options.seeds}: {both[0]} is a seed of the tuning runs; take another one.")
        grid = replace(grid, seeds=Seeds(fixed, len(fixed)))
    return grid


def _dry_run(schedule: Schedule, console: Console, allow_changed: bool) -> int:
    runs = schedule.runs()
    for run, where in survey(runs, allow_changed).items():
        console.print(
            f"{where}: {shlex.join(['moa', *run.arguments()])}", markup=False, highlight=False, soft_wrap=True
        )
    if schedule.total() > len(runs):
        console.print(f"and {schedule.total() - len(runs)} runs more, which tuning decides about")
    return 0


def _report(schedule: Schedule, console: Console, allow_changed: bool) -> None:
    """Write and print the table of what is finished, and draw it."""
    # matplotlib and scipy take a second to import, which --help and mistakes need not wait for
    from moa_lightning.experiments.plots import draw_convergence
    from moa_lightning.experiments.table import make_rows, print_table, write_tables
    from moa_lightning.reports.command import write_report
    from moa_lightning.reports.grid import grid_report

    grid = schedule.grid
    states = survey(schedule.runs(), allow_changed)
    finished = [run for run, where in states.items() if where is State.FINISHED]
    if not finished:
        console.print(f"No finished run in {grid.out}, so no table.")
        return
    results = {run: read_result(run) for run in finished}
    rows = make_rows(schedule, results)
    tables = write_tables(grid, rows, states, results)
    print_table(grid, rows, console)
    pictures = draw_convergence(grid, [run for run in finished if run.setting is None and not results[run].diverged])
    pages = write_report(grid_report(schedule), grid.out)
    for path in (*tables, *pictures, *pages):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    console.print(f"tensorboard --logdir {shlex.quote(str(grid.out))}", markup=False, highlight=False, soft_wrap=True)
