"""The mix as the formula reads, differentiated by autograd: the yardstick of the other implementations.

It stores K activated tensors of u's size for the backward pass, so training does not use it.
"""

import torch
from torch import Tensor

from ..activations import pointwise


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or wider where an input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def mix(u: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    """sum_k c_k sigma_k(u): u (..., h), c (..., K) or (K,) -> (..., h) in u's dtype."""
    dtype = compute_dtype(u, c)
    v, c = u.to(dtype), c.to(dtype)
    total = torch.zeros_like(v)
    for k, name in enumerate(names):
        ck = c[..., k, None]
        total = total + torch.where(ck == 0, ck, ck * pointwise(name).function(v))
    return total.to(u.dtype)


def mix_pairs(a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...]) -> Tensor:
    """sum_kl c_kl sigma_k(a) sigma_l(b): a, b (..., h), c (..., K, K) or (K, K) -> (..., h) in a's dtype."""
    dtype = compute_dtype(a, b, c)
    v, w, c = a.to(dtype), b.to(dtype), c.to(dtype)
    total = torch.zeros_like(v)
    for k, first in enumerate(names):
        for l, second in enumerate(names):  # noqa: E741
            ckl = c[..., k, l, None]
            product = pointwise(first).function(v) * pointwise(second).function(w)
            total = total + torch.where(ckl == 0, ckl, ckl * product)
    return total.to(a.dtype)
