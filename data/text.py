"""Windows of a fixed context over one long string of tokens, and the data module for plain files as bytes.

With bytes (a vocabulary of 256) nothing has to be trained or shipped, any file is legal and bits per byte is the loss
divided by ln 2; documents are then joined by a NUL byte. Training windows do not overlap; where the first one starts is
drawn anew for each epoch, so that the model does not always see the same cuts. Evaluation starts at token 0 and counts
every token after the first exactly once.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base import EVAL_SEED, DataModule, Samples
from data.documents import Encoding, check_encoding, corpus_sha256, read_corpus, split_documents
from data.faults import BAD
from data.token_source import PartOfText, TokenSource, mixed
from data.tokenizer import BYTES, Tokenizer, open_tokenizer
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

SEPARATOR = b"\0"
IGNORED = -100


class JoinedBytes:
    """Documents in memory as one byte string, joined by NUL.

    Args:
        documents: their texts.
        places: what decides the split of each, see `documents.Document`; None: not known.
    """

    unit = "bytes"

    def __init__(self, documents: Sequence[bytes], places: Sequence[float] | None = None) -> None:
        self.places = places
        self.content = np.frombuffer(SEPARATOR.join(documents), dtype=np.uint8)
        self.starts = np.cumsum([0, *(len(document) + len(SEPARATOR) for document in documents[:-1])])

    def __len__(self) -> int:
        return len(self.content)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.content[start:stop]

    def document_starts(self) -> np.ndarray:
        return self.starts

    def document_hashes(self) -> np.ndarray | None:
        return None if self.places is None else mixed(np.array(self.places, np.float64).view(np.uint64))


def document_numbers(starts: np.ndarray, start: int, length: int) -> np.ndarray:
    """The number of each token's document in a window, from 0 on: int32 (length,).

    Args:
        starts: first token of each document, ascending.
        start: first token of the window.
    """
    first, end = np.searchsorted(starts, [start + 1, start + length])
    begins = np.zeros(length, np.int32)
    begins[starts[first:end] - start] = 1
    return np.cumsum(begins, dtype=np.int32)


class Windows(Samples):
    """Windows of `context_length` tokens and their next tokens over a token source.

    Subclasses set `count`, the number of windows, and say where each one lies.

    Args:
        mask_documents: samples have "documents", the number of each token's document in the window, int32 (T,).
    """

    count: int

    def __init__(self, source: TokenSource, context_length: int, seed: int, mask_documents: bool = False) -> None:
        super().__init__(seed)
        self.source, self.context_length = source, context_length
        self.starts = source.document_starts() if mask_documents else None

    def __len__(self) -> int:
        return self.count

    def window(self, start: int, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        """The sample of a window that begins at `start`."""
        sample = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        if self.starts is not None:
            sample["documents"] = torch.from_numpy(document_numbers(self.starts, start, self.context_length))
        return sample

    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "targets": torch.full_like(sample["targets"], IGNORED)}


class TrainWindows(Windows):
    """Windows for training: no overlap, a new offset below `context_length` in every epoch.

    The number of windows is the same for every offset, which costs at most one window of text.

    Raises:
        UserError: the text is shorter than one context and the token after it.
    """

    training = True

    def __init__(self, source: TokenSource, context_length: int, seed: int, mask_documents: bool = False) -> None:
        super().__init__(source, context_length, seed, mask_documents)
        if len(source) <= context_length:
            raise UserError(
                f"the training text has {len(source)} {source.unit}, but context_length {context_length} needs at "
                f"least {context_length + 1}: give more text or a shorter context"
            )
        self.count = max(1, (len(source) - 1) // context_length - 1)

    def offset(self, epoch: int) -> int:
        """First token of window 0."""
        spare = len(self.source) - 1 - self.count * self.context_length
        return named_seed(self.seed, f"offset of epoch {epoch}") % min(spare + 1, self.context_length)

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        start = self.offset(epoch) + index * self.context_length
        window = self.source.read(start, start + self.context_length + 1).astype(np.int64)
        return self.window(start, window[:-1], window[1:])


class EvalWindows(Windows):
    """Windows for evaluation: from token 0 to the end, the last one filled up with targets that are not counted.

    Args:
        limit: at most so many windows, evenly spaced over the text; None takes all.
    """

    training = False

    def __init__(
        self,
        source: TokenSource,
        context_length: int,
        seed: int,
        limit: int | None = None,
        mask_documents: bool = False,
    ) -> None:
        super().__init__(source, context_length, seed, mask_documents)
        self.windows = -(-(len(source) - 1) // context_length)
        self.count = self.windows if limit is None else min(limit, self.windows)

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        start = (index * self.windows // self.count) * self.context_length
        window = self.source.read(start, min(start + self.context_length + 1, len(self.source)))
        tokens, targets = np.zeros(self.context_length, np.int64), np.full(self.context_length, IGNORED, np.int64)
        tokens[: len(window) - 1], targets[: len(window) - 1] = window[:-1], window[1:]
        return self.window(start, tokens, targets)


class TokenModule(DataModule):
    """Base of all modules whose samples are tokens of a text: bytes, where a subclass names no other tokenizer.

    Args:
        context_length: most tokens in a sample.
        max_val_samples: validate on at most so many samples (of each source), evenly spaced; None takes all.
        max_test_samples: the same for testing.
        options: `DataModule`'s.
    """

    def __init__(
        self,
        context_length: int = 256,
        max_val_samples: int | None = None,
        max_test_samples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        limits = {"max_val_samples": max_val_samples, "max_test_samples": max_test_samples}
        for name, value in {"context_length": context_length, **limits}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value} but must be at least 1")
        self.context_length = context_length
        self.max_val_samples, self.max_test_samples = max_val_samples, max_test_samples

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into tokens; another may be set before anything is read."""
        return open_tokenizer(BYTES)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return len(self.tokenizer.pieces)

    @cached_property
    def token_bytes(self) -> Tensor:
        """Bytes that each token counts in bits per byte: int64 (vocab_size,), 0 for special tokens, but 1 for the one
        between documents, whatever its name: bytes have NUL there, and every tokenizer predicts the same text."""
        lengths = torch.tensor([len(piece) for piece in self.tokenizer.pieces])
        lengths[self.tokenizer.separator] = 1
        return lengths

    def encode(self, text: str) -> list[int]:
        """Text to tokens."""
        return self.tokenizer.encode([text.encode()])[0].tolist()

    def decode(self, tokens: list[int]) -> str:
        """Tokens to text without the special ones; bytes that are not UTF-8 become replacement characters."""
        pieces = self.tokenizer.pieces
        return b"".join(pieces[token] for token in tokens).decode("utf-8", errors="replace")


