"""The data module for packed token files: nanoGPT's plain `.bin`, llm.c's with its header, and those of `moa data`.

A plain file is little-endian token ids and nothing else. llm.c's begins with 256 int32: 20240520, version 1 and the
number of tokens (uint16), or 20240801, version 7 and the number (uint32). Files are read by positioned reads of one
window, not mapped: the page cache does the same work, and a file that is cut off under a running job is an error with
a name instead of a bus error that kills the process.
"""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.base import Samples
from data.documents import SPLITS
from data.faults import BadSample, reading
from data.shards import Stamp, open_unchanged, stamp_of
from data.text import TextModule
from data.token_source import TokenSource, numbered_hashes, pieces
from data.token_writer import DESCRIPTION, STARTS, TOKENIZER, token_dtype
from data.tokenizer import BYTES, CHARACTERS, Tokenizer, open_tokenizer
from moa_lightning.errors import UserError

HEADER_BYTES = 256 * 4
_FORMATS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c: magic number and version


class TokenFile(NamedTuple):
    """Where the tokens of one file lie."""

    path: str
    stamp: Stamp
    dtype: str
    offset: int  # bytes
    tokens: int


def find_tokens(path: str, plain: np.dtype, expected: int | None = None) -> TokenFile:
    """Read the header of a token file, if it has one.

    Args:
        path: the file.
        plain: the type of tokens in a file without a header.
        expected: how many tokens there must be, where that is known.

    Raises:
        UserError: it cannot be read, is empty, or was cut off.
    """
    try:
        stamp = stamp_of(os.stat(path))
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(12), "<i4")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise UserError(f"token file '{path}' cannot be read ({error.strerror}): check it") from error
        header = np.zeros(0, "<i4")  # less than a header's beginning, and no multiple of 4 bytes
    size = stamp[0]
    dtype = _FORMATS.get((int(header[0]), int(header[1]))) if len(header) == 3 else None
    offset = HEADER_BYTES if dtype else 0
    kind = np.dtype(dtype) if dtype else plain
    count, rest = divmod(size - offset, kind.itemsize)
    wanted = int(header[2]) if dtype else expected
    if rest or count < 1 or (wanted is not None and wanted != count):
        told = f"{wanted:,} were expected" if wanted is not None else f"a token has {kind.itemsize} bytes"
        raise UserError(f"token file '{path}' holds {size:,} bytes, or {count:,} tokens, where {told}: write it again")
    return TokenFile(path, stamp, kind.str, offset, count)


