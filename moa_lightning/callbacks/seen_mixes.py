"""What one mix did with one batch: token by token where tokens stand in their places, in means where experts have them.

Rows of routed experts are sorted by expert, and a token has as many rows as experts took it: they are summed up by
expert as they come, and their means are over rows, so an expert weighs as much as it was given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..experts import Rows
from ..mixing import MixCoefficients
from .mixing import filled_slots, gate_entropy

MAX_TOKENS = 4096  # of the batch that are looked at, in whole samples; of experts' rows all


@dataclass
class Seen:
    """What one mix did with the batch; B samples of T tokens."""

    coefficients: Tensor
    """(B, T, K), K² for pairs"""
    entropy: Tensor | None
    """(B, T), None without gates"""
    histogram: Tensor | None = None
    """(P - 1,) shares of pre-activations between the points of a curve, None for pairs"""

    @property
    def mean(self) -> Tensor:
        """(K,)"""
        return self.coefficients.mean((0, 1))

    @property
    def std(self) -> Tensor:
        """(K,)"""
        return self.coefficients.std((0, 1), correction=0)

    @property
    def mean_entropy(self) -> float | None:
        return None if self.entropy is None else self.entropy.double().mean().item()


@dataclass
class SeenByExperts:
    """What the mixes of E experts did with the rows that they were given."""

    rows: Tensor
    """(E,)"""
    sums: Tensor
    """(E, K) of coefficients, K² for pairs"""
    squares: Tensor
    """(E, K), likewise"""
    entropies: Tensor | None
    """(E,) sums over rows, None without gates"""
    histogram: Tensor | None = None
    """as in `Seen`"""

    @property
    def mean(self) -> Tensor:
        """(K,)"""
        return self.sums.sum(0) / self.rows.sum()

    @property
    def std(self) -> Tensor:
        """(K,), over rows of all experts"""
        return (self.squares.sum(0) / self.rows.sum() - self.mean.square()).clamp(min=0).sqrt()

    @property
    def mean_entropy(self) -> float | None:
        return None if self.entropies is None else (self.entropies.sum() / self.rows.sum()).item()

    @property
    def used(self) -> list[int]:
        """Experts that were given a row."""
        return self.rows.nonzero().flatten().tolist()

    @property
    def means(self) -> Tensor:
        """(E, K), NaN for an expert without rows"""
        return self.sums / self.rows[:, None]

    def facts(self) -> dict[str, list[Any]]:
        """Numbers by expert for JSON, null for one without rows."""
        means = self.means.tolist()
        found: dict[str, list[Any]] = {
            "rows": self.rows.long().tolist(),
            "mean": [means[e] if e in self.used else None for e in range(len(means))],
        }
        if self.entropies is not None:
            entropies = (self.entropies / self.rows).tolist()
            found["entropy"] = [entropies[e] if e in self.used else None for e in range(len(entropies))]
        return found


@torch.no_grad()
def see(module: MixCoefficients, x: Tensor, *rows: Rows) -> Seen | SeenByExperts:
    """What a mix makes of its FFN's input x (B, ..., d), or of experts' rows (R, d), slots (E, C, d)."""
    if module.stack:
        return _see_experts(module, x.detach(), *rows)
    x = _first_samples(x if x.dim() > 2 else x[:, None])
    gates, tokens = module.gates(x), x.shape[:2]
    entropy = None
    if gates is not None and module.gate is not None:
        entropy = gate_entropy(gates.reshape(tokens.numel(), -1), module.gate).view(tokens).cpu()
    return Seen(module.coefficients(x).reshape(*tokens, -1).double().cpu(), entropy)


def _first_samples(x: Tensor) -> Tensor:
    """x (B, ..., d) -> (b, T, d), the first samples that hold at most MAX_TOKENS tokens, at least one."""
    x = x.flatten(1, -2)
    return x[: max(1, MAX_TOKENS // x.shape[1])].detach()


def _see_experts(module: MixCoefficients, x: Tensor, *rows: Rows) -> SeenByExperts:
    experts = module.stack[0]
    coefficients = module.coefficients(x, *rows).flatten(-module.entry_axes).double()
    gates = module.gates(x, *rows)
    if rows:
        expert = rows[0].expert
    else:
        filled = filled_slots(x)  # (E, C)
        expert = torch.arange(experts, device=x.device)[:, None].expand_as(filled)[filled]
        coefficients, gates = coefficients[filled], None if gates is None else gates[filled]

    def sums(values: Tensor) -> Tensor:
        """(R, ...) -> (E, ...)"""
        return values.new_zeros(experts, *values.shape[1:]).index_add(0, expert, values).cpu()

    entropies = None
    if gates is not None and module.gate is not None:
        entropies = sums(gate_entropy(gates.flatten(1), module.gate).double())
    counts = sums(torch.ones_like(expert, dtype=torch.float64))
    return SeenByExperts(counts, sums(coefficients), sums(coefficients.square()), entropies)
