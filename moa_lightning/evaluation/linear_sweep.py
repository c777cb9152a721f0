"""Linear evaluation of frozen features: many softmax regressions trained side by side on features that were computed
once, and the best of them chosen on labelled images set aside from the training ones.

It follows the official evaluations where they agree (DINO arXiv 2104.14294, MAE arXiv 2111.06377, DINOv2 arXiv
2304.07193): SGD with momentum 0.9, a cosine to zero, no weight decay, one linear layer. Where they differ both ways are
candidates: MAE standardises every dimension (batch normalisation without a learned scale), DINO takes features as they
are (here: one scale for all dimensions, so that the same rates fit any net). DINO and DINOv2 sweep learning rates, and
so does this; with a swept rate and batches of 256, MAE's LARS, which is for batches of 16,384, has nothing left to do.
Official training draws crops and flips for every epoch; cached features are of the plain view, which costs some
accuracy and saves nearly all of the time.

The gradient is written out and all candidates share one matrix product a step. The classifiers start at zero and the
order is drawn from a seed of its own, so the same features give the same figures.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Scaling: TypeAlias = Literal["each", "all"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALINGS: tuple[Scaling, ...] = ("each", "all")
MOMENTUM, BATCH, EPS = 0.9, 256, 1e-6
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 10_000, 10, 100  # DINOv2 trains 10 epochs of ImageNet, DINO 100, MAE 90
FEWEST_STEPS = 1_000  # of a few hundred images, for which 100 epochs are as many steps


@dataclass(frozen=True)
class LinearAccuracy:
    """What a sweep found; accuracies in percent."""

    top1: float
    """on the queries, of the chosen candidate trained on all labelled features"""
    chosen_top1: float
    """on the features set aside, where it was the best"""
    rate: float
    scaling: Scaling
    """"each": dimensions standardised one by one; "all": by one scale"""
    at_edge: bool
    """whether the rate is the least or the largest of the sweep, so that a better one may lie outside"""


class LinearClassifiers:
    """Softmax regressions on scaled features, one for each learning rate: weight (R, C, D), bias (R, C).

    Args:
        features: (n, D), which set mean and scale.
        scaling: of the features.
        rates: peak learning rates, R of them.
    """

    def __init__(self, features: Tensor, scaling: Scaling, classes: int, rates: tuple[float, ...]) -> None:
        self.mean = features.mean(0)
        variance = (features - self.mean).square().mean(0)
        self.scale = ((variance if scaling == "each" else variance.mean()) + EPS).rsqrt()
        self.rates = torch.tensor(rates, device=features.device)
        self.weight = features.new_zeros(len(rates), classes, features.shape[1])
        self.bias = features.new_zeros(len(rates), classes)

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) -> (R, n, C)."""
        return self._logits((features - self.mean) * self.scale)

    def _logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias[:, None]

    def fit(self, features: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> None:
        """Train on (n, D) with labels (n,), in batches of 256 or all at once where there are fewer."""
        count, size = len(features), min(BATCH, len(features))
        generator = torch.Generator().manual_seed(seed)
        velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        total, step = epochs * (count // size), 0
        for _ in range(epochs):
            order = torch.randperm(count, generator=generator)[: count // size * size].to(features.device)
            for chosen in order.split(size):
                x = (features[chosen] - self.mean) * self.scale
                targets = F.one_hot(labels[chosen], self.bias.shape[1])
                error = (self._logits(x).softmax(-1) - targets) / size  # (R, B, C)
                rate = self.rates * 0.5 * (1 + math.cos(math.pi * step / total))
                velocity[0].mul_(MOMENTUM).add_(error.mT @ x)
                velocity[1].mul_(MOMENTUM).add_(error.sum(1))
                self.weight -= rate[:, None, None] * velocity[0]
                self.bias -= rate[:, None] * velocity[1]
                step += 1

    def top1(self, features: Tensor, labels: Tensor) -> list[float]:
        """Percent of (n, D) that each classifier gets right."""
        right = torch.zeros(len(self.rates), device=features.device)
        for x, y in zip(features.split(4096), labels.split(4096), strict=True):
            right += (self.logits(x).argmax(-1) == y).sum(1)
        return (100.0 * right / len(labels)).tolist()


@torch.no_grad()
def linear_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    epochs: int | None = None,
    rates: tuple[float, ...] = RATES,
    held_out: float = 0.1,
) -> LinearAccuracy:
    """Linear accuracy on queries (m, D), with labels (m,), after training on a bank (n, D) with labels (n,).

    Rate and scaling are chosen on a share `held_out` of the bank, which has every class in its proportion; the chosen
    classifier is then trained on the whole bank. The queries are looked at once, at the end. Without `epochs` it is
    about 10,000 steps, but 10 epochs at least and 100 at most, of few features as many as make 1,000 steps.

    Raises:
        UserError: no class has two features in the bank, so none can be set aside.
    """
    bank, queries = bank.float(), queries.float()
    epochs = default_epochs(len(bank)) if epochs is None else epochs
    classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
    aside = set_aside(bank_labels, held_out)
    if not aside.any():
        raise UserError(
            "a linear probe chooses its rate on labelled images that are set aside, and no class has two: give more "
            "labelled images"
        )
    best: tuple[float, int, Scaling] | None = None
    for scaling in SCALINGS:
        candidates = LinearClassifiers(bank[~aside], scaling, classes, rates)
        candidates.fit(bank[~aside], bank_labels[~aside], epochs)
        for number, accuracy in enumerate(candidates.top1(bank[aside], bank_labels[aside])):
            if best is None or accuracy > best[0]:
                best = accuracy, number, scaling
    assert best is not None
    accuracy, number, scaling = best
    final = LinearClassifiers(bank, scaling, classes, rates[number : number + 1])
    final.fit(bank, bank_labels, epochs)
    edge = rates[number] in (min(rates), max(rates))
    return LinearAccuracy(final.top1(queries, labels)[0], accuracy, rates[number], scaling, edge)


def default_epochs(samples: int) -> int:
    """Epochs of about STEPS batches, within what the official protocols train, of few samples FEWEST_STEPS batches."""
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS * BATCH / samples)))
    return max(epochs, math.ceil(FEWEST_STEPS / max(1, samples // BATCH)))


def set_aside(labels: Tensor, share: float) -> Tensor:
    """Which of n samples are set aside: bool (n,), the share of every class (one at least, never all), the same every
    time."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    aside = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        members = order[labels[order] == label]
        aside[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return aside
