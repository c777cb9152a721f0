"""The mix with recomputation: the backward pass keeps the pre-activation and the coefficients and nothing else.

With y = sum_k c_k sigma_k(u):  dL/du = g · sum_k c_k sigma_k'(u),  dL/dc_k = sum over h of g · sigma_k(u). The gradient
of a coefficient does not vanish where the coefficient is 0: that is how a mix learns away from its identity start.
The pair form sums over K × K products as two small matrix products per token. Both backward passes are made of
differentiable operations, so second derivatives are right too (they do store K activated tensors).
"""

import torch
from torch import Tensor

from ..activations import pointwise
from . import blocked
from .reference import compute_dtype


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Sum the leading axes that broadcasting added: coefficients shared by all tokens."""
    return grad if grad.shape == shape else grad.sum(dim=tuple(range(grad.dim() - len(shape))))


def _weighted(value: Tensor, ck: Tensor) -> Tensor:
    return torch.where(ck == 0, ck, ck * value)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
        ctx.save_for_backward(u, c)
        ctx.names = names
        if blocked.applies(u, c) and (quick := blocked.mix_forward(u, c, names)) is not None:
            return quick
        v = u.to(c.dtype)
        total = torch.zeros_like(v)
        for k, name in enumerate(names):
            total += _weighted(pointwise(name).function(v), c[..., k, None])
        return total.to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, c = ctx.saved_tensors
        if blocked.applies(grad, u, c) and (quick := blocked.mix_backward(grad, u, c, ctx.names)) is not None:
            return quick[0], _sum_to(quick[1], c.shape), None
        v, g = u.to(c.dtype), grad.to(c.dtype)
        slope = torch.zeros_like(v)
        grad_c = []
        for k, name in enumerate(ctx.names):
            value, derivative = pointwise(name).value_and_derivative(v)
            slope += _weighted(derivative, c[..., k, None])
            grad_c.append((g * value).sum(-1))
        return (g * slope).to(u.dtype), _sum_to(torch.stack(grad_c, -1), c.shape), None


class _MixPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
        ctx.save_for_backward(a, b, c)
        ctx.names = names
        first, _ = _activated(a, c, names)
        second, _ = _activated(b, c, names)
        with torch.autocast(a.device.type, enabled=False):  # the matrix products stay in float32, here and below
            return _pair_sum(first, second, c).to(a.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b, c = ctx.saved_tensors
        first, first_slope = _activated(a, c, ctx.names, slopes=True)
        second, second_slope = _activated(b, c, ctx.names, slopes=True)
        g = grad.to(c.dtype)[..., None, :]
        with torch.autocast(a.device.type, enabled=False):  # backward may be called inside an autocast region
            grad_first = g * torch.matmul(c, _used(second, c, -2))  # (..., K, h)
            grad_second = g * torch.matmul(c.mT, _used(first, c, -1))
            grad_c = torch.matmul(g * first, second.mT)  # (..., K, K)
        used_first = (c != 0).any(-1)[..., None]
        used_second = (c != 0).any(-2)[..., None]
        grad_a = torch.where(used_first, grad_first * first_slope, 0.0).sum(-2)
        grad_b = torch.where(used_second, grad_second * second_slope, 0.0).sum(-2)
        return grad_a.to(a.dtype), grad_b.to(b.dtype), _sum_to(grad_c, c.shape), None


def _activated(u: Tensor, c: Tensor, names: tuple[str, ...], slopes: bool = False) -> tuple[Tensor, Tensor]:
    """sigma_k(u), and its slope where asked, stacked to (..., K, h)."""
    v = u.to(c.dtype)
    if not slopes:
        values = torch.stack([pointwise(name).function(v) for name in names], -2)
        return values, values
    both = [pointwise(name).value_and_derivative(v) for name in names]
    return torch.stack([value for value, _ in both], -2), torch.stack([slope for _, slope in both], -2)


def _used(values: Tensor, c: Tensor, over: int) -> Tensor:
    """Zero the rows whose coefficients are all 0, so that an overflow there does not become 0 · inf."""
    return torch.where((c != 0).any(over)[..., None], values, 0.0)


def _pair_sum(first: Tensor, second: Tensor, c: Tensor) -> Tensor:
    inner = torch.matmul(c, _used(second, c, -2))  # (..., K, h): sum_l c_kl sigma_l(b)
    return (_used(first, c, -1) * inner).sum(-2)


def mix(u: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    """sum_k c_k sigma_k(u): u (..., h), c (..., K) or (K,) -> (..., h) in u's dtype."""
    return _Mix.apply(u, c.to(compute_dtype(u, c)), names)


def mix_pairs(a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    """sum_kl c_kl sigma_k(a) sigma_l(b): a, b (..., h), c (..., K, K) or (K, K) -> (..., h) in a's dtype."""
    return _MixPairs.apply(a, b, c.to(compute_dtype(a, b, c)), names)
