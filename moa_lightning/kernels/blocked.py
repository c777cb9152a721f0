"""The mix on the CPU without a compiler: the same sums, taken a few rows at a time.

Run over whole tensors, each of the K activations writes and reads memory several times, and that traffic costs more
than the arithmetic. In blocks whose temporaries stay in a core's cache the mix is about seven times faster. The quick
formulas used here (one fused multiply-add an entry, torch's own derivative kernels) give NaN for 0 · inf, so a result
that is not finite is refused, and the caller takes the careful path.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..activations import pointwise

BLOCK_ELEMENTS = 1 << 16  # 256 KiB in float32


def applies(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors outside of autograd, tracing and compilation."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)


def mix_forward(u: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor | None:
    """sum_k c_k sigma_k(u) in the dtype of c; None where it is not finite."""
    out = torch.empty(u.shape, dtype=c.dtype)
    finite = True
    for rows, coefficients, total in _blocks(c, u, out):
        total.zero_()
        for k, name in enumerate(names):
            total.addcmul_(pointwise(name).function(rows), coefficients[:, k : k + 1])
        finite = finite and bool(total.sum().isfinite())
    return out if finite else None


def mix_backward(grad: Tensor, u: Tensor, c: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
    """Gradients for u and for c, one row of c a token even where tokens share it: (..., h), (..., K); None where they
    are not finite."""
    grad_u = torch.empty(u.shape, dtype=c.dtype)
    grad_c = torch.empty(*u.shape[:-1], len(names), dtype=c.dtype)
    for rows, coefficients, g, slope, sums in _blocks(c, u, grad, grad_u, grad_c):
        slope.zero_()
        for k, name in enumerate(names):
            value, derivative = pointwise(name).quick(rows)
            slope.addcmul_(derivative, coefficients[:, k : k + 1])
            sums[:, k] = (g * value).sum(-1)
        slope.mul_(g)
        if not (slope.sum() + sums.sum()).isfinite():
            return None
    return grad_u, grad_c


def _blocks(c: Tensor, u: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows: u in c's dtype, c (rows or 1, K), then the others; outputs among these are written in place."""
    flat = [t.reshape(-1, t.shape[-1]) for t in (u, *others)]
    shared = c.dim() == 1
    table = c[None] if shared else c.reshape(-1, c.shape[-1])
    size = max(1, BLOCK_ELEMENTS // max(1, u.shape[-1]))
    for start in range(0, len(flat[0]), size):
        rows, *rest = (t[start : start + size] for t in flat)
        rest = [t.to(c.dtype) for t in rest]
        yield (rows.to(c.dtype), table if shared else table[start : start + size], *rest)
