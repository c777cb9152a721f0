"""Little data: so many labelled images of each class, long-tailed counts, or a share of all.

    n_i = n_max · f^(-i / (C - 1)),  i = 0 ... C - 1, rounded down

for class number i and imbalance factor f, the largest count over the smallest (Cui et al., "Class-balanced loss based
on effective number of samples", arXiv 1901.05555). Which images of a class are taken follows from (seed, class) alone,
so that of two counts the smaller one's images are among the larger one's. Images without a label are left out.

A share is taken of all samples, of each class as evenly as whole images allow: the j-th of a class's n in its own order
is due at (j + 1/2) / n, and the first ones due stay (of equal ones the lower class). Those without a label count as a
class.
"""

import torch
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.random import named_seed


def check_counts(per_class: int | None, imbalance: float) -> None:
    """Raise UserError for options that make no sense."""
    if per_class is not None and per_class < 1:
        raise UserError(f"per_class is {per_class}: give the training images of a class, 1 or more, or null for all")
    if not imbalance >= 1:
        raise UserError(f"imbalance is {imbalance}: give the largest class over the smallest, 1 or more")


def check_train_fraction(train_fraction: float) -> None:
    """Raise UserError unless it is in (0, 1]."""
    if not 0 < train_fraction <= 1:
        raise UserError(f"train_fraction is {train_fraction}: give a share above 0, up to 1 for all training data")


def little_data(labels: Tensor, per_class: int | None, imbalance: float, seed: int) -> Tensor:
    """Positions of the images that training keeps, sorted: int64 (n,).

    Args:
        labels: int64 (N,) of the training images, -1 where unknown.
        per_class: images of each class, with an imbalance of class 0; None: as many as the smallest class has.
        imbalance: f above.
        seed: of the choice.

    Raises:
        UserError: no labels, too few images of a class, a class that would be left with none.
    """
    present = torch.bincount(labels[labels >= 0])
    if not len(present):
        raise UserError("per_class and imbalance choose images by their labels, and the training images have none")
    counts = long_tail(per_class or int(present.min()), imbalance, len(present))
    for label, (wanted, there) in enumerate(zip(counts, present.tolist(), strict=True)):
        if wanted > there:
            raise UserError(f"class {label} has {there} training images, and {wanted} are asked for: lower per_class")
        if wanted < 1:
            raise UserError(f"class {label} would keep no training image: raise per_class or lower imbalance")
    chosen = []
    for label, count in enumerate(counts):
        chosen.append(_in_order(labels, label, seed)[:count])
    return torch.cat(chosen).sort().values


def _in_order(labels: Tensor, label: int, seed: int) -> Tensor:
    """Positions of a class in the order in which they are taken: int64 (n,)."""
    members = torch.nonzero(labels == label).flatten()
    generator = torch.Generator().manual_seed(named_seed(seed, f"class {label}"))
    return members[torch.randperm(len(members), generator=generator)]


def share(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Positions of the samples that stay, sorted: int64 (round(fraction * N),).

    Args:
        labels: int64 (N,) of the training samples, -1 where unknown.
        fraction: the share, in (0, 1].
        seed: of the choice.

    Raises:
        UserError: nothing is left.
    """
    wanted = round(fraction * len(labels))
    if wanted < 1:
        raise UserError(f"train_fraction {fraction:g} leaves none of {len(labels):,} training samples: raise it")
    members = [_in_order(labels, label, seed) for label in labels.unique().tolist()]
    due = torch.cat([(torch.arange(len(part), dtype=torch.float64) + 0.5) / len(part) for part in members])
    return torch.cat(members)[due.argsort(stable=True)[:wanted]].sort().values


def long_tail(largest: int, imbalance: float, classes: int) -> list[int]:
    """Counts of the classes, see above."""
    # the small addend: 100 · 10^-1 is 9.999... in binary numbers
    return [int(largest * imbalance ** (-i / max(1, classes - 1)) + 1e-9) for i in range(classes)]


def describe_little(labels: Tensor, per_class: int | None, imbalance: float, seed: int) -> str:
    """What a log says about it: 50 of each class; 100 to 10 of a class, imbalance 10."""
    counts = torch.bincount(labels)
    first, last = int(counts[0]), int(counts[-1])
    how = f"{first} of each class" if imbalance == 1 else f"{first} to {last} of a class, imbalance {imbalance:g}"
    return f"{how}, subset seed {seed}"
