"""What training and evaluation cut their windows from: a long string of tokens, and a part of one.

For ablations over the amount of data, documents stay in the order of a hash until the wanted share of the text's bytes
or tokens is reached, and the last one is cut off there. So a share is exact, whether the text is one document, whose
beginning stays, or millions; a smaller share lies inside a larger one; and no seed of a run has a say. The hash is made
of what says a document's split (text files: the beginning, or the name in the standard library), or of the file's name
and the document's number in it (token files, shards), but independent of that split. A text whose documents are not
known, as in nanoGPT's and llm.c's files, keeps its beginning. What stays keeps its order.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class TokenSource(Protocol):
    """A long string of tokens that is read in pieces."""

    unit: str
    """what its tokens are called in messages"""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, integers (stop - start,)."""

    def document_starts(self) -> np.ndarray:
        """First token of each document, ascending int64; UserError where that is not known."""

    def document_hashes(self) -> np.ndarray | None:
        """A hash of each document, uint64; None where documents are not known."""


def pieces(starts: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The parts of a joined text in which start..stop-1 lies: number, and where within the part it begins and ends.

    Args:
        starts: first token of each part and, last, the end of all, ascending.
    """
    number = int(np.searchsorted(starts, start, side="right")) - 1
    while start < stop:
        first, end = int(starts[number]), min(stop, int(starts[number + 1]))
        yield number, start - first, end - first
        start, number = end, number + 1


def mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (see moa_lightning/random.py) of each number: uint64."""
    z = numbers + _STEP
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * factor
    return z ^ (z >> np.uint64(31))


def numbered_hashes(name: str, count: int) -> np.ndarray:
    """Hashes of the documents 0..count-1 of a file with this name: uint64 (count,)."""
    return mixed(np.uint64(named_seed(0, f"documents of {name}")) ^ mixed(np.arange(count, dtype=np.uint64)))


def kept_lengths(lengths: np.ndarray, hashes: np.ndarray, wanted: int) -> np.ndarray:
    """How much of each document's beginning stays where `wanted` tokens do: int64 (n,), their sum is `wanted`.

    Args:
        lengths: tokens of each document, int64.
        hashes: the order in which documents are taken; of equal ones the first.
        wanted: at most the sum of all lengths.
    """
    order = np.argsort(hashes, kind="stable")
    own = lengths[order]
    kept = np.empty_like(lengths)
    kept[order] = np.clip(wanted - (np.cumsum(own) - own), 0, own)
    return kept


class PartOfText:
    """A share of a text, see above.

    Args:
        source: all of it.
        fraction: the share of its tokens, in (0, 1).

    Raises:
        UserError: nothing is left.
    """

    def __init__(self, source: TokenSource, fraction: float) -> None:
        self.source, self.unit = source, source.unit
        wanted = round(fraction * len(source))
        if wanted < 1:
            raise UserError(
                f"train_fraction {fraction:g} leaves nothing of a training text of {len(source):,} {source.unit}: "
                "raise it or give more text"
            )
        hashes = source.document_hashes()
        self.by_hash = hashes is not None and len(hashes) > 1  # of a single document the beginning stays
        # spans of neighbouring documents that stay: where each begins in the source, and here, with the end of all
        self.begins, kept = np.zeros(1, np.int64), np.array([wanted])
        if hashes is not None:
            self.begins, kept = _spans(source.document_starts(), len(source), hashes, wanted)
        self.starts = np.concatenate([[0], np.cumsum(kept)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        places = ((int(self.begins[span]), low, high) for span, low, high in pieces(self.starts, start, stop))
        found = [self.source.read(begin + low, begin + high) for begin, low, high in places]
        return np.concatenate(found) if found else self.source.read(0, 0)

    def document_starts(self) -> np.ndarray:
        found = self.source.document_starts()
        span = np.searchsorted(self.begins, found, side="right") - 1  # the first document begins at token 0 or later
        here = self.starts[span] + found - self.begins[span]
        return here[(span >= 0) & (here < self.starts[span + 1])]

    def document_hashes(self) -> np.ndarray | None:
        return None


def _spans(starts: np.ndarray, end: int, hashes: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and length of each stretch of text that stays, int64 both."""
    lengths = np.diff(starts, append=end)
    kept = kept_lengths(lengths, hashes, wanted)
    joined = np.concatenate([[False], kept[:-1] == lengths[:-1]])  # to the document before
    first = np.flatnonzero((kept > 0) & ~joined)
    return starts[first], np.add.reduceat(kept, first)
