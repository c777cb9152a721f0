"""WebDataset shards made addressable: an index of where each member of each sample lies in the tar file.

A shard is a plain tar; members that share a name up to the first dot of their file name form a sample, as in the
package webdataset. With the index a shard is a map-style data set like any other: a sample is read by one positioned
read, epochs have an exact length, and every number of workers or devices works with every number of shards. The index
is built from the tar headers once and kept beside the shard (or in the user's cache folder, where that place is
read-only), with the shard's size and time of change, which must still match. Nothing is executed: no pipes, no
addresses, no pickle. Nothing is unpacked: the names in a tar are keys, whatever path they spell. A shard and the index
beside it may be a stranger's, so an index is used only where each of its entries can be true of the shard.
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

from data.documents import encoded
from data.faults import BadSample, reading
from moa_lightning.errors import UserError

VERSION = 1
BLOCK = 512  # bytes; members of a tar start at multiples of it
MOST_CLASSES = 1_000_000  # a larger class number is taken for a mistake
MOST_SHARDS = 1_000_000
LONGEST_PATTERN, MOST_BRACES = 4096, 50  # characters, as of a path; and pairs of braces in it
_PICKLED = {"pickle", "pkl", "pyd", "pth", "pt"}
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_LETTERS = 58  # from A to z
_METADATA = re.compile(r"__[^/]*__($|/)")
# what the package tarfile raises on malformed headers
_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, LookupError, OverflowError, RecursionError)
UNLABELLED = -1

Span = tuple[int, int]  # offset and length, bytes
Stamp = tuple[int, int]  # size (bytes) and time of change (ns) of a shard


class Record(NamedTuple):
    """One sample of a shard."""

    key: str
    members: dict[str, Span]  # by extension, lower case
    label: int  # content of the member `cls`, UNLABELLED without one


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Paths of the shards that patterns name: `{000..003}` and `{a,b}` are spelled out, globs looked up.

    Raises:
        UserError: an address or a pipe, a shard that does not exist, a glob that matches nothing.
    """
    from braceexpand import braceexpand

    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not 0 < _size(pattern) <= MOST_SHARDS - len(paths):
            raise UserError(
                f"shard {pattern!r} must have braces that match and name {MOST_SHARDS:,} files at most: write a range "
                "as {000..009}"
            )
        for name in braceexpand(os.path.expanduser(pattern)):
            paths += _existing(name, pattern)
    if not paths:
        raise UserError("no shards were given: name a tar file, a glob or a range such as train-{000000..000009}.tar")
    return paths


def _size(pattern: str) -> int:
    """A bound on the names that a pattern has, 0 where it is none; the expansion itself would fill the memory first."""
    size = 1 if len(pattern) <= LONGEST_PATTERN and pattern.count("{") <= MOST_BRACES else 0
    while size and (found := _BRACES.search(pattern)):
        bounds = _RANGE.match(found[1])
        if bounds:
            size *= abs(int(bounds[2]) - int(bounds[1])) + 1
        else:
            size *= _LETTERS if ".." in found[1] else found[1].count(",") + 1
        pattern = pattern[: found.start()] + pattern[found.end() :]
    return 0 if "{" in pattern or "}" in pattern else size


def _existing(name: str, pattern: str) -> list[str]:
    """The files that a name or a glob means."""
    if name.startswith("pipe:") or "://" in name:
        raise UserError(f"shard {pattern!r} is a command or an address: only local tar files are read")
    found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    if not found or not all(os.path.isfile(path) for path in found):
        raise UserError(f"shard {name!r} does not exist (from {pattern!r}): check the path and the numbers")
    return found


class ShardIndex:
    """The samples of one shard and where they lie.

    Args:
        path: the tar file.

    Raises:
        UserError: not an uncompressed tar, cut off, empty, or with pickled members.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.stamp = size, changed = stamp_of(os.stat(path))
        stamp = {"version": VERSION, "size": size, "mtime_ns": changed}
        places = [Path(f"{path}.index.json"), _cache_folder() / f"{_path_digest(path)}.index.json"]
        stored = next((records for place in places if (records := _load(place, stamp))), None)
        self.records: list[Record] = stored or scan(path)
        if stored is None:
            _store(places, {**stamp, "samples": self.records})

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
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset < end or member.size < 0:  # a header may claim a size that leads back
                    raise UserError(f"shard {path} has the member {member.name!r} inside another one: write it again")
                end = member.offset_data
                _add(records, path, tar, member)
    except UserError:
        raise
    except _TAR_ERRORS as error:
        raise UserError(f"shard {path} is not an uncompressed tar file ({error}): write it again") from error
    if not records:
        raise UserError(f"shard {path} holds no samples: remove it or write it again")
    return records


def _add(records: list[Record], path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Enter a member into the records; folders, links, devices and names without extension are passed over."""
    parsed = _NAME.fullmatch(member.name)
    if not member.isfile() or parsed is None or _METADATA.match(member.name):
        return
    key, extension = parsed[1], parsed[2].lower()
    _check_member(path, member, extension)
    if not records or records[-1].key != key:
        records.append(Record(key, {}, UNLABELLED))
    if extension in records[-1].members:
        raise UserError(f"shard {path} has two members {member.name!r}: write it again")
    records[-1].members[extension] = (member.offset_data, member.size)
    if extension == "cls":
        records[-1] = records[-1]._replace(label=_label(path, tar, member))


def _check_member(path: str, member: tarfile.TarInfo, extension: str) -> None:
    if not _is_plain(extension):
        raise UserError(f"shard {path} has the pickled member {member.name!r}, which could run code: write it without")
    if member.issparse():
        raise UserError(f"shard {path} has the sparse member {member.name!r}: write it again without --sparse")


