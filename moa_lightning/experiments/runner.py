"""Runs what a grid still lacks, a few runs at a time, and survives what goes wrong.

A failed run does not stop the others. Ctrl-C and SIGTERM stop the runs under way and leave their checkpoints; the
next start continues there. What stops everything at once is a mistake that all runs would repeat: a metric that the
task does not report, a config file edited while the grid runs.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console

from moa_lightning.errors import UserError
from moa_lightning.experiments import sizes, state, worker
from moa_lightning.experiments.cluster import Jobs
from moa_lightning.experiments.executors import Ended, Executor, Local
from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Run
from moa_lightning.experiments.grid_file import digest
from moa_lightning.experiments.progress import Progress
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.sizes import Size
from moa_lightning.experiments.state import State

Question = Callable[[list[str]], Size]


@dataclass(frozen=True)
class Failure:
    run: Run
    reason: str  # last line of the log, or the signal that ended the run


def make_schedule(grid: Grid, question: Question = sizes.measure) -> Schedule:
    """The schedule of a grid on disk.

    Args:
        question: measures the size of a run from the arguments after `moa fit`; it is called in another process.
    """
    return Schedule(grid, Sizes(grid, question), Values())


class Values:
    """Looks up the deciding metric of runs; finished ones do not change."""

    def __init__(self) -> None:
        self.known: dict[Run, float] = {}

    def __call__(self, run: Run) -> float | None:
        if run not in self.known and state.state_of(run) is State.FINISHED:
            self.known[run] = state.deciding_value(run)
        return self.known.get(run)


class Sizes:
    """Looks up the sizes of nets, measures what is not known, and keeps it in the grid's folder."""

    def __init__(self, grid: Grid, question: Question) -> None:
        self.grid, self.question = grid, question
        self.path = grid.out / "sizes.json"
        self.known = sizes.read_sizes(self.path)

    def __call__(self, task: GridTask, variant: GridVariant, more: Mapping[str, str]) -> Size:
        run = self.grid.run(task, variant, 0, more)
        key = sizes.size_key(run)
        if key not in self.known:
            self.known[key] = worker.ask(self.question, run.config_arguments())
            sizes.write_sizes(self.path, self.known)
        return self.known[key]


def run_grid(
    schedule: Schedule,
    console: Console,
    restart_changed: bool = False,
    fit: worker.Fit = worker.moa,
    preload: tuple[str, ...] = worker.PRELOAD,
    job: tuple[str, ...] = worker.COMMAND,
) -> list[Failure]:
    """Run all that is not finished; returns the runs that failed.

    Args:
        restart_changed: delete and repeat runs made with another configuration, instead of refusing.
        fit: what is called in each run's process with the arguments after `moa`.
        preload: modules imported once for all runs.
        job: the command that executes a run's folder as a job of a batch system.

    Raises:
        UserError: for changed runs, a folder in use, a metric that a task does not report.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the executor has been stopped.
    """
    grid = schedule.grid
    claim = state.lock(grid.out)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((grid.out / ".compiled").absolute()))  # one for all runs
    try:
        state.keep_file(grid)
        worker.warm_up(preload)
        states = state.survey(schedule.runs(), allow_changed=restart_changed)
        finished = {run for run, where in states.items() if where is State.FINISHED}
        if finished:
            console.print(f"{len(finished)} of {schedule.total()} runs are finished already")
        if len(finished) == schedule.total():
            return []
        executor: Executor = (
            Local(grid.out, grid.jobs, grid.threads, fit)
            if grid.cluster is None
            else Jobs(grid.cluster, grid.out, grid.jobs, job)
        )
        with _terminate_as_interrupt(), Progress(grid.jobs, console) as progress:
            return _Work(schedule, executor, progress, finished, restart_changed).run()
    finally:
        os.close(claim)


