"""Checkpoints as tensors under names, and how they are read: whole, or the shards that a process needs.

Reading unpickles nothing but tensors and plain containers, and argparse.Namespace, in which the official checkpoints of
MAE and DINO keep their options: it holds attributes and runs no code. torch.distributed.checkpoint keeps its table of
shards as a pickle, so that is read with a list of the few classes it consists of; everything in a checkpoint that is
not a tensor lies in `meta.pt`.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from .errors import UserError
from .sharded import sharded_as

META = "meta.pt"
DOMAINS = VISION, LANGUAGE = "vision", "language"  # of a joint run
PARTS = "parts"  # in its checkpoint: what each task keeps beside its net
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
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever its readers raise
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no named tensors but a {type(content).__name__}; give a checkpoint of a run")
    return content


def is_joint(settings: Any) -> bool:
    """Whether a checkpoint's hyper-parameters are those of two tasks."""
    part = settings.get(VISION) if isinstance(settings, Mapping) else None
    return isinstance(part, Mapping) and "options" in part


def refuse_joint(content: Mapping[str, Any], path: object) -> None:
    """UserError where a checkpoint of one task is wanted and this one has two."""
    if is_joint(content.get("hyper_parameters")):
        raise joint_refused(path)


def joint_refused(path: object) -> UserError:
    return UserError(
        f"'{path}' is of a joint run; make its task a run of its own with moa export --to run --part vision (or "
        "language) and give that"
    )


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
        tensor.copy_(sharded_as(whole[name].to(tensor.device), tensor))
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
