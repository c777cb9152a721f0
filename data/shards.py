"""WebDataset shards made addressable: an index of where each member of each sample lies in the tar file.

A shard is a plain tar; members that share a name up to the first dot of their file name form a sample, as in the
package webdataset. With the index a shard is a map-style data set like any other: a sample is read by one positioned
read, epochs have an exact length, and every number of workers or devices works with every number of shards. The index
is built from the tar headers once and kept beside the shard (or in the user's cache folder, where that place is
read-only), with the shard's size and time of change, which must still match. Nothing is executed: no pipes, no
addresses, no pickle.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moa_lightning.errors import UserError

VERSION = 1
_PICKLED = {"pickle", "pkl", "pyd", "pth", "pt"}
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")

Span = tuple[int, int]  # offset and length, bytes


class Record(NamedTuple):
    """One sample of a shard."""

    key: str
    members: dict[str, Span]  # by extension, lower case
    label: int  # content of the member `cls`, -1 without one


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths of the shards that patterns name: `{000..003}` and `{a,b}` are spelled out, globs looked up.

    Raises:
        UserError: an address or a pipe, a shard that does not exist, a glob that matches nothing.
    """
    from braceexpand import braceexpand

    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith("pipe:") or "://" in pattern:
            raise UserError(f"shard {pattern!r} is a command or an address: only local tar files are read")
        for name in braceexpand(os.path.expanduser(pattern)):
            found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
            if not found or not all(os.path.isfile(path) for path in found):
                raise UserError(f"shard {name} does not exist (from {pattern!r}): check the path and the numbers")
            paths += found
    if not paths:
        raise UserError("no shards were given: name a tar file, a glob or a range such as train-{000000..000009}.tar")
    return paths


class ShardIndex:
    """The samples of one shard and where they lie.

    Args:
        path: the tar file.

    Raises:
        UserError: not an uncompressed tar, cut off, empty, or with pickled members.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        status = os.stat(path)
        stamp = {"version": VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        places = [Path(f"{path}.index.json"), _cache_folder() / f"{_path_digest(path)}.index.json"]
        stored = next((content for place in places if (content := _load(place, stamp))), None)
        if stored is None:
            records = scan(path)
            _store(places, {**stamp, "samples": records})
        else:
            records = [
                Record(key, {end: (span[0], span[1]) for end, span in members.items()}, label)
                for key, members, label in stored["samples"]
            ]
        self.records: list[Record] = records

    def __len__(self) -> int:
        return len(self.records)

    def spans(self, extensions: Sequence[str]) -> np.ndarray:
        """Where the member lies that has one of the extensions, for every sample: int64 (N, 2), offset and length.

        Raises:
            UserError: a sample has none.
        """
        return np.array([self._span(record, extensions) for record in self.records], dtype=np.int64).reshape(-1, 2)

    def _span(self, record: Record, extensions: Sequence[str]) -> Span:
        found = next((record.members[end] for end in extensions if end in record.members), None)
        if found is None:
            wanted, given = ", ".join(extensions), ", ".join(record.members)
            raise UserError(f"sample {record.key!r} of shard {self.path} has no member {wanted} (it has {given})")
        return found


def scan(path: str) -> list[Record]:
    """Read the headers of a tar file. Errors as in `ShardIndex`."""
    records: list[Record] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parsed = _NAME.fullmatch(member.name)
                if not member.isfile() or parsed is None or _METADATA.match(member.name):
                    continue
                key, extension = parsed[1], parsed[2].lower()
                _check_member(path, member, extension)
                if not records or records[-1].key != key:
                    records.append(Record(key, {}, -1))
                if extension in records[-1].members:
                    raise UserError(f"shard {path} has two members {member.name}: write it again")
                records[-1].members[extension] = (member.offset_data, member.size)
                if extension == "cls":
                    records[-1] = records[-1]._replace(label=_label(path, tar, member))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {path} is not an uncompressed tar file ({error}): write it again") from error
    if not records:
        raise UserError(f"shard {path} holds no samples: remove it or write it again")
    return records


def _check_member(path: str, member: tarfile.TarInfo, extension: str) -> None:
    if extension.rpartition(".")[2] in _PICKLED:
        raise UserError(f"shard {path} has the pickled member {member.name}, which could run code: write it without")
    if member.issparse():
        raise UserError(f"shard {path} has the sparse member {member.name}: write it again without --sparse")


def _label(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = tar.extractfile(member)
    assert content is not None  # a regular file
    text = content.read(32)
    if not text.strip().isdigit():
        raise UserError(f"shard {path} has {text!r} in {member.name}, where a class number was expected")
    return int(text)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "moa_lightning" / "shards"


def _path_digest(path: str) -> str:
    return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]


def _load(place: Path, stamp: dict[str, int]) -> dict[str, Any] | None:
    """A stored index that belongs to the shard as it is now."""
    try:
        content = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    fits = isinstance(content, dict) and all(content.get(name) == value for name, value in stamp.items())
    return content if fits else None


def _store(places: list[Path], content: dict[str, Any]) -> None:
    """Keep an index at the first place that can be written; without one it is built again next time."""
    for place in places:
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content))
            os.replace(temporary, place)
            return
        except OSError:
            temporary.unlink(missing_ok=True)


class ShardMembers:
    """One member of every sample of several shards, read by number.

    Args:
        paths: the shards.
        extensions: which member, the first of these that a sample has.
    """

    def __init__(self, paths: Sequence[str], extensions: Sequence[str]) -> None:
        self.paths = list(paths)
        indices = [ShardIndex(path) for path in self.paths]
        # arrays, not lists of objects: worker processes share their memory
        self.shard = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
        self.spans = np.concatenate([index.spans(extensions) for index in indices])
        self.labels = np.array([record.label for index in indices for record in index.records], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, number: int, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop-1 of a member; all of it without bounds."""
        offset, length = self.spans[number].tolist()
        stop = length if stop is None else stop
        return os.pread(_open(self.paths[self.shard[number]]).fileno(), stop - start, offset + start)

    def name(self, number: int) -> str:
        """Shard and key of a sample, for messages."""
        shard = int(self.shard[number])
        key = ShardIndex(self.paths[shard]).records[number - int(np.searchsorted(self.shard, shard))].key
        return f"sample {key!r} of shard {self.paths[shard]}"

    def sha256(self) -> str:
        """A digest of the shards' names, sizes and layout (not of their content)."""
        digest = hashlib.sha256(self.spans.tobytes())
        for path in self.paths:
            digest.update(f"{os.path.basename(path)}\0{os.path.getsize(path)}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=64)
def _open(path: str) -> BinaryIO:
    """An open shard. Positioned reads leave no state in it, so processes that were forked can share it."""
    return open(path, "rb", buffering=0)
