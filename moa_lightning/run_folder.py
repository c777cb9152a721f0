"""The folder of a run: which one it is, who may write into it, and that nothing stays of a run that never ran.

    <run_dir>/config.yaml, events.out.tfevents.*, metrics.csv, result.json, checkpoints/last.ckpt, predictions.npz

A process that a strategy launches learns the folder from the first one through the environment.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

RUN_DIR_VARIABLE = "MOA_RUN_DIR"
CONFIG, CHECKPOINTS, LAST = "config.yaml", "checkpoints", "last.ckpt"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def process_rank() -> int:
    """This process's number as its launcher tells it, before anything distributed is set up; 0 for a process alone."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def checkpoint_path(given: str | None, run_dir: str | None) -> str | None:
    """The checkpoint that --ckpt_path means; `last` is the last one in --run_dir.

    Raises:
        UserError: it does not exist, or `last` without --run_dir.
    """
    if given is None:
        return None
    if given == "last":
        if run_dir is None:
            raise UserError("--ckpt_path last needs --run_dir with the folder of the run")
        given = str(Path(run_dir) / CHECKPOINTS / LAST)
        if not Path(given).exists():
            raise UserError(f"'{run_dir}' holds no {CHECKPOINTS}/{LAST}; leave --ckpt_path out to start anew")
    if not Path(given).exists():
        raise UserError(f"checkpoint '{given}' does not exist; check --ckpt_path")
    inside = Path(given) / CHECKPOINTS / LAST
    if inside.exists():
        raise UserError(f"'{given}' is a run's folder; give its checkpoint, --ckpt_path {inside}")
    return given


def run_of_checkpoint(checkpoint: str) -> Path | None:
    """The run that a checkpoint lies in, None where it lies elsewhere."""
    run = Path(checkpoint).absolute().parent.parent
    return Path(os.path.relpath(run)) if (run / CONFIG).is_file() else None


def checkpoint_step(path: str) -> int:
    """The optimiser step that a checkpoint (a file, or a folder of shards) was saved at.

    Raises:
        UserError: it is no checkpoint of a run.
    """
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
        else:
            return folder


class FolderGuard:
    """Removes what a run has put into its folder when it turns out that nothing ran. Acts on the first process only.

    Args:
        given: the folder that the user named; None where new_run_dir makes one under `root`.
        root: folder of the runs.
    """

    def __init__(self, given: Path | None, root: Path) -> None:
        planned = (given or root).absolute()
        self.before = set(given.rglob("*")) if given is not None and given.is_dir() else set()
        self.existing = next(path for path in (planned, *planned.parents) if path.exists())

    def clean(self, run_dir: Path) -> None:
        """Remove the new files, then the new folders."""
        if process_rank() > 0 or not run_dir.is_dir():
            return
        for path in sorted(set(run_dir.rglob("*")) - self.before):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        folder = run_dir.absolute()
        while folder != self.existing and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def refuse_second_run(run_dir: Path, checkpoint: str | None) -> None:
    """Raise UserError where a folder holds a run already and none of it is continued."""
    if process_rank() == 0 and (run_dir / CONFIG).exists() and checkpoint is None:
        raise UserError(
            f"'{run_dir}' already holds a run; continue it with --ckpt_path last or choose another --run_dir"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"'{run_dir}' is a file; choose another --run_dir")


def saved_settings(config: Any) -> dict[str, Any]:
    """What of a run's config.yaml describes the run: not where it was stored, nor where it was continued."""
    return {key: value for key, value in config.items() if key not in ("run_dir", "ckpt_path", "weights_only")}
