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
        weight = c[..., k, None]
        u = _cut(v, (weight == 0) & ~_finite(name, v))
        total = total + weighted(pointwise(name).function(u), weight)
    return total


def _pairs(v: Tensor, w: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    total = torch.zeros_like(v)
    for k, first in enumerate(names):
        for l, second in enumerate(names):  # noqa: E741
            weight = c[..., k, l, None]
            hidden = (weight == 0) & ~(_finite(first, v) & _finite(second, w))
            product = pointwise(first).function(_cut(v, hidden)) * pointwise(second).function(_cut(w, hidden))
            total = total + weighted(product, weight)
    return total


def _finite(name: str, v: Tensor) -> Tensor:
    """Where neither the activation nor its slope overflows."""
    value, slope = pointwise(name).value_and_derivative(v.detach())
    return value.isfinite() & slope.isfinite()


def _cut(v: Tensor, hidden: Tensor) -> Tensor:
    """v, to which no gradient comes where it is hidden: 0 times an overflow would be NaN."""
    return torch.where(hidden, v.detach(), v)