class TextModule(TokenModule):
    """Base of the modules of running text, cut into windows of `context_length` tokens.

    Args:
        mask_documents: attention does not cross from one document to the next; the batch then has the
            key "documents", int32 (B, T), the number of each token's document in its window.
        options: `TokenModule`'s. `train_fraction` counts bytes or tokens: documents stay in the order of a hash, the
            last one cut off; of a text without known documents the beginning stays. See data/token_source.py.
    """

    def __init__(self, mask_documents: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.mask_documents = mask_documents
        self.training_text: str | None = None  # which part of it stays, in words

    def training_part(self, source: TokenSource) -> TokenSource:
        """What `train_fraction` leaves of a training text; UserError where that is too little for a window."""
        if self.train_fraction == 1:
            return source
        part = PartOfText(source, self.train_fraction)
        if len(part) <= self.context_length < len(source):
            raise UserError(
                f"train_fraction {self.train_fraction:g} leaves {len(part):,} of the {len(source):,} {source.unit} of "
                f"the training text, but context_length {self.context_length} needs at least "
                f"{self.context_length + 1}: raise it or give more text"
            )
        how = "documents by hash" if part.by_hash else "its beginning"
        self.training_text = f"{self.train_fraction:g} of it, {how}"
        return part

    def describe(self) -> dict[str, str | int]:
        return {**super().describe(), **({"training_text": self.training_text} if self.training_text else {})}

    def windows(self, sources: dict[str, TokenSource]) -> dict[str, Samples]:
        """The splits over their tokens; val and test are left out where they have no token to predict."""
        mask = self.mask_documents
        splits: dict[str, Samples] = {"train": TrainWindows(sources["train"], self.context_length, self.seed, mask)}
        for split, limit in (("val", self.max_val_samples), ("test", self.max_test_samples)):
            if split in sources and len(sources[split]) > 1:
                splits[split] = EvalWindows(sources[split], self.context_length, EVAL_SEED, limit, mask)
        return splits


class TextFiles(TextModule):
    """Plain text files, or the standard library of the running interpreter.

    Args:
        source: "stdlib", or a file, a folder (all files in it), a glob, or a list of these; no JSON lines. Files are
            split by a hash of their beginnings, those of stdlib by one of their names; fewer than three by position:
            training text first, then val, then test. All of it is held in memory, about once its size; for more than
            fits there are TokenFiles and TextShards, which `moa data` writes from any number of files.
        val_fraction: share of the files (or of the bytes, when split by position) for validation.
        test_fraction: the same for testing.
        encoding: "bytes" takes files as they are, "utf-8" takes one that is not for a bad one, which
            `on_bad_sample: skip` leaves out.
        options: `TextModule`'s.

    Raises:
        UserError: options that make no sense; in `setup`, where the source is missing, empty or too short.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        encoding: Encoding = "bytes",
        **options: Any,
    ) -> None:
        super().__init__(shuffle_block=0, **options)
        self.source: str | Sequence[str] = source
        self.encoding = check_encoding(encoding)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._described: dict[str, str | int] = {}

    def build(self) -> dict[str, Samples]:
        documents, bad = read_corpus(self.source, self.encoding, self.on_bad_sample)
        self.faults = [(BAD, name) for name in bad]
        parts = split_documents(documents, self.val_fraction, self.test_fraction)
        sources: dict[str, TokenSource] = {
            split: JoinedBytes([d.content for d in part], [d.place for d in part]) for split, part in parts.items()
        }
        sources["train"] = self.training_part(sources["train"])
        self._described = {
            "source": self.source if isinstance(self.source, str) else ", ".join(self.source),
            "files": len(documents),
            **{f"{split}_bytes": len(source) for split, source in sources.items()},
            "sha256": corpus_sha256(documents),
        }
        return self.windows(sources)

    def describe_source(self) -> dict[str, str | int]:
        return self._described
