"""Weighted k-nearest-neighbour classification of features, the protocol of DINO's evaluation (Wu et al., arXiv
1805.01978): cosine similarity, the k nearest bank images vote with weight exp(similarity / T)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

MOST_SIMILARITIES = 2**28  # of queries with the bank that are in memory at a time: 1 GB


def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes per class, (n, classes), for queries (n, D) given a bank (m, D) with labels (m,).

    Features are normalised here; k is at most the bank's size. Runs in blocks of queries to bound memory.
    """
    return _votes(*_neighbours(bank, queries, k), bank_labels, classes, temperature)


def knn_accuracies(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, float]:
    """Percent of queries (n, D) with labels (n,) whose most voted class is theirs, for each k."""
    classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
    similarity, nearest = _neighbours(bank, queries, max(ks))
    votes = {k: _votes(similarity[:, :k], nearest[:, :k], bank_labels, classes, temperature) for k in ks}
    return {k: 100.0 * float((vote.argmax(1) == labels).float().mean()) for k, vote in votes.items()}


def _neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and position in the bank of the k nearest, nearest first: (n, k) each."""
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    rows = max(1, min(1024, MOST_SIMILARITIES // len(bank)))
    found = [(block @ bank.T).topk(k, dim=1) for block in F.normalize(queries, dim=1).split(rows)]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def _votes(similarity: Tensor, nearest: Tensor, bank_labels: Tensor, classes: int, temperature: float) -> Tensor:
    weights = (similarity / temperature).exp()
    empty = torch.zeros(len(weights), classes, dtype=weights.dtype, device=weights.device)
    return empty.scatter_add(1, bank_labels[nearest], weights)


class KNNAccuracy(Metric):
    """Top-1 accuracy in percent of a k-NN classifier on frozen features.

    Feed it with `add_bank(features, labels)` and `update(features, labels)`; samples with label -1 are left out.
    """

    bank: list[Tensor]
    bank_labels: list[Tensor]
    queries: list[Tensor]
    labels: list[Tensor]

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        for name in ("bank", "bank_labels", "queries", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add_bank(self, features: Tensor, labels: Tensor) -> None:
        """Labelled features to compare with: (B, D), (B,)."""
        known = labels >= 0
        self.bank.append(features[known].float())
        self.bank_labels.append(labels[known])
        self._update_count += 1
        self._computed = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Labelled features to classify: (B, D), (B,)."""
        known = labels >= 0
        self.queries.append(features[known].float())
        self.labels.append(labels[known])

    def compute(self) -> Tensor:
        """Percent of queries whose most voted class is theirs; NaN where bank or queries are empty."""
        nothing = torch.tensor(float("nan"), device=self.device)
        if not len(self.bank) or not len(self.queries):
            return nothing
        bank, bank_labels = dim_zero_cat(self.bank), dim_zero_cat(self.bank_labels)
        queries, labels = dim_zero_cat(self.queries), dim_zero_cat(self.labels)
        if not len(bank) or not len(queries):
            return nothing
        classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
        votes = knn_votes(bank, bank_labels, queries, classes, self.k, self.temperature)
        return 100.0 * (votes.argmax(1) == labels).float().mean()
