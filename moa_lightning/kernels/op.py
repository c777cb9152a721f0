"""`moa::mix` and `moa::mix_backward`: the mix as torch sees it, one operation each way, whatever computes it.

Registered with fake kernels and autograd, so that torch.compile, torch.export, autocast, FSDP2 and activation
checkpointing (whose policies may name torch.ops.moa.mix) treat it as they treat a matrix product. It keeps a, b and
the coefficients for the backward pass. A backward pass that is to be differentiated itself runs as torch operations.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet

from . import choice, recompute
from .common import Form, Gradients, like
from .compiled import sum_to

_ARGUMENTS = "Tensor a, Tensor c, Tensor? b, Tensor? e, str[] names, str form, str kernel"
Four = tuple[Tensor, Tensor, Tensor, Tensor]

# not torch.library.custom_op, which looks for aliases among the results of every call
_library = torch.library.Library("moa", "FRAGMENT")
_library.define(f"mix({_ARGUMENTS}) -> Tensor")
_library.define(f"mix_backward(Tensor g, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
mix_op = torch.ops.moa.mix.default


def _mix(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: list[str], form: Form, kernel: str) -> Tensor:
    """kernels.common's forward by the implementation that `kernel` names."""
    entries = tuple(names)
    with torch.no_grad():  # also where no input needs a gradient: the same numbers either way
        return choice.implementation(kernel, entries, a, c).forward(a, c, b, e, entries, form)


def _mix_backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: list[str], form: Form, kernel: str
) -> Four:
    """Gradients of a, c, b, e in their shapes by the implementation that `kernel` names; empty for those not given."""
    entries = tuple(names)
    with torch.no_grad():
        da, dc, db, de = choice.implementation(kernel, entries, a, c).backward(g, a, c, b, e, entries, form)
    de = c.new_empty(0) if e is None or de is None else sum_to(de, e)
    return da, sum_to(dc, c), a.new_empty(0) if db is None else db, de


@torch.library.register_fake("moa::mix", lib=_library)
def _fake(
    a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: list[str], form: Form, kernel: str
) -> Tensor:
    return like(a)


@torch.library.register_fake("moa::mix_backward", lib=_library)
def _fake_backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: list[str], form: Form, kernel: str
) -> Four:
    return like(a), like(c), a.new_empty(0) if b is None else like(b), c.new_empty(0) if e is None else like(e)


class _Mix(torch.autograd.Function):
    """What torch.library.register_autograd makes, 20 us a call quicker."""

    @staticmethod
    def forward(
        ctx: Any, keys: DispatchKeySet, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, *options: Any
    ) -> Tensor:
        ctx.save_for_backward(a, c, b, e)
        ctx.options = options
        return _below_autograd(keys, a, c, b, e, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, c, b, e = ctx.saved_tensors
        names, form, kernel = ctx.options
        if torch.is_grad_enabled():
            da, dc, db, de = _differentiable(g, a, c, b, e, tuple(names), form)
        else:
            da, dc, db, de = torch.ops.moa.mix_backward.default(g, a, c, b, e, names, form, kernel)
        return None, da, dc, None if b is None else db, None if e is None else de, None, None, None


def _with_gradients(keys: DispatchKeySet, *inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _Mix.apply(keys, *inputs)
    return _below_autograd(keys, *inputs)


def _below_autograd(keys: DispatchKeySet, *inputs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return mix_op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def _differentiable(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    da, dc, db, de = recompute.backward(g, a, c, b, e, names, form)
    return da, sum_to(dc, c), db, None if e is None or de is None else sum_to(de, e)


_library.impl("mix", _mix, "CompositeExplicitAutograd")
_library.impl("mix_backward", _mix_backward, "CompositeExplicitAutograd")
_library.impl("mix", _with_gradients, "Autograd", with_keyset=True)
