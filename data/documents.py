"""Where text comes from: the interpreter's own standard library, or any files; and how documents are split.

The standard library is a corpus that every machine has: about 12 MB of Python 3.11 without its tests. Reading all of it
takes well under a second from a warm disk, so nothing is cached. A split goes by file: in the standard library by a
hash of the file's name, elsewhere by one of the text's beginning, as in token files. So a file stays on its side when
others come or go, when it moves, and when another folder is named beside its own.
"""

import codecs
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from data.faults import OnBadSample
from moa_lightning.errors import UserError

Encoding = Literal["bytes", "utf-8"]
NO_UTF8 = "repair it, or choose data.encoding bytes or data.on_bad_sample skip"
SPLITS = ("train", "val", "test")
PIECE = 256 * 1024  # bytes
_BREAK = re.compile(rb"(?<=\S)\n(?=\S)")
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}
_LINES = (".jsonl", ".ndjson")  # of JSON, whose syntax nobody means to learn; a .json may be part of a code base
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """A text."""

    name: str
    content: bytes
    place: float
    """in [0, 1), decides its split"""


class Corpus(NamedTuple):
    """Documents, and the files that were left out because their text is bad."""

    documents: list[Document]
    bad: list[str]


def stdlib_files() -> list[Path]:
    """The .py files of the running interpreter's standard library, without packages of others and without tests."""
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(_library()):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def stdlib_name(path: Path) -> str:
    """Of one of `stdlib_files`, below the library's folder."""
    return path.relative_to(_library()).as_posix()


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents() -> list[Document]:
    """The files of `stdlib_files`."""
    found = _read([(stdlib_name(path), path) for path in stdlib_files()])
    return [Document(name, content, place_of(encoded(name))) for name, content in found]


def file_documents(source: str | Sequence[str]) -> list[Document]:
    """The files that a path, a folder (all its files, hidden ones aside), a glob or a list of these names.

    Raises:
        UserError: a path does not exist, or there is nothing in it.
    """
    paths = expand_files([source] if isinstance(source, str) else source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    found = _read([(path.relative_to(base).as_posix(), path) for path in paths])
    return [Document(name, content, place_of(next(cut(content)))) for name, content in found]


def expand_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs name, sorted; of several names for a file the first. The names are those
    given and not what links lead to: their endings say what is inside. Errors as in `file_documents`."""
    given = sorted(path.absolute() for pattern in patterns for path in _expand(pattern))
    if not given:
        raise UserError("no text files were given: name a file, a folder or a glob")
    named: dict[Path, Path] = {}
    for path in given:
        named.setdefault(path.resolve(), path)
    return list(named.values())


def read_corpus(source: str | Sequence[str], encoding: Encoding = "bytes", on_bad: OnBadSample = "raise") -> Corpus:
    """The documents of "stdlib" or of files.

    Args:
        source: "stdlib", or what `file_documents` takes.
        encoding: "bytes" takes every file that is not packed or JSON lines, "utf-8" only what is valid UTF-8.
        on_bad: with "skip" files that are not are left out, with "raise" they are fatal.

    Raises:
        UserError: nothing to read, or a bad file.
    """
    found = stdlib_documents() if source in ("stdlib", ["stdlib"]) else file_documents(source)
    documents, bad = [], []
    for document in found:
        fault = _fault(document, encoding)
        if fault is None:
            documents.append(document)
        elif on_bad == "raise":
            raise UserError(f"text file {document.name!r} {fault}")
        else:
            bad.append(document.name)
    if not documents:
        raise UserError(f"text source {source!r} holds no text: every file in it is empty{' or bad' if bad else ''}")
    return Corpus(documents, bad)


def _fault(document: Document, encoding: Encoding) -> str | None:
    """What is wrong with a text file, in words."""
    if packing := packing_of(document.content):
        return f"holds {packing} and no plain text: unpack it, or write token files with moa data tokens"
    if document.name.lower().endswith(_LINES):
        return "holds a JSON object a line and no plain text: rename it, or write token files with moa data tokens"
    place = None if encoding == "bytes" else invalid_utf8(document.content)
    return None if place is None else f"is not UTF-8 at byte {place}: {NO_UTF8}"


def packing_of(beginning: bytes) -> str | None:
    """How a file is packed, by its first bytes; None where they are not those of gzip, zstd or Parquet."""
    return next((name for magic, name in _MAGIC.items() if beginning.startswith(magic)), None)


def invalid_utf8(content: bytes) -> int | None:
    """The first byte that is no UTF-8; None where all is, but for a character that is cut off at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path))]
    elif path.is_file():
        files = [path]
    else:
        files = [found for found in _matches(path) if found.is_file()]
        if not files:
            raise UserError(f"text source {pattern!r} does not exist and matches no file")
    if not files:
        raise UserError(f"text folder {pattern!r} holds no files")
    return files


