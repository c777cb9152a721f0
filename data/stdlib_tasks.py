"""Three tasks for a text classifier from the standard library of the interpreter, which every machine has. [O]

    stdlib_package    one text: which of six packages a piece of code comes from (score: accuracy)
    stdlib_next       two texts: whether the second follows the first, or stands in another file (score: accuracy)
    stdlib_indent     one text, a number: by how many columns the line after it is indented (score: Spearman)

Pieces have 126 characters and do not overlap; of a file there are at most 100, evenly spaced, or a few large ones would
decide. Files are split by a hash of their names as for language models
(data/documents.py), so no file is in two splits, and a model that was pre-trained with the same fractions has seen no
held-out file. Classes are balanced in every split. The six packages are those with most text in the split in which they
have least, so they, and with them the scores, belong to one version of Python.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.documents import Document, split_documents, stdlib_documents
from data.labelled_text import Row, evenly
from moa_lightning.random import named_seed

PIECE = 126  # characters: with its end, or two halves with theirs, less than 129 tokens
MOST_PIECES = 100  # of a file
PACKAGES = 6
MOST_INDENT = 40  # columns; more is a continued line somewhere far right

Splits = dict[str, list[Document]]


class StdlibTask(NamedTuple):
    """How a task's rows are made of the documents of all splits, and what judges them."""

    rows: Callable[[Splits], tuple[dict[str, list[Row]], list[str]]]
    """rows of each split, and the names of the classes, none for numbers"""
    num_classes: int
    metrics: list[str]


def read_stdlib(name: str, val_fraction: float, test_fraction: float) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of a task's splits, and the names of its classes. Errors as in split_documents."""
    splits = split_documents(stdlib_documents(), val_fraction, test_fraction)
    return STDLIB_TASKS[name].rows({split: part for split, part in splits.items() if part})


def pieces(document: Document) -> list[str]:
    """The text in pieces of PIECE characters."""
    text = document.content.decode("utf-8", errors="replace")
    return evenly([text[start : start + PIECE] for start in range(0, len(text) - PIECE + 1, PIECE)], MOST_PIECES)


def _package_rows(splits: Splits) -> tuple[dict[str, list[Row]], list[str]]:
    found = {split: _by_package(part) for split, part in splits.items()}
    least = {
        package: min(len(part.get(package, ())) for part in found.values()) for package in set().union(*found.values())
    }
    names = sorted(sorted(least, key=lambda package: (-least[package], package))[:PACKAGES])
    rows = {}
    for split, part in found.items():
        count = min(len(part[name]) for name in names)
        rows[split] = [Row((piece,), label) for label, name in enumerate(names) for piece in evenly(part[name], count)]
    return rows, names


def _by_package(documents: list[Document]) -> dict[str, list[str]]:
    """Pieces of the files that lie in a package, by its name."""
    found: dict[str, list[str]] = {}
    for document in documents:
        package, inside, _ = document.name.partition("/")
        if inside:
            found.setdefault(package, []).extend(pieces(document))
    return found


def _next_rows(splits: Splits) -> tuple[dict[str, list[Row]], list[str]]:
    half = PIECE // 2
    rows = {}
    for split, documents in splits.items():
        all_pieces = [(number, piece) for number, document in enumerate(documents) for piece in pieces(document)]
        draw = random.Random(named_seed(0, f"stdlib_next {split}"))
        part = []
        for index, (number, piece) in enumerate(all_pieces):
            second, label = piece[half:], index % 2
            while not label:
                other, text = draw.choice(all_pieces)
                if other != number or len(documents) == 1:
                    second = text[half:]
                    break
            part.append(Row((piece[:half], second), label))
        rows[split] = part[: len(part) // 2 * 2]
    return rows, ["another", "next"]


def _indent_rows(splits: Splits) -> tuple[dict[str, list[Row]], list[str]]:
    rows = {
        split: [evenly(list(_indents(document)), MOST_PIECES) for document in part] for split, part in splits.items()
    }
    return {split: [row for each in part for row in each] for split, part in rows.items()}, []


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
    "stdlib_package": StdlibTask(_package_rows, PACKAGES, ["accuracy"]),
    "stdlib_next": StdlibTask(_next_rows, 2, ["accuracy"]),
    "stdlib_indent": StdlibTask(_indent_rows, 1, ["spearman"]),
}