def _is_plain(extension: str) -> bool:
    return extension.rpartition(".")[2] not in _PICKLED


def _label(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = tar.extractfile(member)
    assert content is not None  # a regular file
    text = content.read(32)
    if not text.strip().isdigit() or int(text) >= MOST_CLASSES:
        raise UserError(f"shard {path} has {text!r} in {member.name!r}, where a class number was expected")
    return int(text)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "moa_lightning" / "shards"


def _path_digest(path: str) -> str:
    return hashlib.sha256(encoded(os.path.abspath(path))).hexdigest()[:32]


def _load(place: Path, stamp: dict[str, int]) -> list[Record] | None:
    """The records of a stored index that belongs to the shard as it is now; None where it cannot be true."""
    size = stamp["size"]
    try:
        # names take most of an index, and they stand in the shard too; JSON may need six characters for one of them
        if not place.is_file() or place.stat().st_size > 8 * size:
            return None
        content = json.loads(place.read_text())
        if any(content[name] != value for name, value in stamp.items()):
            return None
        return [_checked_record(entry, size) for entry in content["samples"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _checked_record(entry: Any, size: int) -> Record:
    """An entry of a stored index; an error where it is none, or where it points outside the shard."""
    key, members, label = entry
    spans = {end: (offset, length) for end, (offset, length) in members.items()}
    numbers = [label, *(number for span in spans.values() for number in span)]
    inside = all(
        offset >= BLOCK and offset % BLOCK == 0 and 0 <= length <= size - offset for offset, length in spans.values()
    )
    if not isinstance(key, str) or {type(number) for number in numbers} != {int}:
        raise TypeError
    if not spans or not inside or not UNLABELLED <= label < MOST_CLASSES or not all(map(_is_plain, spans)):
        raise ValueError
    return Record(key, spans, label)


def _store(places: list[Path], content: dict[str, Any]) -> None:
    """Keep an index at the first place that can be written; without one it is built again next time."""
    for place in places:
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("x") as file:  # never through a link that waits under this name
                file.write(json.dumps(content))
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
        self.stamps = [index.stamp for index in indices]
        # arrays, not lists of objects: worker processes share their memory
        self.shard = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
        self.spans = np.concatenate([index.spans(extensions) for index in indices])
        self.labels = np.array([record.label for index in indices for record in index.records], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, number: int, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop-1 of a member; all of it without bounds.

        Raises:
            BadSample: the shard is gone, was cut off or exchanged since it was indexed.
        """
        offset, length = self.spans[number].tolist()
        stop = length if stop is None else stop
        shard = int(self.shard[number])
        with reading(self.paths[shard], lambda: self.name(number)):
            file = open_unchanged(self.paths[shard], self.stamps[shard])
            content = os.pread(file.fileno(), stop - start, offset + start) if file else b""
        if file is None or len(content) < stop - start:
            what = "was changed" if file is None else "was cut off"
            raise BadSample(
                self.paths[shard], f"{self.name(number)} is gone: the shard {what} after it was indexed; put it back"
            )
        return content

    def file(self, number: int) -> str:
        """The shard of a sample."""
        return self.paths[int(self.shard[number])]

    def name(self, number: int) -> str:
        """Shard and key of a sample, for messages; its place in the shard where that can no longer be read."""
        shard = int(self.shard[number])
        place = number - int(np.searchsorted(self.shard, shard))
        keys = _keys(self.paths[shard], self.stamps[shard])
        key = repr(keys[place]) if place < len(keys) else f"number {place}"
        return f"sample {key} of shard {self.paths[shard]}"

    def sha256(self) -> str:
        """A digest of the shards' names, sizes and layout (not of their content)."""
        digest = hashlib.sha256(self.spans.tobytes())
        for path in self.paths:
            digest.update(encoded(f"{os.path.basename(path)}\0{os.path.getsize(path)}\n"))
        return digest.hexdigest()


class ShardSplits:
    """The shards of each split.

    Args:
        extensions: as for `ShardMembers`.
        patterns: shards of each split, as `expand` takes them; None leaves the split out.
    """

    def __init__(self, extensions: Sequence[str], **patterns: str | list[str] | None) -> None:
        self.extensions = extensions
        self.patterns = {split: value for split, value in patterns.items() if value}
        self.facts: dict[str, str | int] = {}

    def read(self) -> dict[str, ShardMembers]:
        """The members of each split by the shards' indices, which are built where they are missing; sets `facts`."""
        members = {split: ShardMembers(expand(value), self.extensions) for split, value in self.patterns.items()}
        self.facts = {
            "source": ", ".join(str(value) for value in self.patterns.values()),
            "shards": sum(len(part.paths) for part in members.values()),
            **{f"{split}_sha256": part.sha256() for split, part in members.items()},
        }
        return members


@lru_cache(maxsize=64)
def open_unchanged(path: str, stamp: Stamp) -> BinaryIO | None:
    """An open shard, None where it is not the one that was indexed.

    Positioned reads leave no state in it, so processes that were forked can share it.
    """
    return open(path, "rb", buffering=0) if stamp_of(os.stat(path)) == stamp else None


@lru_cache(maxsize=1)
def _keys(path: str, stamp: Stamp) -> list[str]:
    """Keys of a shard's samples; none where it is no longer the one that was indexed."""
    try:
        index = ShardIndex(path)
    except (OSError, UserError):
        return []
    return [record.key for record in index.records] if index.stamp == stamp else []


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns
