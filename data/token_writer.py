"""`moa data tokens` and `moa data tokenizer`: documents to packed token files, in memory that grows by eight bytes a
document.

`<split>.bin` holds the token ids of one document after another, little-endian, as nanoGPT has them: uint16, or uint32
where the vocabulary asks for it, each document followed by the end-of-text token. `<split>.starts` holds where each
document begins, int64. `tokens.json` describes them, and the tokenizer lies beside them, so the folder is all that
training needs. A document's split follows from a hash of its beginning, in the standard library of its name (the same
text is always on the same side, whatever else is there); a split that stays empty takes the next document by hash, and
fewer than three documents are split by position. These are the rules of `data.TextFiles` and of text shards.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.documents import SPLITS, check_fractions, split_spans
from data.faults import OnBadSample
from data.sources import Bad, documents
from data.tokenizer import BYTES, Tokenizer, open_tokenizer, train_bpe
from data.writers import new_folder, writing
from moa_lightning.errors import UserError

DESCRIPTION, TOKENIZER, STARTS = "tokens.json", "tokenizer.json", ".starts"
VERSION = 1
BATCH_BYTES = 1024 * 1024  # of text that is encoded at a time
BATCH_PIECES = 2048


class Written(NamedTuple):
    """What a command wrote."""

    folder: Path
    description: dict[str, Any]
    bad: Bad


class SplitFile:
    """One split's token file, its document starts and what is counted of it."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, lengths: np.ndarray) -> None:
        self.path, self.starts_path = folder / f"{split}.bin", folder / f"{split}{STARTS}"
        self.file, self.starts = self.path.open("wb"), self.starts_path.open("wb")
        self.dtype, self.lengths = dtype, lengths
        self.tokens = self.documents = self.bytes = 0

    def begin(self, place: int) -> None:
        """A document begins at this token."""
        self.starts.write(np.array(place, "<i8").tobytes())
        self.documents += 1

    def add(self, tokens: np.ndarray) -> None:
        """Append token ids."""
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.tokens += len(tokens)
        self.bytes += int(self.lengths[tokens].sum())

    def close(self) -> None:
        self.file.close()
        self.starts.close()

    def description(self) -> dict[str, Any]:
        """Counts and digest; `bytes` are those of the text that the tokens stand for."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {"file": self.path.name, "starts": self.starts_path.name, **counts, "sha256": digest}


def write_tokens(
    source: Sequence[str],
    out: str,
    tokenizer: str = BYTES,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    text_field: str = "text",
    on_bad_sample: OnBadSample = "raise",
) -> Written:
    """Write documents as token files.

    Args:
        source: "stdlib", or files, folders and globs, see `sources.documents`.
        out: folder to write; it must not exist or be empty.
        tokenizer: "bytes", a tokenizer.json, or nanoGPT's meta.pkl.
        val_fraction: share of the documents for validation.
        test_fraction: the same for testing.
        text_field: key or column that holds the text.
        on_bad_sample: "raise": a document that cannot be read ends the command; "skip": it is left out and counted.

    Raises:
        UserError: unusable sources, tokenizer or folder, or too little text.
    """
    check_fractions(val_fraction, test_fraction)
    used, bad, places = open_tokenizer(tokenizer), Bad(on_bad_sample), array("d")
    dtype = token_dtype(len(used.pieces))
    lengths = np.array([len(piece) for piece in used.pieces])
    with new_folder(out) as folder:
        files = {split: SplitFile(folder, split, dtype, lengths) for split in SPLITS}
        try:
            for place, tokens, begins in _encoded(source, used, text_field, bad, places):
                file = files[_split_of(place, val_fraction, test_fraction)]
                if begins:
                    file.begin(file.tokens)
                file.add(tokens)
        finally:
            for file in files.values():
                file.close()
        fractions = {"val": val_fraction, "test": test_fraction}
        if places and _empty(files, fractions):
            files = _split_anew(folder, files, places, val_fraction, test_fraction)
        if _empty(files, fractions):
            raise UserError(f"{_total(files)} tokens are too few for the splits: give more text, or lower fractions")
        description = _finish(folder, files, used, source)
    return Written(Path(out), description, bad)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that token files of a vocabulary have."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def train_tokenizer(
    source: Sequence[str],
    out: str,
    vocab_size: int,
    text_field: str = "text",
    on_bad_sample: OnBadSample = "raise",
) -> Written:
    """Train a byte-level BPE and write it as `out`, a tokenizer.json; arguments and errors as in `write_tokens`."""
    path, bad = Path(out), Bad(on_bad_sample)
    if path.exists():
        raise UserError(f"{out} exists: choose another name or remove it")
    with writing(out):  # asked before minutes of training
        path.parent.mkdir(parents=True, exist_ok=True)
    texts = (piece.decode() for text in documents(source, text_field, True, bad) for piece in text.pieces)
    library = train_bpe(texts, vocab_size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(out):
        try:
            temporary.write_text(library.to_str(pretty=True), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return Written(path, {"vocab_size": vocab_size}, bad)


def _pieces(
    source: Sequence[str], used: Tokenizer, field: str, bad: Bad, places: array
) -> Iterator[tuple[float, bytes, bool, bool]]:
    """Place of the document, content, whether it begins a document, whether it ends one; for every piece of every
    document. Appends each document's place."""
    for text in documents(source, field, used.needs_text, bad):
        places.append(text.place)
        waiting = next(text.pieces)
        first = True
        for piece in text.pieces:
            yield text.place, waiting, first, False
            waiting, first = piece, False
        yield text.place, waiting, first, True


