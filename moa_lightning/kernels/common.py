"""What the implementations of the mix share: the signature, the forms, the dtype of the arithmetic.

Each implementation is a module with

    forward(a, c, b, e, names, form) -> y                       a, b, y (..., h);  c, e (..., K) or (K,)
    backward(g, a, c, b, e, names, form) -> da, dc, db, de      dc, de (..., K): one row a token, also where shared

    plain   y = sum_k c_k sigma_k(a)                                        b, e are None
    one     y = sum_k c_k sigma_k(a) · b                                    e is None
    both    y = sum_k c_k sigma_k(a) · sum_l e_l sigma_l(b)
    pairs   y = sum_kl c_kl sigma_k(a) sigma_l(b)                           e is None; c (..., K, K) or (K, K)

a, b and y have one dtype; c and e come in the dtype of the arithmetic, float32 or wider.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Form = Literal["plain", "one", "both", "pairs"]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

BUILT_IN = frozenset(
    ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh", "gelu_tanh", "quick_gelu", "sigmoid")
)  # what hand-written kernels know; a user's own activation runs as torch operations


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or wider where an input is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def entry_axes(form: Form) -> int:
    """How many axes of a coefficient tensor count entries."""
    return 2 if form == "pairs" else 1


def weighted(values: Tensor, c: Tensor) -> Tensor:
    """c · values, but 0 where c is 0, even if the value has overflowed. Where autograd is to follow, the value itself
    must stay in the product: it is the gradient of the coefficient, of a zero too."""
    if torch.is_grad_enabled():
        return c * torch.where((c == 0) & ~values.isfinite(), 0.0, values)
    return torch.where(c == 0, c, c * values)  # the same number, two comparisons less


def like(t: Tensor) -> Tensor:
    """A new contiguous tensor of that shape, dtype and device."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def rows(t: Tensor) -> Tensor:
    """As (N, h) with the numbers of a row side by side; whole rows may lie apart."""
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def table(c: Tensor, form: Form) -> tuple[Tensor, int]:
    """Coefficients as contiguous (N or 1, entries), and how far apart the rows lie: 0 where all tokens share one."""
    axes = entry_axes(form)
    flat = c.contiguous().reshape(-1, c.shape[-axes:].numel())
    return flat, 0 if c.dim() == axes else flat.shape[1]
