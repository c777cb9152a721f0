"""Records of files with a row a line: JSON lines, and tables whose cells are parted by tabs.

Tables are read as GLUE's are meant: a quote is a character like any other, and nothing but a line feed ends a line.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moa_lightning.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
LARGEST = 3.4028234663852886e38  # of float32, in which labels are learned
SHOWN = 40  # characters of a value in a message


class Record(NamedTuple):
    """A row of a file."""

    place: str
    """file and line, for messages"""
    values: dict[str, Any]


def read_records(path: Path, columns: Sequence[str] | None = None, skip_broken: bool = False) -> Iterator[Record]:
    """The rows of a .jsonl or .ndjson file, or of a table.

    Args:
        path: the file.
        columns: of a table without a header; None: its first line names them.
        skip_broken: leave out lines of a table that have too few cells, for which there is no other sign.

    Raises:
        UserError: the file cannot be read or has no row, a line is no such row, or a column is named twice.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"text file '{path}' cannot be read ({error.strerror}): check it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"text file '{path}' is not UTF-8 at byte {error.start}: repair it") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip("\r")]
    if path.suffix in JSON_LINES:
        records: Iterator[Record] = (_json(f"{path} line {number}", line) for number, line in numbered)
    else:
        records = _table(path, numbered, columns, skip_broken)
    first = next(records, None)
    if first is None:
        raise UserError(f"text file '{path}' has no row: give one that has some")
    yield first
    yield from records


def _table(
    path: Path, numbered: list[tuple[int, str]], columns: Sequence[str] | None, skip_broken: bool
) -> Iterator[Record]:
    """The rows of a table's lines, which come with their numbers."""
    if columns is None:
        if not numbered:
            raise UserError(f"text file '{path}' is empty: give one whose first line names the columns")
        (header, line), numbered = numbered[0], numbered[1:]
        columns = line.rstrip("\t").split("\t")
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise UserError(f"{path} line {header} names the column '{twice[0]}' twice: rename one of the two")
    for number, line in numbered:
        cells = line.split("\t")
        while len(cells) > len(columns) and not cells[-1]:
            cells.pop()  # spreadsheets end lines so
        if len(cells) == len(columns):
            yield Record(f"{path} line {number}", dict(zip(columns, cells, strict=True)))
        elif len(cells) > len(columns) or not skip_broken:
            raise UserError(f"{path} line {number} has {len(cells)} cells for {len(columns)} columns: repair it")


def _json(place: str, line: str) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): repair it") from error
    if not isinstance(values, dict):
        raise UserError(f"{place} is not a JSON object: give one a line")
    return Record(place, values)


def text_of(record: Record, field: str) -> str:
    """A field that must hold text; a dot goes into an object inside (target.span1_text).

    Raises:
        UserError: it does not.
    """
    value: Any = record.values
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{record.place} has no text '{field}': it has {', '.join(map(str, record.values))}")
    return value.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair


def class_name(value: Any) -> str:
    """A class as it stands in a file: text as it is, else as JSON has it (true, 1)."""
    return value if isinstance(value, str) else json.dumps(value)


def label_of(record: Record, field: str) -> Any:
    """What a field holds; None where the record has no such field, null or an empty cell in it: no label."""
    value = record.values.get(field)
    return None if value == "" else value


def class_of(record: Record, field: str, classes: Sequence[str]) -> int | None:
    """Which of the classes a field names; None where the record has no label.

    Raises:
        UserError: none of them.
    """
    value = label_of(record, field)
    if value is None:
        return None
    name = class_name(value)
    if name not in classes:
        raise UserError(f"{record.place} has the {field} {name!r}, which is none of {', '.join(classes)}")
    return classes.index(name)


def number_of(record: Record, field: str) -> float | None:
    """The number in a field; None where the record has no label.

    Raises:
        UserError: something else is there.
    """
    given = label_of(record, field)
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = float("nan")
    except OverflowError:  # a whole number of more than 308 digits
        value = float("inf")
    if not abs(value) <= LARGEST:  # NaN neither
        shown = repr(given)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise UserError(f"{record.place} has the {field} {shown}, which is no finite number of single precision")
    return value
