"""Where the runs of a grid are executed: processes of this machine, or jobs of a batch system (cluster.py).

An executor only starts runs and tells when they have ended. What they came to stands in their folders.
"""

from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple, Protocol

from moa_lightning.experiments import worker
from moa_lightning.experiments.grid import Run


class Ended(NamedTuple):
    """A run that is no longer under way."""

    run: Run
    status: int | None = None
    """of its process, minus the number of the signal that ended it; None where it is not known"""


class Executor(Protocol):
    """Executes runs whose folders are prepared."""

    def adopt(self, runs: Sequence[Run]) -> list[Run]:
        """Those of these runs that an earlier grid process has started and that are still under way."""

    def room(self) -> int:
        """How many runs more may be started now."""

    def start(self, runs: Sequence[Run]) -> None:
        """Start runs, at most as many as there is room for."""

    def wait(self) -> list[Ended]:
        """Wait until runs have ended; returns them."""

    def stop(self) -> str:
        """The grid stops: end the runs, or leave them; returns what to tell the user."""


class Local:
    """Processes of this machine, forked from one that has imported everything, `jobs` at a time.

    Args:
        out: the grid's locked folder.
        threads: CPU threads for each run.
        fit: what is called with the arguments after `moa`.
    """

    def __init__(self, out: Path, jobs: int, threads: int, fit: worker.Fit = worker.moa) -> None:
        self.out, self.jobs, self.threads, self.fit = out, jobs, threads, fit
        self.under_way: dict[ForkServerProcess, Run] = {}

    def adopt(self, runs: Sequence[Run]) -> list[Run]:
        """None: they end with their grid."""
        return []

    def room(self) -> int:
        return self.jobs - len(self.under_way)

    def start(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self.under_way[worker.start(run, self.out, self.threads, self.fit)] = run

    def wait(self) -> list[Ended]:
        wait([process.sentinel for process in self.under_way])
        ended = [process for process in self.under_way if process.exitcode is not None]
        return [Ended(self.under_way.pop(process), process.exitcode) for process in ended]

    def stop(self) -> str:
        worker.stop(list(self.under_way))
        return "Stopped; finished runs are kept, the same command continues."
