"""`moa data tokens` and `moa data tokenizer`: documents to packed token files, in memory that does not grow.

`<split>.bin` holds the token ids of one document after another, little-endian, as nanoGPT has them: uint16, or uint32
where the vocabulary asks for it, each document followed by the end-of-text token. `<split>.starts` holds where each
document begins, int64. `tokens.json` describes them, and the tokenizer lies beside them, so the folder is all that
training needs. A document's split follows from a hash of its beginning (the same text is always on the same side,
whatever else is there); documents so few that a split would stay empty are split by position instead.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.documents import SPLITS, check_fractions, cuts, place_of
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
        """A document begins with this token."""
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
    used, bad = open_tokenizer(tokenizer), Bad(on_bad_sample)
    dtype = token_dtype(len(used.pieces))
    lengths = np.array([len(piece) for piece in used.pieces])
    with new_folder(out) as folder:
        files = {split: SplitFile(folder, split, dtype, lengths) for split in SPLITS}
        try:
            for split, tokens, begins in _encoded(source, used, text_field, bad, (val_fraction, test_fraction)):
                if begins:
                    files[split].begin(files[split].tokens)
                files[split].add(tokens)
        finally:
            for file in files.values():
                file.close()
        fractions = {"val": val_fraction, "test": test_fraction}
        if _empty(files, fractions):
            files = _split_by_position(folder, files, val_fraction, test_fraction)
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
    source: Sequence[str], used: Tokenizer, field: str, bad: Bad, fractions: tuple[float, float]
) -> Iterator[tuple[str, bytes, bool, bool]]:
    """Split, content, whether it begins a document, whether it ends one; for every piece of every document."""
    for text in documents(source, field, used.needs_text, bad):
        waiting = next(text.pieces)
        split = _split_of(waiting, *fractions)
        first = True
        for piece in text.pieces:
            yield split, waiting, first, False
            waiting, first = piece, False
        yield split, waiting, first, True


def _split_of(beginning: bytes, val_fraction: float, test_fraction: float) -> str:
    """By a hash of a document's first piece."""
    place = place_of(beginning)
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


def _encoded(
    source: Sequence[str], used: Tokenizer, field: str, bad: Bad, fractions: tuple[float, float]
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Split, token ids and whether a document begins with them, a batch of text at a time."""
    batch: list[tuple[str, bytes, bool, bool]] = []
    size = 0
    end = np.array([used.separator])

    def encoded() -> Iterator[tuple[str, np.ndarray, bool]]:
        for (split, _, begins, ends), tokens in zip(batch, used.encode([item[1] for item in batch]), strict=True):
            yield split, np.concatenate([tokens, end]) if ends else tokens, begins

    for item in _pieces(source, used, field, bad, fractions):
        batch.append(item)
        size += len(item[1])
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield from encoded()
            batch, size = [], 0
    yield from encoded()


def _split_by_position(
    folder: Path, files: dict[str, SplitFile], val_fraction: float, test_fraction: float
) -> dict[str, SplitFile]:
    """The tokens cut in three: training text first, then validation, then test."""
    starts, total = [], 0
    with (folder / "all").open("wb") as joined:
        for file in files.values():
            starts += [total + int(start) for start in np.fromfile(file.starts_path, "<i8")]
            total += file.tokens
            with file.path.open("rb") as part:
                shutil.copyfileobj(part, joined, BATCH_BYTES)
    bounds = cuts(total, val_fraction, test_fraction)
    any_file = files["train"]
    parts = {split: SplitFile(folder, split, any_file.dtype, any_file.lengths) for split in SPLITS}
    with (folder / "all").open("rb") as joined:
        for split, low, high in zip(SPLITS, bounds[:-1], bounds[1:], strict=True):
            _fill(parts[split], joined, high - low, [start - low for start in starts if low < start < high])
    (folder / "all").unlink()
    return parts


def _fill(part: SplitFile, joined: IO[bytes], tokens: int, starts: list[int]) -> None:
    """Move the next tokens into a split; it begins in the middle of a document, or with one."""
    for start in [0, *starts] if tokens else []:
        part.begin(start)
    while tokens:
        block = np.frombuffer(joined.read(min(BATCH_BYTES, tokens) * part.dtype.itemsize), part.dtype)
        part.add(block.astype(np.int64))
        tokens -= len(block)
    part.close()


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