@dataclass
class _Work:
    """Starts runs as they become known and there is room, until there are none. A run that another task has as well is
    made once, and copied."""

    schedule: Schedule
    executor: Executor
    progress: Progress
    finished: set[Run]
    restart_changed: bool

    def run(self) -> list[Failure]:
        failures: list[Failure] = []
        under_way: list[Run] = []
        try:
            under_way = self.executor.adopt(self.ready(self.waiting([], failures)))
            for run in under_way:
                self.progress.started(run, resumed=True)
            while True:
                waiting = _unlike(self.ready(self.waiting(under_way, failures)), under_way)
                self.progress.ahead(waiting, self.schedule.total() - len(self.finished) - len(failures))
                if not waiting and not under_way:
                    return [*failures, *self.left(failures)]
                under_way += self.start(waiting[: max(0, self.executor.room())])
                for ended in self.executor.wait() if under_way else []:
                    under_way.remove(ended.run)
                    failure = self.ended(ended)
                    failures += [failure] if failure else []
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.executor.stop()) from None
        except BaseException:
            self.executor.stop()
            raise

    def waiting(self, under_way: Sequence[Run], failures: Sequence[Failure]) -> list[Run]:
        """The runs that are known, and neither begun nor ended."""
        passed = {*self.finished, *under_way, *(failure.run for failure in failures)}
        return [run for run in self.schedule.runs() if run not in passed]

    def ready(self, runs: Sequence[Run]) -> list[Run]:
        """Those whose options name no run that has not finished."""
        done = {run.folder for run in self.finished}
        return [run for run in runs if all(need.folder in done for need in run.needs)]

    def left(self, failures: Sequence[Failure]) -> list[Failure]:
        """The runs that cannot begin, because one that they name has failed."""
        done = {run.folder for run in self.finished}
        missing = {
            run: next(need.folder for need in run.needs if need.folder not in done)
            for run in self.waiting([], failures)
        }
        return [
            Failure(run, f"not begun: it needs {folder}, which has not finished") for run, folder in missing.items()
        ]

    def start(self, runs: Sequence[Run]) -> list[Run]:
        """Start runs; returns those that are under way, without those that a changed choice has found finished."""
        states = state.survey(runs, self.restart_changed)
        made = {_kind(run): run for run in self.finished}
        for run in runs:
            if _kind(run) in made and states[run] in (State.NEW, State.CHANGED):
                _check_unedited(run)
                state.copy_finished(made[_kind(run)], run)
                states[run] = state.state_of(run)
                self.progress.copied(run, made[_kind(run)], finished=states[run] is State.FINISHED)
        self.finished |= {run for run, where in states.items() if where is State.FINISHED}
        begun = [run for run, where in states.items() if where is not State.FINISHED]
        for run in begun:
            _check_unedited(run)
            state.prepare(run, resume=states[run] is State.RESUME)
        if begun:
            self.executor.start(begun)
        for run in begun:
            self.progress.started(run, resumed=states[run] is State.RESUME)
        return begun

    def ended(self, ended: Ended) -> Failure | None:
        """Count a run that has ended; what went wrong where it has not finished."""
        reason = _reason(ended)
        self.progress.done(ended.run, reason)
        if reason is not None:
            return Failure(ended.run, reason)
        state.deciding_value(ended.run)
        self.finished.add(ended.run)
        return None


def _kind(run: Run) -> tuple[str, str]:
    """Runs of this kind are the same, but for the task that they belong to. (Two variants of a task that are configured
    alike are there to be compared, so they are not.)"""
    return run.variant, run.digest


def _unlike(runs: Sequence[Run], under_way: Sequence[Run]) -> list[Run]:
    """The runs without those that can be copied soon: from one under way, or one before them."""
    first = {_kind(run): run for run in (*reversed(runs), *under_way)}
    return [run for run in runs if first[_kind(run)] is run]


def _reason(ended: Ended) -> str | None:
    """Why a run that has ended is no finished one; None where it is."""
    if state.state_of(ended.run) is State.FINISHED:
        return None
    last = state.last_line(ended.run.folder / "log.txt")
    if ended.status is not None and ended.status < 0:
        return f"ended by {signal.Signals(-ended.status).name}; last line: {last}"
    return last if ended.status else f"ended without a result; last line: {last}"


def _check_unedited(run: Run) -> None:
    for config in run.config_files():
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