def _split_of(place: float, val_fraction: float, test_fraction: float) -> str:
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


def _encoded(
    source: Sequence[str], used: Tokenizer, field: str, bad: Bad, places: array
) -> Iterator[tuple[float, np.ndarray, bool]]:
    """Place, token ids and whether a document begins with them, a batch of text at a time."""
    batch: list[tuple[float, bytes, bool, bool]] = []
    size = 0
    end = np.array([used.separator])

    def encoded() -> Iterator[tuple[float, np.ndarray, bool]]:
        for (place, _, begins, ends), tokens in zip(batch, used.encode([item[1] for item in batch]), strict=True):
            yield place, np.concatenate([tokens, end]) if ends else tokens, begins

    for item in _pieces(source, used, field, bad, places):
        batch.append(item)
        size += len(item[1])
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield from encoded()
            batch, size = [], 0
    yield from encoded()


def _split_anew(
    folder: Path, files: dict[str, SplitFile], places: array, val_fraction: float, test_fraction: float
) -> dict[str, SplitFile]:
    """The same documents by the rule that leaves no split empty."""
    spans_of: dict[str, Iterator[tuple[int, int]]] = {}
    total = 0
    with (folder / "all").open("wb") as joined:
        for split, file in files.items():
            begins = [total + int(start) for start in np.fromfile(file.starts_path, "<i8")]
            total += file.tokens
            spans_of[split] = pairwise([*begins, total])
            with file.path.open("rb") as written:
                shutil.copyfileobj(written, joined, BATCH_BYTES)
    bounds = np.empty((len(places), 2), np.int64)
    for number, place in enumerate(places):  # in the order in which they came
        bounds[number] = next(spans_of[_split_of(place, val_fraction, test_fraction)])
    spans = split_spans(places, bounds, val_fraction, test_fraction)
    any_file = files["train"]
    parts = {split: SplitFile(folder, split, any_file.dtype, any_file.lengths) for split in SPLITS}
    with (folder / "all").open("rb") as joined:
        for split, target in parts.items():
            for start, stop in spans[split].tolist():
                _copy(target, joined, start, stop)
            target.close()
    (folder / "all").unlink()
    return parts


def _copy(target: SplitFile, joined: IO[bytes], start: int, stop: int) -> None:
    """A document's tokens, or a part of them, into a split."""
    target.begin(target.tokens)
    joined.seek(start * target.dtype.itemsize)
    while start < stop:
        block = np.frombuffer(joined.read(min(BATCH_BYTES, stop - start) * target.dtype.itemsize), target.dtype)
        target.add(block.astype(np.int64))
        start += len(block)


def _empty(files: dict[str, SplitFile], fractions: dict[str, float]) -> bool:
    """Whether a split that is wanted has nothing."""
    return any(file.tokens == 0 and fractions.get(split, 1.0) > 0 for split, file in files.items())


def _total(files: dict[str, SplitFile]) -> int:
    return sum(file.tokens for file in files.values())


def _finish(folder: Path, files: dict[str, SplitFile], used: Tokenizer, source: Sequence[str]) -> dict[str, Any]:
    """Remove empty splits, put the tokenizer beside the others, and write the description."""
    for file in files.values():
        if not file.tokens:
            file.path.unlink()
            file.starts_path.unlink()
    if used.content is not None:
        (folder / TOKENIZER).write_bytes(used.content)
    description = {
        "version": VERSION,
        "source": list(source),
        "tokenizer": BYTES if used.name == BYTES else TOKENIZER,
        "tokenizer_sha256": used.sha256,
        "vocab_size": len(used.pieces),
        "separator": used.separator,
        "dtype": "uint16" if files["train"].dtype.itemsize == 2 else "uint32",
        "splits": {split: file.description() for split, file in files.items() if file.tokens},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return description
