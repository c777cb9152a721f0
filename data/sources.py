"""Documents one after another, from plain files, JSON lines, Parquet columns and WebDataset shards, in bounded memory.

The ending of a file's name says its kind, as it was given, whatever a link leads to: .jsonl, .ndjson or .json for an
object a line, as C4 and Dolma have them (also .gz, .zst), .parquet, .tar; everything else is one document of plain text
(.txt also .gz, .zst), unless its first bytes are those of a packed file. A document comes in pieces of at most PIECE
bytes, cut after a line where that changes no token of a byte-level tokenizer, so a file of any size is read without
holding it. What is bad goes to a callback, which decides whether it is fatal.
"""

import codecs
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.documents import PIECE, cut, encoded, expand_files, packing_of, place_of, stdlib_files, stdlib_name
from data.faults import BadSample, OnBadSample
from data.shards import ShardMembers
from moa_lightning.errors import UserError

LONGEST_LINE = 64 * 1024 * 1024  # bytes, of JSON
ROWS = 64  # of a Parquet file at a time
PARQUET_BUFFER = 1024 * 1024  # bytes of a column read at a time: without it a row group is read whole
_JSON = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".zst")
_NAMED = 3  # bad documents that a message lists


class Text(NamedTuple):
    """A document in pieces, which must be used up before the next document is asked for."""

    name: str
    pieces: Iterator[bytes]
    place: float
    """in [0, 1), decides its split: a hash of its first piece, in the standard library of its name"""


class Bad:
    """What could not be read. With "raise" the first one is fatal.

    Args:
        on_bad_sample: "raise" or "skip".
    """

    def __init__(self, on_bad_sample: OnBadSample = "raise") -> None:
        self.on_bad_sample, self.count = on_bad_sample, 0
        self.first: list[str] = []

    def add(self, message: str) -> None:
        if self.on_bad_sample == "raise":
            raise UserError(f"{message}; repair it, or give --on_bad_sample skip")
        self.count += 1
        self.first = [*self.first, message][:_NAMED]


def documents(source: Sequence[str], text_field: str, needs_text: bool, bad: Bad) -> Iterator[Text]:
    """The documents of "stdlib", files, folders and globs, in the order of the files' names; empty ones are left out.

    Args:
        source: what to read.
        text_field: key of a JSON line, or column of a Parquet file, that holds the text.
        needs_text: take a document that is not UTF-8 for a bad one.
        bad: told about bad documents.

    Raises:
        UserError: a path that does not exist, a package that a file needs and that is not installed.
    """
    library = list(source) == ["stdlib"]
    for path in stdlib_files() if library else expand_files(source):
        name = path.name.lower()
        kind = path.stem.lower() if name.endswith(_COMPRESSED) else name
        if kind.endswith(_JSON):
            found = _json_lines(path, text_field, bad)
        elif name.endswith(".parquet"):
            found = _parquet(path, text_field, bad)
        elif name.endswith(".tar"):
            found = _members(path, needs_text, bad)
        elif name != kind and not kind.endswith(".txt"):
            bad.add(f"'{path}' is compressed, and only .txt, .json, .jsonl and .ndjson may be: unpack it")
            continue
        else:
            yield from _plain(path, needs_text, bad, encoded(stdlib_name(path)) if library else None)
            continue
        for document, content in found:
            if content:
                yield _placed(document, cut(content))


def _placed(name: str, pieces: Iterator[bytes], key: bytes | None = None) -> Text:
    """A document with its place, by the key or else its beginning."""
    beginning = next(pieces)
    return Text(name, chain([beginning], pieces), place_of(beginning if key is None else key))


def _plain(path: Path, needs_text: bool, bad: Bad, key: bytes | None) -> Iterator[Text]:
    try:
        with _open(path) as file:
            beginning = file.read(PIECE)
            while path.suffix.lower() in _COMPRESSED and file.read(PIECE):  # what is cut off shows at the end
                pass
        if packing := packing_of(beginning):
            bad.add(f"text file '{path}' holds {packing} and no plain text, as its name has it")
        elif needs_text and (place := _invalid(path)) is not None:
            bad.add(f"text file '{path}' is not UTF-8 at byte {place}")
        elif beginning:
            yield _placed(str(path), _file_pieces(path), key)
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        bad.add(f"text file '{path}' cannot be read ({getattr(error, 'strerror', None) or error})")


def _invalid(path: Path) -> int | None:
    """The byte at which a file stops being UTF-8; None where all of it is."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as file:
        while True:
            block = file.read(PIECE)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return done - kept + error.start
            if not block:
                return None
            done += len(block)


def _file_pieces(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        content = b""
        while block := file.read(PIECE):
            *whole, content = cut(content + block)
            yield from whole
        yield content


def _json_lines(path: Path, field: str, bad: Bad) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                where = f"'{path}' line {number}"
                if len(line) > LONGEST_LINE:
                    bad.add(f"{where} is longer than {LONGEST_LINE:,} bytes, and the rest of the file is left out")
                    return
                if line.strip() and (content := _json_text(line, where, field, bad)):
                    yield where, content
    except (OSError, EOFError, ValueError, zlib.error, _zstd_error()) as error:
        if isinstance(error, UserError):
            raise
        bad.add(f"'{path}' cannot be read after line {number} ({getattr(error, 'strerror', None) or error})")


def _json_text(line: bytes, where: str, field: str, bad: Bad) -> bytes | None:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("an object was expected")
    except (ValueError, RecursionError) as error:
        bad.add(f"{where} is not JSON ({error})")
        return None
    if not isinstance(row.get(field), str):
        bad.add(f"{where} has no text under {field!r} (it has {', '.join(sorted(row))[:200] or 'nothing'})")
        return None
    return _utf8(row[field], where, bad)


def _utf8(text: str, where: str, bad: Bad) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        bad.add(f"{where} has a character that is none at place {error.start}")
        return None


def _open(path: Path) -> IO[bytes]:
    """A file's content, unpacked where its name ends so."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.lower().endswith(".zst"):
        import io

        decompressor = _package("zstandard", path).ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(path.open("rb"), read_across_frames=True), PIECE)
    return path.open("rb")


def _zstd_error() -> type[Exception]:
    """What the package raises, where it is installed."""
    try:
        return importlib.import_module("zstandard").ZstdError
    except ImportError:
        return EOFError


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"'{path}' needs the package {name}, which is not installed: pip install {name}") from error


def _parquet(path: Path, column: str, bad: Bad) -> Iterator[tuple[str, bytes]]:
    arrow, parquet = _package("pyarrow", path), _package("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                raise UserError(
                    f"'{path}' has no column {column!r} (it has {', '.join(columns)}): choose it with --text_field"
                )
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"'{path}' row {number}"
                    if not isinstance(value, str):
                        bad.add(f"{where} has no text in column {column!r}")
                    elif content := _utf8(value, where, bad):
                        yield where, content
    except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:
        bad.add(f"'{path}' cannot be read after row {number} ({str(error).splitlines()[0]})")


def _members(path: Path, needs_text: bool, bad: Bad) -> Iterator[tuple[str, bytes]]:
    members = ShardMembers([str(path)], ("txt",))
    for number in range(len(members)):
        try:
            content = members.read(number)
            if needs_text:
                content.decode()
        except UnicodeDecodeError as error:
            bad.add(f"{members.name(number)} is not UTF-8 at byte {error.start}")
        except BadSample as error:
            bad.add(str(error))
        else:
            yield members.name(number), content