def _matches(pattern: Path) -> list[Path]:
    """What a glob names, hidden files and folders aside unless it names them; `**` goes through no links, which might
    lead round in circles."""
    if "**" not in pattern.parts:
        return [Path(name) for name in glob.glob(str(pattern))]
    parts = pattern.parts[bool(pattern.anchor) :]
    all_below = ("*",) if parts[-1] == "**" else ()
    found = Path(pattern.anchor).glob(str(Path(*parts, *all_below)))
    return [path for path in found if not any(part.startswith(".") and part not in parts for part in path.parts)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(files: Iterable[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    """Name and content of the files that are not empty, sorted by name."""
    documents = []
    for name, path in sorted(files):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"text file {str(path)!r} cannot be read ({error.strerror}): check it") from error
        if content:
            documents.append((name, content))
    return documents


def cut(content: bytes) -> Iterator[bytes]:
    """Pieces of at most PIECE bytes."""
    start = 0
    while len(content) - start > PIECE:
        place = start + cut_place(content[start : start + PIECE + 1])
        yield content[start:place]
        start = place
    yield content[start:]


def cut_place(content: bytes) -> int:
    """Where to cut a text that goes on: after the last line break between two words, else before a character."""
    found = [match.end() for match in _BREAK.finditer(content, len(content) // 2)]
    if found:
        return found[-1]
    place = len(content) - 1
    while place > len(content) - 4 and content[place] & 0xC0 == 0x80:
        place -= 1
    return place


def corpus_sha256(documents: Iterable[Document]) -> str:
    """A digest of names and contents, to tell whether two runs saw the same text."""
    digest = hashlib.sha256()
    for name, content, _ in documents:
        digest.update(encoded(f"{name}\0{len(content)}\0"))
        digest.update(content)
    return digest.hexdigest()


def encoded(name: str) -> bytes:
    """The bytes of a name; what was no UTF-8 in it comes out as it was."""
    return name.encode("utf-8", "surrogateescape")


def check_encoding(encoding: Encoding) -> Encoding:
    """The encoding, or UserError where there is none of this name."""
    if encoding not in get_args(Encoding):
        raise UserError(f"encoding is {encoding!r}; choose from {', '.join(get_args(Encoding))}")
    return encoding


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise UserError unless both are in [0, 1) and leave something to train on."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative, "
            "and their sum must stay below 1"
        )


def place_of(content: bytes) -> float:
    """A hash, seen as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


def split_names(names: Sequence[str], val_fraction: float, test_fraction: float) -> dict[str, list[int]]:
    """Positions of the names in each split, by a hash of the name; rule and errors as in `split_places`."""
    chosen = split_places([place_of(encoded(name)) for name in names], val_fraction, test_fraction)
    return {split: positions.tolist() for split, positions in chosen.items()}


def split_places(places: Sequence[float], val_fraction: float, test_fraction: float) -> dict[str, np.ndarray]:
    """Positions of the documents in each split, ascending int64 (n,), by their places in [0, 1).

    A document is in the test split when its place lies below `test_fraction`, in the validation split when below the
    sum of both. A split that this leaves empty takes the next document in the order of places.

    Raises:
        UserError: bad fractions, or nothing is left for training.
    """
    check_fractions(val_fraction, test_fraction)
    place = np.asarray(places, np.float64)
    order = np.argsort(place, kind="stable")
    tests = max(int((place < test_fraction).sum()), int(test_fraction > 0))
    vals = max(int((place < test_fraction + val_fraction).sum()) - tests, int(val_fraction > 0))
    if tests + vals >= len(place):
        raise UserError(f"{len(place)} files are too few to split into train, val and test: give more files")
    parts = {"test": order[:tests], "val": order[tests : tests + vals], "train": order[tests + vals :]}
    return {split: np.sort(part) for split, part in parts.items()}


def cuts(length: int, val_fraction: float, test_fraction: float) -> list[int]:
    """Where the splits of one text of that length begin, train, val and test, and its end."""
    val, test = (round(length * (1 - held_out)) for held_out in (val_fraction + test_fraction, test_fraction))
    return [0, val, test, length]


def split_spans(
    places: Sequence[float], bounds: np.ndarray, val_fraction: float, test_fraction: float
) -> dict[str, np.ndarray]:
    """Begin and end of what each split has of documents that lie in one file, int64 (n, 2); rule of `split_documents`.

    Args:
        places: of each document, in [0, 1).
        bounds: begin and end of each document, int64 (n, 2).
    """
    if len(bounds) >= len(SPLITS):
        chosen = split_places(places, val_fraction, test_fraction)
        return {split: bounds[chosen[split]] for split in SPLITS}
    inner = np.stack([start + np.array(cuts(stop - start, val_fraction, test_fraction)) for start, stop in bounds])
    pairs = {split: inner[:, number : number + 2] for number, split in enumerate(SPLITS)}
    return {split: pair[pair[:, 0] < pair[:, 1]] for split, pair in pairs.items()}


def split_documents(
    documents: Sequence[Document], val_fraction: float, test_fraction: float
) -> dict[str, list[Document]]:
    """Documents of each split: by place, or, where there are fewer than three, by position inside every document.

    By position the training text comes first, then validation, then test; with fractions 0.05 each a single file gives
    its first 90 %, then 5 %, then 5 %.
    """
    if len(documents) >= len(SPLITS):
        chosen = split_places([document.place for document in documents], val_fraction, test_fraction)
        return {split: [documents[i] for i in chosen[split]] for split in SPLITS}
    check_fractions(val_fraction, test_fraction)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, content, place in documents:
        bounds = cuts(len(content), val_fraction, test_fraction)
        for split, start, stop in zip(SPLITS, bounds[:-1], bounds[1:], strict=True):
            if start < stop:
                parts[split].append(Document(name, content[start:stop], place))
    return parts
