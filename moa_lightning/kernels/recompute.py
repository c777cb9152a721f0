"""The mix in torch operations with its backward pass written out: any device, dtype and activation, no compiler needed.

With y = sum_k c_k sigma_k(a):  dL/da = g · sum_k c_k sigma_k'(a),  dL/dc_k = sum over h of g · sigma_k(a). The gradient
of a coefficient does not vanish where the coefficient is 0: that is how a mix learns away from its identity start. The
product forms apply this to each branch with the other as part of g; the pair form sums over K × K products as two
small matrix products per token. Both passes are made of differentiable operations, so second derivatives come out of
them, and torch.compile can trace them (kernels.compiled).
"""

import torch
from torch import Tensor

from ..activations import pointwise
from ..autocast import without_autocast
from . import blocked, formula
from .common import Form, Gradients, weighted


def forward(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form) -> Tensor:
    """See kernels.common."""
    if b is None:
        return _mix(a, c, names).to(a.dtype)
    if form == "pairs":
        return _pairs(a, b, c, names).to(a.dtype)
    other = b.to(c.dtype) if e is None else _mix(b, e, names)
    return (_mix(a, c, names) * other).to(a.dtype)


def backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    """See kernels.common."""
    if form == "pairs":
        assert b is not None
        return _pairs_backward(g, a, b, c, names)
    g = g.to(c.dtype)
    if b is None:
        da, dc = _mix_backward(g, a, c, names)
        return da.to(a.dtype), dc, None, None
    db, de = g * _mix(a, c, names), None
    other = b.to(c.dtype) if e is None else _mix(b, e, names)
    if e is not None:
        db, de = _mix_backward(db, b, e, names)
    da, dc = _mix_backward(g * other, a, c, names)
    return da.to(a.dtype), dc, db.to(b.dtype), de


def _mix(u: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    """sum_k c_k sigma_k(u) in c's dtype."""
    if blocked.applies(u, c) and (quick := blocked.mix_forward(u, c, names)) is not None:
        return quick
    v = u.to(c.dtype)
    total = torch.zeros_like(v)
    for k, name in enumerate(names):
        total = total + weighted(_value(name, v), c[..., k, None])
    return total


def _mix_backward(g: Tensor, u: Tensor, c: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Gradients for u and, one row a token, for c; g and both results in c's dtype."""
    if blocked.applies(g, u, c) and (quick := blocked.mix_backward(g, u, c, names)) is not None:
        return quick
    v = u.to(c.dtype)
    slope = torch.zeros_like(v)
    dc = []
    for k, name in enumerate(names):
        value, derivative = _value_and_slope(name, v)
        slope = slope + weighted(derivative, c[..., k, None])
        dc.append((g * value).sum(-1))
    return g * slope, torch.stack(dc, -1)


def _value(name: str, v: Tensor) -> Tensor:
    return formula.traced(name, v)[0] if formula.applies(name, v) else pointwise(name).function(v)


def _value_and_slope(name: str, v: Tensor) -> tuple[Tensor, Tensor]:
    return formula.traced(name, v) if formula.applies(name, v) else pointwise(name).value_and_derivative(v)


def _pairs(a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    first, second = (torch.stack([_value(name, u.to(c.dtype)) for name in names], -2) for u in (a, b))  # (..., K, h)
    with without_autocast(a.device.type):  # the matrix products stay in float32, here and below
        inner = torch.matmul(c, _used(second, c, -2))  # (..., K, h): sum_l c_kl sigma_l(b)
    return (_used(first, c, -1) * inner).sum(-2)


def _pairs_backward(g: Tensor, a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...]) -> Gradients:
    first, first_slope = _activated(a, c, names)
    second, second_slope = _activated(b, c, names)
    g = g.to(c.dtype)[..., None, :]
    with without_autocast(a.device.type):  # backward may be called inside an autocast region
        grad_first = g * torch.matmul(c, _used(second, c, -2))  # (..., K, h)
        grad_second = g * torch.matmul(c.mT, _used(first, c, -1))
        dc = torch.matmul(g * first, second.mT)  # (..., K, K)
    da = _used(grad_first * first_slope, c, -1).sum(-2)
    db = _used(grad_second * second_slope, c, -2).sum(-2)
    return da.to(a.dtype), dc, db.to(b.dtype), None


def _activated(u: Tensor, c: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """sigma_k(u) and its slope, each stacked to (..., K, h)."""
    both = [_value_and_slope(name, u.to(c.dtype)) for name in names]
    return torch.stack([value for value, _ in both], -2), torch.stack([slope for _, slope in both], -2)


def _used(values: Tensor, c: Tensor, over: int) -> Tensor:
    """Zero the rows whose coefficients are all 0, so that an overflow there does not become 0 · inf; where autograd is
    to follow, only what has overflowed, see common.weighted."""
    kept = (c != 0).any(over)[..., None]
    return torch.where(kept | values.isfinite() if torch.is_grad_enabled() else kept, values, 0.0)
