"""The mix of activations as one operation with several implementations behind one signature.

    mix(a, c, names)            sum_k c_k sigma_k(a)                             plain
    mix(a, c, names, b)         sum_k c_k sigma_k(a) · b                         gated, one branch mixed
    mix(a, c, names, b, e)      sum_k c_k sigma_k(a) · sum_l e_l sigma_l(b)      gated, both
    mix_pairs(a, b, c, names)   sum_kl c_kl sigma_k(a) sigma_l(b)                gated, pairs

All compute in float32 at least and return a's dtype. An entry whose coefficient is exactly 0 contributes nothing, even
where its activation overflows. All but `reference` keep a, b and the coefficients for the backward pass, and nothing
else. `kernel` names the implementation (kernels.choice):

    reference   the formula as it reads, differentiated by autograd: keeps K activated tensors
    recompute   torch operations, the backward pass written out
    compiled    the same operations through torch.compile
    cpp         C++ for the CPU, built on first use
    triton      Triton for GPUs
    auto        the fastest that works here
"""

import torch
from torch import Tensor

from ..errors import UserError
from . import reference
from .choice import KERNELS, Kernel, traces
from .common import Form, compute_dtype, entry_axes
from .compiled import Traced, compiler_works
from .op import mix_op

__all__ = ["KERNELS", "Kernel", "compiler_works", "mix", "mix_pairs"]


def mix(
    a: Tensor,
    c: Tensor,
    names: tuple[str, ...],
    b: Tensor | None = None,
    e: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """The mix at the pre-activation a, times the other branch b or times b's mix.

    Args:
        a: (..., h).
        c: coefficients of a's mix, (..., K), or (K,) for all tokens.
        names: the K pointwise activations.
        b: the other branch, of a's shape and dtype; None for the plain form.
        e: coefficients of b's mix, as c; None takes b as it is.
        kernel: which implementation.

    Returns:
        (..., h) in a's dtype.
    """
    return _mix(a, c, b, e, names, "plain" if b is None else "one" if e is None else "both", kernel)


def mix_pairs(a: Tensor, b: Tensor, c: Tensor, names: tuple[str, ...], kernel: Kernel = "auto") -> Tensor:
    """sum_kl c_kl sigma_k(a) sigma_l(b): a, b (..., h), c (..., K, K) or (K, K) -> (..., h) in a's dtype."""
    return _mix(a, c, b, None, names, "pairs", kernel)


def _mix(
    a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form, kernel: Kernel
) -> Tensor:
    if b is not None and (b.dtype != a.dtype or b.shape != a.shape):
        raise UserError(f"the branches of a gated mix are {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    if not torch.compiler.is_compiling():  # a comparison of traced sizes would hold the graph to them
        _check_coefficients(a, c, names, form)
        if e is not None:
            _check_coefficients(a, e, names, form)
    dtype = compute_dtype(a, c, e)
    c, e = c.to(dtype), None if e is None else e.to(dtype)
    if kernel == "reference":
        return reference.forward(a, c, b, e, names, form)
    exporting = torch.compiler.is_exporting()
    if torch.compiler.is_compiling() and not exporting and traces(kernel, names, a.dtype, dtype, a.device.type):
        return Traced.apply(a, c, b, e, names, form)
    return mix_op(a, c, b, e, list(names), form, kernel)


def _check_coefficients(a: Tensor, c: Tensor, names: tuple[str, ...], form: Form) -> None:
    """Hand-written kernels read them without looking at their shape."""
    shared = (len(names),) * entry_axes(form)
    each = (*a.shape[:-1], *shared)
    if c.shape not in (shared, each):
        raise UserError(
            f"coefficients of shape {tuple(c.shape)} do not fit {len(names)} activations of a tensor {tuple(a.shape)}; "
            f"give {shared} or {each}"
        )
