"""What a run's folder says: not begun, to be continued, finished, or made by something else.

The grid keeps no list of its own. Each folder carries `run.json` (the fingerprint of the run, written before it
starts) and, once finished, the `result.json` of `moa fit`, or `diverged.json`; so a grid that was killed anywhere knows
where it stands, and a run under another configuration is noticed and never mixed in.
"""

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Grid, Run, Seeds
from moa_lightning.run_folder import CHECKPOINTS, HELD, LOCK, RESULT, TEST, last_checkpoint

RECORD = "run.json"  # what a run is and how it is run, written each time before it starts
LOG = "log.txt"  # what it prints
DIVERGED = "diverged.json"  # in place of a result
GRID = ".grid"  # folder in a grid's folder, with a copy of its file and its seeds
SEEDS = "seeds.json"
GRID_LOCK, RUNS_LOCK = ".lock", ".runs.lock"
LOCK_PATIENCE_SECONDS = 10.0  # runs of a killed grid need a moment to end


class State(StrEnum):
    NEW = "to run"
    RESUME = "to continue"
    FINISHED = "finished"
    CHANGED = "changed"


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    metrics: dict[str, float]
    """of the last validation, and of the test where there was one; NaN for a training that diverged"""
    parameters: int | None
    steps: int | None
    samples: int | None
    tokens: int | None
    seconds: float
    """training time"""
    flops: float | None = None
    """matrix products of forward and backward passes over all of the training"""

    @property
    def diverged(self) -> bool:
        return self.steps is None


def state_of(run: Run) -> State:
    """Where a run stands, from its folder alone."""
    if not run.folder.is_dir() or not any(run.folder.iterdir()):
        return State.NEW
    if not _record(run).is_file():
        raise UserError(f"{run.folder} holds files that no grid wrote: choose another `out`, or move them away.")
    if differences(run):
        return State.CHANGED
    if (run.folder / DIVERGED).is_file():
        return State.FINISHED
    if all(measured(run.folder, name) for name in (RESULT, *run.later_arguments())):
        return State.FINISHED
    return State.NEW if last_checkpoint(run.folder) is None else State.RESUME


def measured(folder: Path, pattern: str) -> Path | None:
    """The file in a run's folder whose name has this pattern; None before it is written."""
    return next((path for path in sorted(folder.glob(pattern)) if path.is_file()), None)


def differences(run: Run) -> list[str]:
    """The parts (config files, options) in which the stored fingerprint differs from the present one."""
    stored, present = _read_json(_record(run)).get("fingerprint"), run.fingerprint()
    if not isinstance(stored, dict):
        return sorted(present)
    return sorted(part for part in {*stored, *present} if stored.get(part) != present.get(part))


def survey(runs: Sequence[Run], allow_changed: bool = False) -> dict[Run, State]:
    """The state of each run; UserError for changed runs unless allowed, and for results without the grid's metric."""
    states = [(run, state_of(run)) for run in runs]
    changed = [run for run, state in states if state is State.CHANGED]
    if changed and not allow_changed:
        parts = ", ".join(differences(changed[0]))
        raise UserError(
            f"{len(changed)} of {len(states)} runs were made with another configuration (first: {changed[0].folder}, "
            f"different in {parts}): choose another `out`, or pass --restart-changed to `moa ablate` to repeat them."
        )
    for run, state in states:
        if state is State.FINISHED:
            deciding_value(run)
    return dict(states)


def deciding_value(run: Run) -> float:
    """The metric that a finished run is there for; UserError where the result does not hold it."""
    metrics = read_result(run).metrics
    for metric in _deciding(run):
        if metric not in metrics:
            raise UserError(
                f"{run.name} reports no {metric}, the metric of task {run.task}: "
                f"choose from {', '.join(sorted(metrics))}."
            )
    return metrics[run.test_metric or run.metric]


def read_result(run: Run) -> Result:
    """The result of a finished run; UserError where the file is damaged."""
    if (run.folder / DIVERGED).is_file():
        return Result(dict.fromkeys(_deciding(run), math.nan), None, None, None, None, math.nan)
    path = run.folder / RESULT
    raw = _read_json(path)
    try:
        metrics, seconds = _numbers(raw["metrics"]), float(raw["seconds"])
        counts = {key: _count(raw[key]) for key in ("parameters", "steps", "samples", "tokens")}
        flops = None if raw.get("flops") is None else float(raw["flops"])  # older runs have none
        if run.test_metric is not None:
            path = run.folder / TEST
            metrics |= _numbers(_read_json(path)["metrics"])
        for test in run.tests:
            path = measured(run.folder, test.result) or run.folder / test.folder
            found = _numbers(_read_json(path)["metrics"])
            metrics |= {test.outcome._replace(metric=name).column: value for name, value in found.items()}
        return Result(metrics, seconds=seconds, flops=flops, **counts)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a result of moa ({error!r}): delete the folder to repeat the run.") from error


