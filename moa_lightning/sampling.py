"""Sampling a continuation from a language model, token by token, through a cache of what it has read.

Filters act on the probabilities after the temperature, in this order: top-k (the k likeliest), top-p (Holtzman et al.,
"The Curious Case of Neural Text Degeneration", arXiv 1904.09751: the fewest likeliest tokens that hold p of the
probability), min-p (Nguyen et al., arXiv 2407.01082: those at least min_p times as likely as the likeliest). The
likeliest token always stays. Numbers are drawn on the CPU, so the same seed gives the same text on every device up to
rounding of the logits. When the context is full, the newer half of it is read again and the text goes on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UserError


class CausalModel(Protocol):
    """What is sampled from."""

    context_length: int

    def new_cache(self) -> Any:
        """An empty cache; None where a text must be read whole for each further token."""

    def __call__(self, tokens: Tensor, cache: Any, *, last: int) -> Tensor:
        """Logits (B, last, vocab_size) after the last ones of further tokens (B, T)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int | None = None
    """keep so many of the likeliest tokens"""
    top_p: float | None = None
    """keep the fewest likeliest tokens that hold this share of the probability"""
    min_p: float | None = None
    """keep tokens at least this times as likely as the likeliest"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; give a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give a whole number of at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} is {value}; give a number above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 (B, vocab_size) from logits of that shape, by which a token is drawn."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            p = _only(p, p.topk(self.top_k, dim=-1).indices)
        if self.top_p is not None:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # of the tokens that are likelier
            p = torch.zeros_like(p).scatter(-1, index, torch.where(before < self.top_p, ordered, 0.0))
            p = p / p.sum(-1, keepdim=True)
        if self.min_p is not None:
            p = torch.where(p >= self.min_p * p.amax(-1, keepdim=True), p, 0.0)
        return p / p.sum(-1, keepdim=True)


def _only(p: Tensor, index: Tensor) -> Tensor:
    kept = torch.zeros_like(p).scatter(-1, index, p.gather(-1, index))
    return kept / kept.sum(-1, keepdim=True)


@torch.no_grad()
def continuation(
    net: CausalModel,
    tokens: Tensor,
    new_tokens: int,
    generator: torch.Generator,
    sampling: Sampling,
    ids: int | None = None,
    stop: int | None = None,
) -> Iterator[Tensor]:
    """Tokens that follow, int64 (B, 1) each, for prompts (B, T) of one length, of which the last context counts.

    Args:
        generator: on the CPU.
        ids: draw from token ids below it, where a vocabulary was padded; None: from all.
        stop: a row that has drawn this token has no other behind it, and after all rows nothing follows; None: no end.
    """
    text = tokens[:, -net.context_length :]
    cache, unread = net.new_cache(), text
    ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    for _ in range(new_tokens):
        if text.shape[1] > net.context_length:
            text = text[:, -max(1, net.context_length // 2) :]
            cache, unread = net.new_cache(), text
        with torch.compiler.set_stance("force_eager"):  # a graph for every length would be compiled
            logits = net(text if cache is None else unread, cache, last=1)[:, -1, :ids]
        unread = torch.multinomial(sampling.probabilities(logits).cpu(), 1, generator=generator).to(tokens.device)
        if stop is not None:
            unread = unread.masked_fill(ended, stop)
            ended = unread == stop
        text = torch.cat([text, unread], dim=1)
        yield unread
        if stop is not None and bool(ended.all()):
            return
