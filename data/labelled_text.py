"""Texts with labels: one text a sample or several, and a class or a number.

The texts of a sample stand one after another, each with the token between documents behind it (NUL for bytes), as a
language model has met it in training. Where they do not fit into the context, the longest are cut first, at their end,
and all of those to one length. A batch is padded to its longest sample.
"""

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from data.base import EVAL_SEED, Samples
from data.subsets import share
from data.text import TokenModule
from data.tokenizer import BYTES, Tokenizer, open_tokenizer
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

Item = TypeVar("Item")

UNLABELLED = -1  # as of images; a number that is not known is NaN


class Row(NamedTuple):
    """A sample before it is cut into tokens."""

    texts: tuple[str, ...]
    label: float | None
    """number of the class, or the number; None: not known"""


class LabelledSamples(Samples):
    """Rows as tokens. A sample has "tokens" int64 (n,) and "label", int64, or float32 where it is a number; a batch has
    "tokens" (B, T), "lengths" (B,) and "label" (B,).

    Args:
        numbers: labels are numbers.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: Tokenizer, context_length: int, numbers: bool, training: bool, seed: int
    ) -> None:
        super().__init__(seed)
        self.rows, self.tokenizer, self.context_length, self.training = rows, tokenizer, context_length, training
        self.hidden: float = float("nan") if numbers else UNLABELLED
        dtype = torch.float32 if numbers else torch.int64
        self.labels = torch.tensor([self.hidden if row.label is None else row.label for row in rows], dtype=dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        texts = self.tokenizer.encode([text.encode() for text in self.rows[index].texts])
        end = np.array([self.tokenizer.separator])
        kept = fitting([len(text) for text in texts], self.context_length - len(texts))
        parts = [part for text, length in zip(texts, kept, strict=True) for part in (text[:length], end)]
        return {"tokens": torch.from_numpy(np.concatenate(parts)), "label": self.labels[index]}

    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "label": torch.full_like(sample["label"], self.hidden)}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = [sample.pop("tokens") for sample in samples]
        padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.separator)
        return {"tokens": padded, "lengths": torch.tensor([len(row) for row in tokens]), **default_collate(samples)}


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each text is kept so that all fit: all of the short ones, and equal parts of the others."""
    kept, shortest_first = [0] * len(lengths), sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(shortest_first):
        kept[i] = min(lengths[i], room // (len(lengths) - done))
        room -= kept[i]
    return kept


class LabelledText(TokenModule):
    """Base of the modules of labelled text. Subclasses say what the rows are.

    Args:
        tokenizer: "bytes", a tokenizer.json or a meta.pkl: that of the language model whose weights are taken.
        options: `TokenModule`'s. `train_fraction` keeps rows, of each class the same share.

    Attributes:
        num_classes: 1 where labels are numbers; after `setup`, unless it is known before.
        metrics: scores that judge these labels, see evaluation/labels.py.
    """

    num_classes: int | None
    metrics: list[str]

    def __init__(self, tokenizer: str = BYTES, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer_name = tokenizer
        self.target_scale: list[float] | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_name)

    @abstractmethod
    def read(self) -> dict[str, list[Row]]:
        """The splits "train" and, where there are any, "val" and "test"."""

    @abstractmethod
    def describe_rows(self) -> dict[str, str | int]:
        """Where the rows came from, after `setup`."""

    def build(self) -> dict[str, Samples]:
        rows = self.read()
        if not rows["train"]:
            raise UserError(f"{self.describe_rows()['source']} has no text to train on: give some")
        for split in [split for split, part in rows.items() if not part]:
            raise UserError(
                f"{self.describe_rows()['source']} has no text in its {split} split: give {split} data or a larger "
                f"{split}_fraction"
            )
        if self.train_fraction < 1:
            rows["train"] = self._share(rows["train"])
        texts = len(rows["train"][0].texts)
        if self.context_length < 2 * texts:
            raise UserError(f"context_length is {self.context_length}; {texts} texts and their ends need {2 * texts}")
        for split, limit in (("val", self.max_val_samples), ("test", self.max_test_samples)):
            if limit is not None and split in rows:
                rows[split] = some(rows[split], limit, split)
        self.sha256 = rows_sha256(rows)
        if self.num_classes == 1:
            numbers = [row.label for row in rows["train"] if row.label is not None]
            if len(set(numbers)) < 2:
                raise UserError(f"{self.describe_rows()['source']} has one number as every training label: give others")
            self.target_scale = [float(np.mean(numbers)), float(np.std(numbers))]
        return {
            split: LabelledSamples(
                part,
                self.tokenizer,
                self.context_length,
                self.num_classes == 1,
                split == "train",
                self.seed if split == "train" else EVAL_SEED,
            )
            for split, part in rows.items()
        }

    def _share(self, rows: list[Row]) -> list[Row]:
        """What `train_fraction` leaves of the training rows."""
        classes = [UNLABELLED if row.label is None or self.num_classes == 1 else int(row.label) for row in rows]
        return [rows[i] for i in share(torch.tensor(classes), self.train_fraction, EVAL_SEED).tolist()]

    def describe_source(self) -> dict[str, str | int]:
        kind = "numbers" if self.num_classes == 1 else f"{self.num_classes} classes"
        facts = {"labels": kind, "scores": ", ".join(self.metrics), "sha256": self.sha256}
        part = {"training_text": f"{self.train_fraction:g} of the rows"} if self.train_fraction < 1 else {}
        return {**self.describe_rows(), **part, **facts}


def some(rows: list[Row], limit: int, name: str) -> list[Row]:
    """At most `limit` rows, the same ones whatever the seed of the run; files may be sorted by label, so at random."""
    if limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(named_seed(0, name)).sample(range(len(rows)), limit))]


def evenly(items: list[Item], limit: int) -> list[Item]:
    """At most `limit` of the items, evenly spaced."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def rows_sha256(rows: dict[str, list[Row]]) -> str:
    """A digest of all rows, to tell whether two runs saw the same."""
    digest = hashlib.sha256()
    for split, part in rows.items():
        digest.update(f"{split} {len(part)}\n".encode())
        for row in part:
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()
