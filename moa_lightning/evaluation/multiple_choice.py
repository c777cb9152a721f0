"""Multiple-choice questions: does a language model find the right ending the likeliest one?

An ending is worth the sum of the log-probabilities of its tokens after the context. Questions are read from JSONL in
HellaSwag's format (Zellers et al., arXiv 1905.07830) and ARC's (Clark et al., arXiv 1803.05457; as published, and as on
the Hugging Face hub). How a record becomes text, where its tokens part and what is divided by what follows the
lm-evaluation-harness, so that figures can be compared: `acc` takes the largest sum, `acc_norm` the largest sum per
character of the ending, `acc_bytes` per byte; of equal ones the first.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..losses.language import IGNORED


@dataclass(frozen=True)
class Question:
    """A context with endings to choose from."""

    context: str
    endings: tuple[str, ...]
    """without the space before them"""
    answer: int
    """number of the right ending"""
    place: str
    """where it stands, for messages"""


@dataclass(frozen=True)
class Continuation:
    """One ending of a question in tokens."""

    tokens: list[int]
    """of the context, cut on the left where it is too long, and of the ending"""
    scored: int
    """how many of them are the ending's, at the end"""


def read_questions(path: str) -> list[Question]:
    """The questions of a JSONL file; empty lines are passed over.

    Raises:
        UserError: a file that cannot be read or has no question, a line that is none; it names the line.
    """
    try:
        lines = Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"choices '{path}' cannot be read ({error.strerror}); give a JSONL file") from error
    questions = [_question(line, f"'{path}', line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"choices '{path}' holds no question; give one a line, in HellaSwag's or ARC's format")
    return questions


def _question(line: bytes, place: str) -> Question:
    try:
        record = json.loads(line)
        context, endings, answer = _arc(record) if "answerKey" in record else _hellaswag(record)
        if not all(isinstance(ending, str) for ending in endings):
            raise TypeError("an ending is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"choices {place} is no question in HellaSwag's or ARC's format ({reason}); correct it"
        ) from error
    if len(endings) < 2 or not 0 <= answer < len(endings) or not all(endings) or not context.strip():
        raise UserError(
            f"choices {place} has {len(endings)} endings and ending {answer} as its answer; give a context, at least "
            "two endings that are not empty, and one of them, counted from 0, as the answer"
        )
    return Question(context, tuple(endings), answer, place)


def _hellaswag(record: dict[str, Any]) -> tuple[str, list[str], int]:
    """Fields activity_label, ctx_a, ctx_b or ctx alone; endings; label."""
    if "ctx_a" in record:
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    else:
        context = record["ctx"]
    endings = record["endings"]
    if not isinstance(endings, list):
        raise TypeError("endings is no list")
    return _without_brackets(context), [_without_brackets(ending) for ending in endings], int(record["label"])


def _without_brackets(text: str) -> str:
    """What WikiHow's parts of HellaSwag carry over from their pages is taken out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(record: dict[str, Any]) -> tuple[str, list[str], int]:
    """Fields question, with stem and choices inside or choices beside it; answerKey."""
    question, choices = record["question"], record.get("choices", [])
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = list(choices["text"]), list(choices["label"])
    else:
        texts, labels = [one["text"] for one in choices], [one["label"] for one in choices]
    return f"Question: {question}\nAnswer:", texts, labels.index(record["answerKey"])


def continuations(
    questions: Sequence[Question], encode: Callable[[str], list[int]], context_length: int
) -> list[Continuation]:
    """All endings of all questions in tokens, one question after another.

    Args:
        encode: text to tokens.
        context_length: longest input of the model, in tokens.

    Raises:
        UserError: an ending that is longer than that.
    """
    found = []
    for question in questions:
        context = question.context.rstrip()
        start = len(encode(context))
        for ending in question.endings:
            # encoded with its context: a tokenizer may treat the beginning of a text in a way of its own
            tokens = encode(f"{question.context} {ending}")
            scored = len(tokens) - start
            if not 0 < scored <= context_length:
                raise UserError(
                    f"choices {question.place} has an ending of {scored} tokens, but the model reads 1 to "
                    f"{context_length}; take it out"
                )
            found.append(Continuation(tokens[-(context_length + 1) :], scored))
    return found


def as_batch(rows: Sequence[Continuation]) -> dict[str, Tensor]:
    """tokens and targets, int64 (rows, T), filled up on the right; -100 where a target is not scored."""
    length = max(len(row.tokens) for row in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        end = len(row.tokens) - 1
        tokens[number, :end] = torch.tensor(row.tokens[:-1])
        targets[number, end - row.scored : end] = torch.tensor(row.tokens[-row.scored :])
    return {"tokens": tokens, "targets": targets}


def batches(rows: Sequence[Continuation], size: int) -> list[list[int]]:
    """Numbers of rows in batches of rows of similar length, the longest first, where memory would show to be short."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    return [order[first : first + size] for first in range(0, len(order), size)]


def accuracies(questions: Sequence[Question], log_likelihoods: Tensor) -> dict[str, float]:
    """Shares of right answers: acc, acc_norm, acc_bytes.

    Args:
        log_likelihoods: of all endings in nats, one question after another.
    """
    lengths: dict[str, Callable[[str], int]] = {
        "acc": lambda ending: 1,
        "acc_norm": len,
        "acc_bytes": lambda ending: len(ending.encode()),
    }
    sums = log_likelihoods.tolist()
    right = dict.fromkeys(lengths, 0)
    first = 0
    for question in questions:
        own = sums[first : first + len(question.endings)]
        first += len(own)
        for name, length in lengths.items():
            worth = [value / length(ending) for value, ending in zip(own, question.endings, strict=True)]
            right[name] += worth.index(max(worth)) == question.answer
    return {name: count / len(questions) for name, count in right.items()}
