"""The data module for text in WebDataset shards: one document (`.txt`) a sample, read from disk window by window."""

import os
import re
from typing import Any

import numpy as np

from data.base import Samples
from data.documents import NO_UTF8, Encoding, check_encoding, invalid_utf8
from data.faults import BadSample
from data.shards import ShardMembers, ShardSplits
from data.text import TextModule
from data.token_source import TokenSource, numbered_hashes


class ShardBytes:
    """The documents of several shards as one byte string, joined by NUL, of which only asked pieces are read."""

    unit = "bytes"

    def __init__(self, members: ShardMembers, encoding: Encoding = "bytes") -> None:
        self.members, self.encoding = members, encoding
        # starts[i] is the first byte of document i; each but the last is followed by a separator
        self.starts = np.concatenate([[0], np.cumsum(members.spans[:, 1] + 1)])

    def __len__(self) -> int:
        return int(self.starts[-1]) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        piece = np.zeros(stop - start, dtype=np.uint8)
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        while (first := int(self.starts[document])) < stop:
            low, high = max(start, first), min(stop, int(self.starts[document + 1]) - 1)
            if low < high:
                content = self._piece(document, low - first, high - first)
                piece[low - start : high - start] = np.frombuffer(content, dtype=np.uint8)
            document += 1
            if document == len(self.members):
                break
        return piece

    def document_starts(self) -> np.ndarray:
        return self.starts[:-1]

    def document_hashes(self) -> np.ndarray | None:
        counts = np.bincount(self.members.shard, minlength=len(self.members.paths)).tolist()
        names = [os.path.basename(path) for path in self.members.paths]
        return np.concatenate([numbered_hashes(name, count) for name, count in zip(names, counts, strict=True)])

    def _piece(self, document: int, start: int, stop: int) -> bytes:
        """Bytes start..stop-1 of a document; BadSample where they are not of the encoding."""
        content = self.members.read(document, start, stop)
        if self.encoding == "utf-8":
            # a window may begin inside a character, which has at most three bytes after its first
            middle = re.match(rb"[\x80-\xbf]{0,3}", content if start else b"")
            place = invalid_utf8(content[middle.end() if middle else 0 :])
            if place is not None:
                raise BadSample(self.members.file(document), f"{self.members.name(document)} is not UTF-8: {NO_UTF8}")
        return content


class TextShards(TextModule):
    """Text in tar shards, as `moa data text` writes them or as any WebDataset with `.txt` members has it.

    Args:
        train: shards for training: a path, a glob, a range `path/train-{000000..000009}.tar`, or a list of these.
        val: the same for validation; None trains without.
        test: the same for testing.
        encoding: "bytes" takes text as it is, "utf-8" takes a window that is not for a bad sample.
        shuffle_block: neighbouring windows that stay together while 16 such blocks are mixed; 0 shuffles freely.
        options: `TextModule`'s.

    Raises:
        UserError: options that make no sense; in `setup`, shards that are missing, damaged, empty or without `.txt`
            members, or too little text.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        encoding: Encoding = "bytes",
        shuffle_block: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(shuffle_block=shuffle_block, **options)
        self.encoding = check_encoding(encoding)
        self.shards = ShardSplits(("txt",), train=train, val=val, test=test)

    def prepare_data(self) -> None:
        """Build missing indices in one process of each machine before all of them read."""
        self.shards.read()

    def build(self) -> dict[str, Samples]:
        members = self.shards.read()
        sources: dict[str, TokenSource] = {name: ShardBytes(part, self.encoding) for name, part in members.items()}
        sources["train"] = self.training_part(sources["train"])
        self.shards.facts |= {f"{name}_bytes": len(source) for name, source in sources.items()}
        return self.windows(sources)

    def describe_source(self) -> dict[str, str | int]:
        return self.shards.facts
