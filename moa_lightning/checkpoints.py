"""Checkpoints that are never half there, run no code, and are read by any number of processes.

A checkpoint is one file (one process, DDP) or a folder of shards (FSDP2, written by torch.distributed.checkpoint), and
every strategy reads both. It is written under another name beside its place and renamed when all of it is on the disk,
so a crash or a full disk leaves the one before. Writing happens in a thread, from a copy of the state, while training
goes on. What may be removed or linked after a save waits in the same queue, and is dropped when the save failed.
checkpoint_reading.py reads them.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from .checkpoint_reading import META, read_file, read_shards, split_tensors
from .errors import UserError

PARTIAL, REPLACED = ".partial", ".replaced"


class CheckpointQueue:
    """Runs jobs one after another in a thread.

    Once a job has failed the others are dropped, and the failure is raised where someone next waits.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those before it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last = self._executor.submit(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                job()
            except BaseException as error:  # raised again in the thread that waits
                self._failure = error

    def wait(self) -> None:
        """Return when all jobs are done; raise the failure of the one that failed."""
        if self._last is not None:
            self._last.result()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class RunCheckpointIO(CheckpointIO):
    """Writes, links, removes and reads checkpoints. Writing takes a copy of the state in memory."""

    def __init__(self) -> None:
        self.queue = CheckpointQueue()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint as one file.

        Raises:
            UserError: it, or the one before, could not be written.
        """
        if storage_options is not None:
            raise TypeError("storage_options are not offered")
        self.queue.wait()
        content, place = _copy(checkpoint), Path(path)
        self.queue.submit(lambda: _write(place, lambda partial: _save(content, partial)))

    def save_shards(self, checkpoint: dict[str, Any], path: Path, group: dist.ProcessGroup) -> None:
        """Write a checkpoint as a folder, each process its own part; called by all of them.

        Args:
            checkpoint: as Lightning composes it, its tensors sharded, optimiser states by parameter name.
            path: the folder.
            group: processes of the run, with a backend for the CPU and used for nothing else.
        """
        self.queue.wait()
        tensors, rest = split_tensors(checkpoint)
        own, others = _copy(tensors), _copy(rest) if dist.get_rank(group) == 0 else None
        self.queue.submit(lambda: _write_shards(own, others, path, group))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint as Lightning composes it, its tensors whole and on the CPU, from a file or a folder.

        Raises:
            UserError: damaged, or with more than tensors and plain values.
        """
        self.queue.wait()
        return read_shards(Path(path)) if os.path.isdir(path) else read_file(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint once what was saved before is on the disk."""
        self.queue.submit(lambda: remove(Path(path)))

    def link(self, path: Path, name: Path) -> None:
        """Make `name` a symbolic link to a checkpoint once that is on the disk."""
        self.queue.submit(lambda: _link(path, name))

    def teardown(self) -> None:
        self.queue.wait()


def _copy(content: Any) -> Any:
    """The content with its tensors on the CPU and in memory that training does not write into."""
    return apply_to_collection(content, Tensor, lambda t: t.detach().to("cpu", copy=True))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file or folder written under another name, then give it its own.

    Raises:
        UserError: it could not be written; nothing of it stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        write(partial)
        _replace(partial, path)
    except (OSError, RuntimeError, CheckpointException) as error:  # torch's writer makes a full disk a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: BaseException) -> UserError:
    if isinstance(error, CheckpointException):  # of several processes
        error = next(failure for failure, _ in error.failures.values())
    cause = error if isinstance(error, OSError) or not isinstance(error.__context__, OSError) else error.__context__
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
    return UserError(f"checkpoint {path} could not be written ({reason}); checkpoints saved before it are untouched")


def _save(content: Mapping[str, Any], file: Path) -> None:
    with file.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(source: Path, path: Path) -> None:
    """Rename; a folder that is in the way goes aside first, as the system renames onto files only."""
    aside = path.with_name(path.name + REPLACED)
    remove(aside)
    if path.is_dir() and not path.is_symlink():
        os.rename(path, aside)
    os.replace(source, path)
    _sync_folder(path.parent)
    remove(aside)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(path: Path, name: Path) -> None:
    draft = name.with_name(name.name + PARTIAL)
    remove(draft)
    draft.symlink_to(os.path.relpath(path, name.parent))
    _replace(draft, name)


def _write_shards(
    tensors: dict[str, Tensor], rest: dict[str, Any] | None, path: Path, group: dist.ProcessGroup
) -> None:
    """Every process writes its shards; the first one, which has `rest`, also prepares the folder and finishes it."""
    partial = path.with_name(path.name + PARTIAL)
    if rest is None:
        dist.barrier(group)
        try:
            dcp.save(tensors, storage_writer=FileSystemWriter(partial), process_group=group)
        except CheckpointException as error:
            raise _unwritable(path, error) from error
        return

    def write(folder: Path) -> None:
        try:
            folder.mkdir()
        finally:
            dist.barrier(group)
        dcp.save(tensors, storage_writer=FileSystemWriter(folder), process_group=group)
        _save(rest, folder / META)

    _write(path, write)
