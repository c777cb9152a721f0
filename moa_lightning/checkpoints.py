"""Checkpoints that are never half there, run no code, and are read by any number of processes.

A checkpoint is one file (one process, DDP) or a folder of shards (FSDP2, written by torch.distributed.checkpoint), and
every strategy reads both. It is written under another name beside its place and renamed when all of it is on the disk,
so a crash or a full disk leaves the one before. Writing happens in a thread, from a copy of the state, while training
goes on. What may be removed or linked after a save waits in the same queue, and is dropped when the save failed.

Reading unpickles nothing but tensors and plain containers. torch.distributed.checkpoint keeps its table of shards as a
pickle, so that is read with a list of the few classes it consists of; everything in a checkpoint that is not a tensor
lies in `meta.pt`.
"""

import os
import pickle
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
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import UserError

PARTIAL, REPLACED = ".partial", ".replaced"
META = "meta.pt"
MODEL, OPTIMIZER = "model", "optimizer"
_TABLE = "torch.distributed.checkpoint"
_TABLE_CLASSES = {
    **dict.fromkeys(
        (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{_TABLE}.metadata",
    ),
    "_StorageInfo": f"{_TABLE}.filesystem",
    "Size": "torch",
    "_get_layout": "torch.serialization",
    "PosixPath": "pathlib",
}


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


def split_tensors(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of weights and optimisers as model/<name> and optimizer<i>/<parameter>/<state>, and the rest."""
    tensors = {f"{MODEL}/{name}": value for name, value in checkpoint["state_dict"].items()}
    groups = []
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for name, state in optimizer["state"].items():
            tensors |= {f"{OPTIMIZER}{index}/{name}/{key}": value for key, value in state.items()}
        groups.append({"param_groups": optimizer["param_groups"]})
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    return tensors, {**rest, "optimizer_states": groups}


def join_tensors(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that split_tensors took apart; optimiser states by parameter name."""
    optimizers = [{"state": {}, **groups} for groups in rest["optimizer_states"]]
    weights: dict[str, Tensor] = {}
    for key, value in tensors.items():
        place, _, name = key.partition("/")
        if place == MODEL:
            weights[name] = value
        else:
            parameter, _, state = name.rpartition("/")
            optimizers[int(place.removeprefix(OPTIMIZER))]["state"].setdefault(parameter, {})[state] = value
    return {**rest, "state_dict": weights, "optimizer_states": optimizers}


def read_file(path: Path) -> dict[str, Any]:
    """A checkpoint in one file. Errors as in `RunCheckpointIO.load_checkpoint`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its readers raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = "it holds more than tensors and plain values, which could run code" if _refused(error) else "it is damaged"
    return UserError(f"checkpoint '{path}' is not read: {reason}; give one that a run of moa has written")


def _refused(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):
        return any(_refused(failure) for failure, _ in error.failures.values())
    return isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error)


def read_shards(path: Path) -> dict[str, Any]:
    """A checkpoint in a folder, put together for one process: optimiser states by parameter number, as torch's own."""
    try:
        reader = _Reader(path)
        sizes = reader.read_metadata().state_dict_metadata
        tensors = {name: _empty(entry) for name, entry in sizes.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        checkpoint = join_tensors(tensors, read_file(path / META))
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the readers raise whatever their parts raise
        raise _unreadable(path, error) from error
    return {**checkpoint, "optimizer_states": [_by_number(state) for state in checkpoint["optimizer_states"]]}


def _empty(entry: Any) -> Tensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise pickle.UnpicklingError("unsupported entry that is not a tensor")
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state by the parameters' numbers: their order in the groups, as torch counts them."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[n] for n in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {numbers[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}


def load_into(tensors: dict[str, Tensor], groups: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Fill tensors in place, sharded ones with their part, from a checkpoint in shards or in one file.

    Called by all processes. An optimiser state that the checkpoint lacks is left out of what is returned: the
    parameter had no gradient yet.

    Args:
        tensors: as split_tensors names them.
        groups: {"param_groups": [...]} of each optimiser, its parameters by name.

    Returns:
        The whole checkpoint, with the filled tensors in it and optimiser states by parameter name.

    Raises:
        UserError: damaged, or of another net.
    """
    try:
        checkpoint = _fill_from_shards(tensors, path) if path.is_dir() else _fill_from_file(tensors, groups, path)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the readers raise whatever their parts raise
        raise _unreadable(path, error) from error
    checkpoint["optimizer_states"] = checkpoint["optimizer_states"][: len(groups)]
    return checkpoint


def _fill_from_shards(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    reader = _Reader(path)
    known = _known(tensors, reader.read_metadata().state_dict_metadata, path)
    dcp.load(known, storage_reader=reader)
    return join_tensors(known, read_file(path / META))


def _fill_from_file(tensors: dict[str, Tensor], groups: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    checkpoint = read_file(path)
    states = zip(checkpoint["optimizer_states"], groups, strict=False)  # no optimisers where nothing is trained
    optimizers = [_by_name(state, group["param_groups"]) for state, group in states]
    whole, rest = split_tensors({**checkpoint, "optimizer_states": optimizers})
    known = _known(tensors, whole, path)
    for name, tensor in known.items():
        source = whole[name].to(tensor.device)
        if isinstance(tensor, DTensor):  # every process cuts its part from its own copy
            source = distribute_tensor(source, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(source)
    return join_tensors(known, rest)


def _known(tensors: dict[str, Tensor], sizes: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors that a checkpoint has; UserError where weights are missing or have another shape."""
    for name, tensor in tensors.items():
        size = getattr(sizes.get(name), "size", None)
        shape = size() if callable(size) else size
        if (shape is None and name.startswith(f"{MODEL}/")) or (shape is not None and shape != tensor.shape):
            there = "lacks it" if shape is None else f"has it in the shape {tuple(shape)}"
            raise UserError(
                f"the checkpoint '{path}' does not fit this net: of {name.partition('/')[2]} "
                f"{tuple(tensor.shape)} it {there}; leave -c and --model out to use the settings of its own run"
            )
    return {name: tensor for name, tensor in tensors.items() if name in sizes}


def _by_name(optimizer: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimiser's state as torch keeps it, by number, under the parameters' names, which `groups` list in order."""
    names = [name for group in groups for name in group["params"]]
    named = [{**saved, "params": own["params"]} for saved, own in zip(optimizer["param_groups"], groups, strict=True)]
    return {"state": {names[number]: state for number, state in optimizer["state"].items()}, "param_groups": named}


class _Reader(FileSystemReader):
    """torch's reader of shards, but for the pickle: the table of shards may consist of its own classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _TableUnpickler(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _TABLE_CLASSES.get(name) == module:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.2 pickles members of an enum so
            return _memory_format
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"unsupported class {module}.{name}")


def _memory_format(kind: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """The one attribute that a table may look up: a member of this enum, by its name."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"unsupported attribute {name!r}")
    return _MEM_FORMAT_ENCODING[name]
