"""The folder of a run: which one it is, who may write into it, and that nothing stays of a run that never ran.

    <run_dir>/config.yaml, tokenizer.json (unless tokens are bytes), events.out.tfevents.*, metrics.csv,
    checkpoints/last.ckpt, result.json (a finished fit), test.json (moa test; of other data
    test-<what differs>.json), predictions.npz (moa predict)

A process that a strategy launches learns the folder from the first one through the environment.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

log = logging.getLogger(__name__)

RUN_DIR_VARIABLE = "MOA_RUN_DIR"
CONFIG, CHECKPOINTS, LAST = "config.yaml", "checkpoints", "last.ckpt"
TOKENIZER = "tokenizer.json"  # of a run on tokens that are not bytes
REWIND = "rewind.ckpt"  # of an early step, for winning tickets
RESULT, TEST, HELD = "result.json", "test.json", "held_gates.json"
PRUNING = "pruning.json"
LOCK = ".lock"
WRITTEN = (  # patterns of what a fit may have put into its folder before its first step is done
    CONFIG,
    "config-resumed.yaml",
    TOKENIZER,
    LOCK,
    "environment.json",
    "events.out.tfevents.*",
    "hparams.yaml",
    "metrics.csv*",
    "bad_samples.csv",
    "pruning.*",
    "mixing.json",
    CHECKPOINTS,
    "pictures",
    "samples",
    "skipped",
)
LATEST, AUTO = "last", "auto"  # what --ckpt_path may say instead of a path
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def process_rank() -> int:
    """This process's number as its launcher tells it, before anything distributed is set up; 0 for a process alone."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def checkpoint_path(given: str | None, run_dir: str | None) -> str | None:
    """The checkpoint that --ckpt_path means; `last` is the last one in --run_dir, `auto` the same if there is one.

    Raises:
        UserError: it does not exist, or `last` or `auto` without --run_dir.
    """
    if given is None:
        return None
    if given in (LATEST, AUTO):
        if run_dir is None:
            raise UserError(f"--ckpt_path {given} needs --run_dir with the folder of the run")
        last = last_checkpoint(Path(run_dir))
        if last is None and given == AUTO:
            return None
        if last is None:
            raise UserError(f"'{run_dir}' holds no {CHECKPOINTS}/{LAST}; leave --ckpt_path out to start anew")
        given = str(last)
    if not Path(given).exists():
        raise UserError(f"checkpoint '{given}' does not exist; check --ckpt_path")
    inside = Path(given) / CHECKPOINTS / LAST
    if inside.exists():
        raise UserError(f"'{given}' is a run's folder; give its checkpoint, --ckpt_path {inside}")
    return given


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from, None where it has none.

    It is the one that `last.ckpt` links to. A crash may come between a checkpoint and its link, and files may have been
    copied without links: then it is the newest that is complete.
    """
    folder = run_dir / CHECKPOINTS
    if (folder / LAST).exists():
        return folder / LAST
    complete = [path for path in folder.glob("*.ckpt") if path.exists()]
    return max(complete, key=lambda path: path.stat().st_mtime_ns, default=None)


def given_checkpoint(source: str) -> Path | None:
    """The checkpoint that an option means which names a run's folder or a checkpoint; None where there is none."""
    path = Path(source)
    found = last_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path
    return found if found is not None and found.exists() else None