def _deciding(run: Run) -> list[str]:
    """The metrics that it must report, by the names that they have in a result."""
    own = [metric for metric in (run.metric, run.test_metric) if metric is not None]
    return own + [test.outcome.column for test in run.tests]


def _count(number: int | None) -> int | None:
    return None if number is None else int(number)


def _numbers(metrics: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}


def prepare(run: Run, resume: bool) -> None:
    """Make the folder ready: as it is for a continuation, else empty, with the record of what is run."""
    if run.folder.exists() and not resume:
        discarded = run.folder.with_name(f".discarded-{run.folder.name}")
        shutil.rmtree(discarded, ignore_errors=True)
        run.folder.rename(discarded)  # first, so that a kill while deleting leaves no half-empty run
        shutil.rmtree(discarded)
    run.folder.mkdir(parents=True, exist_ok=True)
    record = {
        "fingerprint": run.fingerprint(),
        "configs": {str(config.path): config.digest for config in run.config_files()},
        "fit": run.arguments(),
        "later": run.later_arguments(),
    }
    draft = run.folder.with_name(f".{run.folder.name}.json")
    draft.write_text(json.dumps(record, indent=1))
    os.replace(draft, _record(run))


def copy_finished(source: Run, run: Run) -> None:
    """Make the folder of a run from that of a finished one that is the same: checkpoints are hard links where the disk
    has them. What only this one is measured by is left to do."""
    other = {RECORD, LOG, LOCK, *((HELD,) if source.freeze_gates != run.freeze_gates else ())}
    draft = run.folder.with_name(f".copied-{run.folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(
        source.folder,
        draft,
        symlinks=True,  # last.ckpt names its neighbour
        ignore=lambda folder, names: other & {*names} if Path(folder) == source.folder else (),
        copy_function=_link_checkpoint,
    )
    (draft / LOG).write_text(f"a copy of {source.name}, a run with the same fingerprint\n", encoding="utf-8")
    prepare(run, resume=False)
    os.replace(_record(run), draft / RECORD)
    run.folder.rmdir()
    draft.rename(run.folder)  # at once: a kill leaves all of it or nothing


def _link_checkpoint(source: str, target: str) -> None:
    if CHECKPOINTS in Path(source).parts[-3:]:  # a file, or a folder of shards: never written twice
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def keep_file(grid: Grid) -> None:
    """Keep a copy of the grid file and the seeds, which the command line may have named, for reports on the folder."""
    if grid.file is None:
        return
    folder = grid.out / GRID
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / SEEDS).write_text(json.dumps(asdict(grid.seeds)))
    shutil.copyfile(grid.file, folder / grid.file.name)


def kept_file(out: Path) -> Path | None:
    """That copy; None where the folder is no grid's."""
    return next((path for path in sorted((out / GRID).glob("*")) if path.name != SEEDS), None)


def kept_seeds(out: Path) -> Seeds | None:
    """The seeds with which a grid in that folder was started last; None where it has not been."""
    path = out / GRID / SEEDS
    if not path.is_file():
        return None
    kept = _read_json(path)
    try:
        return Seeds(tuple(map(int, kept["pilot"])), int(kept["most"]), float(kept["power"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold the seeds of a grid ({error!r}): start the grid again.") from error


def lock(out: Path) -> int:
    """Claim a grid's folder; returns a descriptor that holds the claim until closed.

    A second lock is shared by the runs (`share_lock`): a folder stays taken while runs of a killed grid are ending.
    """
    out.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + LOCK_PATIENCE_SECONDS
    claim = _claimed(out, GRID_LOCK, give_up)
    try:
        os.close(_claimed(out, RUNS_LOCK, give_up))
    except UserError:
        os.close(claim)
        raise
    return claim


def _claimed(out: Path, name: str, give_up: float) -> int:
    descriptor = os.open(out / name, os.O_RDWR | os.O_CREAT)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise UserError(
                    f"another `moa ablate` is at work in {out}: wait for it or choose another `out`."
                ) from None
            time.sleep(0.1)


def share_lock(out: Path) -> int:
    """Keep a grid's folder claimed from within a run."""
    descriptor = os.open(out / RUNS_LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def last_line(log: Path) -> str:
    """The last line of a log that says something, for the one-line report of a failure."""
    if not log.is_file():
        return "no log was written"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "the log is empty")


def _record(run: Run) -> Path:
    return run.folder / RECORD


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): delete the folder to repeat the run.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no `key: value` pairs: delete the folder to repeat the run.")
    return raw
