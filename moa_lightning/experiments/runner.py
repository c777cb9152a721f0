"""Runs what a grid still lacks, a few runs at a time, and survives what goes wrong.

A failed run does not stop the others. Ctrl-C and SIGTERM stop the runs under way and leave their checkpoints; the
next start continues there. What stops everything at once is a mistake that all runs would repeat: a metric that the
task does not report, a config file edited while the grid runs.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from types import FrameType

from rich.console import Console

from moa_lightning.errors import UserError
from moa_lightning.experiments import state, worker
from moa_lightning.experiments.grid import Grid, Run, digest
from moa_lightning.experiments.progress import Progress
from moa_lightning.experiments.state import State


@dataclass(frozen=True)
class Failure:
    run: Run
    reason: str  # last line of the log, or the signal that ended the run


def run_grid(
    grid: Grid,
    console: Console,
    restart_changed: bool = False,
    fit: worker.Fit = worker.moa,
    preload: tuple[str, ...] = worker.PRELOAD,
) -> list[Failure]:
    """Run all that is not finished; returns the runs that failed.

    Args:
        restart_changed: delete and repeat runs made with another configuration, instead of refusing.
        fit: what is called in each run's process with the arguments after `moa`.
        preload: modules imported once for all runs.

    Raises:
        UserError: for changed runs, a folder in use, a metric that a task does not report.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the runs under way have been stopped.
    """
    claim = state.lock(grid.out)
    try:
        states = state.survey(grid, allow_changed=restart_changed)
        todo = [run for run, where in states.items() if where is not State.FINISHED]
        if len(todo) < len(states):
            console.print(f"{len(states) - len(todo)} of {len(states)} runs are finished already")
        if not todo:
            return []
        worker.warm_up(preload)
        resume = {run for run in todo if states[run] is State.RESUME}
        with _terminate_as_interrupt(), Progress(list(todo), grid.jobs, console) as progress:
            return _run_all(grid, todo, resume, progress, fit)
    finally:
        os.close(claim)


def _run_all(grid: Grid, todo: list[Run], resume: set[Run], progress: Progress, fit: worker.Fit) -> list[Failure]:
    waiting = list(todo)
    under_way: dict[ForkServerProcess, Run] = {}
    failures: list[Failure] = []
    try:
        while waiting or under_way:
            while waiting and len(under_way) < grid.jobs:
                run = waiting.pop(0)
                _check_unedited(run)
                state.prepare(run, resume=run in resume)
                arguments = run.arguments(resume=run in resume)
                under_way[worker.start(run, arguments, grid.out, grid.threads, fit)] = run
                progress.started(run, resumed=run in resume)
            wait([process.sentinel for process in under_way])
            for process in [process for process in under_way if process.exitcode is not None]:
                run = under_way.pop(process)
                reason = _reason(process, run)
                progress.done(run, reason)
                if reason is not None:
                    failures.append(Failure(run, reason))
                else:
                    state.check_metric(grid, run)
    finally:
        worker.stop(list(under_way))
    return failures


def _reason(process: ForkServerProcess, run: Run) -> str | None:
    """Why a run that has ended is no finished one; None where it is."""
    code = process.exitcode
    if code == 0 and state.state_of(run) is State.FINISHED:
        return None
    last = state.last_line(run.folder / "log.txt")
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}; last line: {last}"
    return last if code else f"ended without a result; last line: {last}"


def _check_unedited(run: Run) -> None:
    for config in run.configs:
        if digest(config.path) != config.digest:
            raise UserError(
                f"{config.name} was edited while the grid ran: undo it, or start again under another `out`."
            )


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A SIGTERM (a batch system, `kill`) ends the grid as cleanly as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