def read_json(path: Path) -> Any:
    """What a file of a run's folder holds, None where it does not exist.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and try again") from error


def run_of_checkpoint(checkpoint: str) -> Path | None:
    """The run that a checkpoint lies in, None where it lies elsewhere."""
    run = Path(checkpoint).absolute().parent.parent
    return Path(os.path.relpath(run)) if (run / CONFIG).is_file() else None


def checkpoint_step(path: str) -> int:
    """The optimiser step that a checkpoint (a file, or a folder of shards) was saved at.

    Raises:
        UserError: it is no checkpoint of a run.
    """
    import torch  # here, because a grid asks this module about folders and need not wait for torch

    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    try:
        return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # torch.load raises whatever its readers raise
        raise UserError(f"'{path}' is not a checkpoint of a run of moa, or is damaged; give another one") from error


def new_run_dir(given: Path | None, root: Path) -> Path:
    """The folder that a fit writes into: the one given, the first process's, or <root>/version_<next>.

    Raises:
        UserError: several processes that nobody can tell a common default.
    """
    if RUN_DIR_VARIABLE in os.environ and process_rank() > 0:
        return Path(os.environ[RUN_DIR_VARIABLE])
    if given is not None:
        return given
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise UserError("under torchrun or Slurm name the run's folder with --run_dir, so that all processes agree")
    version = 0
    while True:
        folder = root / f"version_{version}"
        try:
            folder.mkdir(parents=True)  # at once, so that two runs started together get two folders
        except FileExistsError:
            version += 1
        except OSError as error:
            raise _unusable(folder, error) from error
        else:
            return folder


def _unusable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"the run's folder '{run_dir}' cannot be written ({error.strerror}); choose another --run_dir")


class FolderGuard:
    """Removes what a run has put into its folder when it turns out that nothing ran. Acts on the first process only.

    The folders of other runs stay, and so does what another program writes meanwhile into a folder that was there.

    Args:
        given: the folder that the user named; None where new_run_dir makes one under `root`.
        root: folder of the runs.
    """

    def __init__(self, given: Path | None, root: Path) -> None:
        planned = (given or root).absolute()
        self.patterns = WRITTEN if given is not None and given.is_dir() else ("*",)
        self.before = {path for name in self.patterns for path in _tree(given, name)} if given is not None else set()
        self.existing = next(path for path in (planned, *planned.parents) if path.exists())

    def clean(self, run_dir: Path) -> None:
        """Remove the new files, then the new folders."""
        if process_rank() > 0 or not run_dir.is_dir():
            return
        found = {path for name in self.patterns for path in _tree(run_dir, name)}
        for path in sorted(found - self.before, reverse=True):  # what is inside a folder before it
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
            elif not any(path.iterdir()):
                path.rmdir()
        folder = run_dir.absolute()
        while folder != self.existing and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _tree(folder: Path, pattern: str) -> Iterator[Path]:
    """The files and folders in a folder that have such a name, with all below them but the folders of runs."""
    for path in folder.glob(pattern):
        inside = path.is_dir() and not path.is_symlink()
        if not (inside and any((path / name).exists() for name in (CONFIG, LOCK))):
            yield path
            if inside:
                yield from _tree(path, "*")


def refuse_second_run(run_dir: Path, checkpoint: str | None, restart: bool) -> None:
    """Raise UserError where a folder holds a run already and none of it is continued.

    Args:
        restart: a run that has no checkpoint yet may begin anew.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"'{run_dir}' is a file; choose another --run_dir")
    if process_rank() > 0 or checkpoint is not None or not (run_dir / CONFIG).exists():
        return
    if not restart or last_checkpoint(run_dir) is not None:
        raise UserError(
            f"'{run_dir}' already holds a run; continue it with --ckpt_path last or choose another --run_dir"
        )
    for path in (run_dir / CONFIG, *run_dir.glob("events.out.tfevents.*")):  # of the attempt that left nothing
        path.unlink()


class FolderLock:
    """Held by the first process of a fit as long as it lives, so that no second one writes into the same folder.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / LOCK).open("w")
        except OSError as error:
            raise _unusable(run_dir, error) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock it is not inherited by workers
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise UserError(f"another process is training into '{run_dir}'; choose another --run_dir") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no second run uses it", run_dir, error.strerror)


def saved_settings(config: Any) -> dict[str, Any]:
    """What of a run's config.yaml describes the run: not where it was stored, nor where it was continued."""
    return {
        key: value
        for key, value in config.items()
        if key not in ("run_dir", "ckpt_path", "weights_only", "folder", "out")
    }
