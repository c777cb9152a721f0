"""Three tasks for a text classifier from the standard library of the interpreter, which every machine has. [O]

    stdlib_kind      one text: whether it ends in code, in a comment or in a string (score: accuracy)
    stdlib_next      two texts: whether the second follows the first, or stands in another file (score: accuracy)
    stdlib_indent    one text, a number: by how many columns the line after it is indented (score: Spearman)

Pieces have 126 characters and do not overlap; of a file there are at most 100, evenly spaced, or a few large ones would
decide. Files are split by a hash of their names as for language models (data/documents.py): no file is in two splits,
and a model that was pre-trained with the same fractions has seen no held-out file. Classes are balanced in every split.
The files, and with them the scores, belong to one version of Python.
"""

import bisect
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.documents import Document, split_documents, stdlib_documents
from data.labelled_text import Row, evenly
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

PIECE = 126  # characters: with its end, or two halves with theirs, less than 129 tokens
MOST_PIECES = 100  # of a file
KINDS = ("code", "comment", "string")
NOT_CODE = re.compile(
    r"""('''|\"\"\")(?:\\.|(?!\1).)*(?:\1|\Z)|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|#[^\n]*""", re.DOTALL
)
MOST_INDENT = 40  # columns; more is a continued line somewhere far right

Splits = dict[str, list[Document]]


class StdlibTask(NamedTuple):
    """How a task's rows are made of the documents of all splits, and what judges them."""

    rows: Callable[[Splits], dict[str, list[Row]]]
    classes: tuple[str, ...]
    """their names; none for numbers"""
    metrics: list[str]


def read_stdlib(name: str, val_fraction: float, test_fraction: float) -> dict[str, list[Row]]:
    """The rows of a task's splits. Errors as in split_documents, and a split with too few files."""
    splits = split_documents(stdlib_documents(), val_fraction, test_fraction)
    return STDLIB_TASKS[name].rows({split: part for split, part in splits.items() if part})


def pieces(document: Document) -> list[str]:
    """The text in pieces of PIECE characters."""
    text = document.content.decode("utf-8", errors="replace")
    return evenly([text[start : start + PIECE] for start in range(0, len(text) - PIECE + 1, PIECE)], MOST_PIECES)


def _kind_rows(splits: Splits) -> dict[str, list[Row]]:
    rows = {}
    for split, documents in splits.items():
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for document in documents:
            for kind, piece in evenly(_kinds(document), MOST_PIECES):
                found[kind].append(piece)
        count = min(len(part) for part in found.values())
        rows[split] = [Row((piece,), KINDS.index(kind)) for kind in KINDS for piece in evenly(found[kind], count)]
    return rows


def _kinds(document: Document) -> list[tuple[str, str]]:
    """The pieces of a file, each with what its last character is a part of."""
    text = document.content.decode("utf-8", errors="replace")
    inside = [(match.start(), match.end(), match[0]) for match in NOT_CODE.finditer(text)]
    starts = [start for start, _, _ in inside]
    found = []
    for end in range(PIECE, len(text) + 1, PIECE):
        before = bisect.bisect_left(starts, end) - 1  # the last one that begins before the end of the piece
        within = before >= 0 and end <= inside[before][1]
        kind = "code" if not within else "comment" if inside[before][2].startswith("#") else "string"
        found.append((kind, text[end - PIECE : end]))
    return found


def _next_rows(splits: Splits) -> dict[str, list[Row]]:
    half = PIECE // 2
    rows = {}
    for split, documents in splits.items():
        draw = random.Random(named_seed(0, f"stdlib_next {split}"))
        found = {document.name: pieces(document) for document in documents}
        seconds = [(name, piece[half:]) for name, own in found.items() for piece in own]
        part = []
        if sum(bool(own) for own in found.values()) < 2:
            raise UserError(
                f"the {split} split of stdlib_next has fewer than two files of {PIECE} characters or more, where texts "
                "come from two files: raise its fraction"
            )
        for name, own in found.items():
            for index, piece in enumerate(own[: len(own) // 2 * 2]):
                follows, second = index % 2, (name, piece[half:])
                while not follows and second[0] == name:
                    second = draw.choice(seconds)
                part.append(Row((piece[:half], second[1]), follows))
        rows[split] = part
    return rows


def _indent_rows(splits: Splits) -> dict[str, list[Row]]:
    rows = {
        split: [evenly(list(_indents(document)), MOST_PIECES) for document in part] for split, part in splits.items()
    }
    return {split: [row for each in part for row in each] for split, part in rows.items()}


def _indents(document: Document) -> Iterator[Row]:
    """The last PIECE characters of some lines, with the indentation of the next line that is not empty."""
    lines = document.content.decode("utf-8", errors="replace").split("\n")
    text = ""
    for line, following in itertools.pairwise(lines):
        text += line + "\n"
        if len(text) >= PIECE and following.strip():
            columns = len(following.expandtabs()) - len(following.expandtabs().lstrip())
            yield Row((text[-PIECE:],), min(columns, MOST_INDENT))
            text = ""


STDLIB_TASKS = {
    "stdlib_kind": StdlibTask(_kind_rows, KINDS, ["accuracy"]),
    "stdlib_next": StdlibTask(_next_rows, ("another", "next"), ["accuracy"]),
    "stdlib_indent": StdlibTask(_indent_rows, (), ["spearman"]),
}
