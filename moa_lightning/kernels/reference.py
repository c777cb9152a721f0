"""The mix as the formula reads, differentiated by autograd: the yardstick of the other implementations.

It stores K activated tensors of a's size for the backward pass, so training does not use it.
"""

import torch
from torch import Tensor

from ..activations import pointwise
from .common import Form, weighted


def forward(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form) -> Tensor:
    """See kernels.common."""
    v = a.to(c.dtype)
    if b is None:
        return _mix(v, c, names).to(a.dtype)
    w = b.to(c.dtype)
    if form == "pairs":
        return _pairs(v, w, c, names).to(a.dtype)
    other = w if e is None else _mix(w, e, names)
    return (_mix(v, c, names) * other).to(a.dtype)


def _mix(v: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    total = torch.zeros_like(v)
    for k, name in enumerate(names):
        total = total + weighted(pointwise(name).function(v), c[..., k, None])
    return total


def _pairs(v: Tensor, w: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    total = torch.zeros_like(v)
    for k, first in enumerate(names):
        for l, second in enumerate(names):  # noqa: E741
            one, other, weight = pointwise(first).function(v), pointwise(second).function(w), c[..., k, l, None]
            hidden = (weight == 0) & ~(one * other).isfinite()  # each factor is the gradient of the other
            total = total + weight * (torch.where(hidden, 0.0, one) * torch.where(hidden, 0.0, other))
    return total