def find_starts(file: TokenFile) -> np.ndarray:
    """First token of each document of a token file, ascending int64; UserError where nothing beside it says so."""
    path = Path(file.path).with_suffix(STARTS)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.mask_documents needs to know where documents begin, and '{path}' beside the token file cannot be "
            f"read ({error.strerror}): write the files with moa data tokens, or leave mask_documents out"
        ) from error
    starts = np.frombuffer(content[: len(content) // 8 * 8], "<i8").astype(np.int64)
    if len(content) % 8 or (np.diff(starts, prepend=-1, append=file.tokens) <= 0).any():
        raise UserError(f"'{path}' does not fit the {file.tokens:,} tokens beside it: write the token files again")
    return starts


class TokenStream:
    """The tokens of several files, one after another, of which only asked pieces are read.

    Args:
        files: where they lie.
        vocab_size: every id must be below it.
    """

    unit = "tokens"

    def __init__(self, files: Sequence[TokenFile], vocab_size: int) -> None:
        self.files, self.vocab_size = list(files), vocab_size
        self.starts = np.concatenate([[0], np.cumsum([file.tokens for file in files])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        found = [self._piece(self.files[number], low, high) for number, low, high in pieces(self.starts, start, stop)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def document_starts(self) -> np.ndarray:
        return np.concatenate([first + find_starts(file) for first, file in zip(self.starts, self.files, strict=False)])

    def document_hashes(self) -> np.ndarray | None:
        if not all(Path(file.path).with_suffix(STARTS).is_file() for file in self.files):
            return None
        named = [(os.path.basename(file.path), len(find_starts(file))) for file in self.files]
        return np.concatenate([numbered_hashes(name, count) for name, count in named])

    def _piece(self, file: TokenFile, start: int, stop: int) -> np.ndarray:
        dtype = np.dtype(file.dtype)
        content, wanted = b"", (stop - start) * dtype.itemsize
        with reading(file.path, lambda: f"token file '{file.path}'"):
            opened = open_unchanged(file.path, file.stamp)
            if opened is not None:
                content = os.pread(opened.fileno(), wanted, file.offset + start * dtype.itemsize)
        if len(content) < wanted:
            raise BadSample(file.path, f"token file '{file.path}' was changed or cut off during the run: put it back")
        tokens = np.frombuffer(content, dtype).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise BadSample(
                file.path,
                f"token file '{file.path}' has the token {tokens[place]} at place {start + place}, but the vocabulary "
                f"ends at {self.vocab_size - 1}: give the tokenizer that it was written with",
            )
        return tokens


class TokenFiles(TextModule):
    """Packed token files, as `moa data tokens`, nanoGPT's or llm.c's scripts write them.

    Args:
        source: folder with `.bin` files that have train, val or test in their names; or one such file to train on.
        tokenizer: "bytes", a tokenizer.json or nanoGPT's meta.pkl; None: what lies in the folder.
        shuffle_block: neighbouring windows that stay together while 16 such blocks are mixed; 0 shuffles freely.
        options: `TextModule`'s. Only files of `moa data tokens` say where documents begin.

    Raises:
        UserError: options that make no sense; in `setup`, files that are missing, cut off or too short, or that
            another tokenizer wrote.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str | None = None,
        shuffle_block: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(shuffle_block=shuffle_block, **options)
        self.source, self.tokenizer_name = source, tokenizer
        self._described: dict[str, str | int] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        description = self._description()
        name = self.tokenizer_name or description.get("tokenizer") or TOKENIZER
        if self.tokenizer_name is None and name != BYTES:
            beside = [self._folder() / TOKENIZER, self._folder() / CHARACTERS]
            name = next((str(path) for path in beside if path.is_file()), "")
            if not name:
                raise UserError(
                    f"token files '{self.source}' have no tokenizer.json beside them, nor a {CHARACTERS}: give "
                    "data.tokenizer, a tokenizer.json or bytes"
                )
        tokenizer = open_tokenizer(name)
        if description.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            raise UserError(
                f"token files '{self.source}' were not written with the tokenizer '{name}': give the one that "
                "wrote them"
            )
        return tokenizer

    def _folder(self) -> Path:
        path = Path(self.source).expanduser()
        return path if path.is_dir() else path.parent

    def _description(self) -> dict[str, Any]:
        """The folder's tokens.json; empty where there is none."""
        path = self._folder() / DESCRIPTION
        if not path.is_file():
            return {}
        try:
            description = json.loads(path.read_text())
            parts = [description["tokenizer"], description["tokenizer_sha256"]]
            counts = [part["tokens"] for part in description["splits"].values()]
            files = [part["file"] for part in description["splits"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"'{path}' does not describe token files ({error!r}): write them again") from error
        if not all(isinstance(text, str) for text in [*parts, *files]) or {type(count) for count in counts} - {int}:
            raise UserError(f"'{path}' does not describe token files (a value has the wrong type): write them again")
        return description

    def _paths(self) -> dict[str, list[str]]:
        path = Path(self.source).expanduser()
        if path.is_file():
            return {"train": [str(path)]}
        if not path.is_dir():
            raise UserError(f"token files '{self.source}' do not exist: give a folder, or a .bin file")
        found = {split: sorted(glob.glob(f"{glob.escape(str(path))}/*{split}*.bin")) for split in SPLITS}
        names = [path for paths in found.values() for path in paths]
        if twice := next((path for path in names if names.count(path) > 1), None):
            raise UserError(f"token file '{twice}' has the names of two splits, so it would be both: rename it")
        if not found["train"]:
            raise UserError(f"folder '{self.source}' holds no *train*.bin: write it with moa data tokens")
        return {split: paths for split, paths in found.items() if paths}

    def build(self) -> dict[str, Samples]:
        found, parts = self._paths(), self._description().get("splits", {})
        known = {part["file"]: part["tokens"] for part in parts.values()}
        size = self.vocab_size
        plain = token_dtype(size)
        sources: dict[str, TokenSource] = {}
        for split, paths in found.items():
            files = [find_tokens(path, plain, known.get(os.path.basename(path))) for path in paths]
            sources[split] = TokenStream(files, size)
        sources["train"] = self.training_part(sources["train"])
        self._described = {
            "source": self.source,
            "tokenizer": self.tokenizer.name,
            "vocab_size": size,
            **{f"{split}_tokens": len(source) for split, source in sources.items()},
            **self._sha256(parts),
        }
        return self.windows(sources)

    @staticmethod
    def _sha256(parts: dict[str, Any]) -> dict[str, str | int]:
        """A digest of the digests that were taken on writing; none for files of others, which may be huge."""
        if not parts:
            return {}
        digests = "".join(f"{split} {part.get('sha256')}\n" for split, part in sorted(parts.items()))
        return {"sha256": hashlib.sha256(digests.encode()).hexdigest()}

    def describe_source(self) -> dict[str, str | int]:
        return self._described
