"""The mix as torch.compile makes it of the operations in kernels.recompute: fused code for any activation.

Inside somebody's torch.compile the operations are traced into that graph; called eagerly, the two passes are compiled
on their own, once a dictionary and form. Either way only a, b and the coefficients are kept for the backward pass.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import recompute
from .common import Form, Gradients

log = logging.getLogger(__name__)


@functools.cache
def compiler_works() -> bool:
    """Whether torch.compile works here. A missing C++ compiler or Triton shows only at the first compiled call, so make
    one; the reason why not is logged once."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:
        log.warning("torch.compile does not work here (%s); running without it", str(error).strip().splitlines()[0])
        return False
    return True


def forward(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form) -> Tensor:
    """See kernels.common."""
    return _passes(names, form)[0](a, c, b, e, names, form)


def backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    """See kernels.common."""
    return _passes(names, form)[1](g, a, c, b, e, names, form)


@functools.cache
def _passes(names: tuple[str, ...], form: Form) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled passes of one dictionary and form; each has a recompilation limit of its own."""
    return torch.compile(_own(recompute.forward)), torch.compile(_own(recompute.backward))


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo counts recompilations by code object."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__code__ = call.__code__.replace()
    return call


class Traced(torch.autograd.Function):
    """The two passes for a graph that is being traced."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
    ) -> Tensor:
        ctx.save_for_backward(a, c, b, e)
        ctx.names, ctx.form = names, form
        return recompute.forward(a, c, b, e, names, form)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, c, b, e = ctx.saved_tensors
        da, dc, db, de = recompute.backward(g, a, c, b, e, ctx.names, ctx.form)
        return da, sum_to(dc, c), db, None if de is None else sum_to(de, e), None, None


def sum_to(dc: Tensor, c: Tensor) -> Tensor:
    """The gradient of c from its rows, one a token: their sum where all tokens share c."""
    return dc if dc.shape == c.shape else dc.flatten(0, dc.dim() - c.dim() - 1).sum(0)
