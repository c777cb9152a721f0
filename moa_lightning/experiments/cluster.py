"""Runs of a grid as jobs of a batch system, through submitit (github.com/facebookincubator/submitit).

What can be started at once goes into one job array. A job that nears its time limit, or is preempted, has its run save
a checkpoint, and is queued again; the run goes on from there. The grid's process only watches: it may be stopped and
started again, and finds the jobs that it has left by the `job.json` in their folders.

`kind: local` sends the same jobs through submitit's processes on this machine, for a try without a batch system.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_lightning.errors import UserError
from moa_lightning.experiments.executors import Ended
from moa_lightning.experiments.grid import Cluster, Run

JOB = "job.json"
POLL_SECONDS = {"slurm": 15.0, "local": 0.5}
SECONDS_TO_SAVE = 120.0  # before a job's end, for a checkpoint


class RunJob:
    """What a job executes: one run, in a process of its own, so that the grid's environment is all that it needs."""

    def __init__(self, folder: Path, command: tuple[str, ...]) -> None:
        self.folder, self.command = folder, command
        self.process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> int:
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, str(self.folder)], stdout=log, stderr=log, start_new_session=True
            )
        while (status := self.process.poll()) is None:
            time.sleep(0.2)  # not process.wait(): its lock would be held when a signal comes and checkpoint() waits too
        return status

    def checkpoint(self) -> Any:
        """Called by submitit shortly before the job's end: save, and queue the same again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return DelayedSubmission(RunJob(self.folder, self.command))


class Jobs:
    """The executor of grids with a `cluster`.

    Args:
        settings: kind of batch system, and the parameters of submitit's executor.
        out: the grid's folder; submitit's files go into `.jobs` in it.
        jobs: at a time (the job array's limit).
        command: what executes a run's folder.

    Raises:
        UserError: submitit is not installed, or refuses a parameter.
    """

    def __init__(self, settings: Cluster, out: Path, jobs: int, command: tuple[str, ...]) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError("a grid with `cluster` needs the package submitit: pip install submitit") from None
        self.folder, self.kind = (out / ".jobs").absolute(), settings.kind
        self.jobs, self.command = jobs, command
        parameters = dict(settings.parameters)
        if self.kind == "slurm":
            parameters.setdefault("slurm_array_parallelism", jobs)
        try:
            self.executor = submitit.AutoExecutor(self.folder / "%j", cluster=self.kind)
            self.executor.update_parameters(**parameters)
        except (NameError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"cluster: {' '.join(str(error).split())}") from error
        self.job_class = submitit.SlurmJob if self.kind == "slurm" else submitit.LocalJob
        self.under_way: dict[Run, Any] = {}

    def adopt(self, runs: Sequence[Run]) -> list[Run]:
        for run in runs:
            job = self._left_job(run)
            if job is not None:
                self.under_way[run] = job
        return list(self.under_way)

    def _left_job(self, run: Run) -> Any:
        """The job that works on a run since before this process; None where there is none."""
        try:
            number = str(json.loads((run.folder / JOB).read_text())["job"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if self.kind == "local":
            return _LocalJob(int(number)) if _alive(int(number)) else None
        job: Any = self.job_class(self.folder / "%j", number)
        return None if job.done(force_check=True) else job

    def room(self) -> int:
        """A batch system has room for everything: the array's limit says how much runs at a time."""
        return sys.maxsize if self.kind == "slurm" else self.jobs - len(self.under_way)

    def start(self, runs: Sequence[Run]) -> None:
        with self.executor.batch():
            jobs = [self.executor.submit(RunJob(run.folder.absolute(), self.command)) for run in runs]
        for run, job in zip(runs, jobs, strict=True):
            (run.folder / JOB).write_text(json.dumps({"job": job.job_id}))
            self.under_way[run] = job

    def wait(self) -> list[Ended]:
        while True:
            ended = [run for run, job in self.under_way.items() if job.done()]
            if ended:
                for run in ended:
                    del self.under_way[run]
                    (run.folder / JOB).unlink(missing_ok=True)
                return [Ended(run) for run in ended]
            time.sleep(POLL_SECONDS[self.kind])

    def stop(self) -> str:
        return (
            f"{len(self.under_way)} jobs are left to the batch system; the same command watches them again, "
            "and scancel ends them."
            if self.kind == "slurm"
            else f"{len(self.under_way)} jobs go on by themselves; the same command watches them again."
        )


class _LocalJob:
    """A job of `kind: local` from an earlier process of the grid, known by its process id."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def done(self) -> bool:
        return not _alive(self.pid)


def _alive(pid: int) -> bool:
    """Whether it is still submitit's process (ids are used again)."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
