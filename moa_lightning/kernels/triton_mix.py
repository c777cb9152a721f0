"""The mix on a GPU by the kernels of triton_kernels.py; with TRITON_INTERPRET=1 they run on the CPU, to test them.

float32 and bfloat16, computed in float32; the package's own activations.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from .common import BUILT_IN, Form, Gradients, like, rows, table

DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 1024  # hidden units a program; 8 a thread


def supports(names: tuple[str, ...], dtype: torch.dtype, compute: torch.dtype, device: str) -> bool:
    """Whether the kernels know these activations, dtypes and device, and Triton is installed."""
    known = dtype in DTYPES and compute == torch.float32 and BUILT_IN.issuperset(names)
    return known and _installed() and (device == "cuda" or (device == "cpu" and interpreted()))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter on the CPU (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_kernels  # Triton takes a quarter of a second to import

    return triton_kernels


def forward(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form) -> Tensor:
    """See kernels.common."""
    y = like(a)
    if y.numel():
        inputs, strides = _inputs(a, c, b, e, form)
        h, block, blocks = _blocks(a)
        grid = (len(inputs[0]), blocks)
        with torch.cuda.device_of(a):  # not the current device, where that is another one
            _kernels().forward_kernel[grid](*inputs, y, h, *strides, NAMES=names, FORM=form, BLOCK=block, num_warps=4)
    return y


def backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    """See kernels.common."""
    entries = (len(names),) * (2 if form == "pairs" else 1)
    h, block, blocks = _blocks(a)
    da, db = like(a), None if b is None else like(b)
    dc = c.new_zeros(*a.shape[:-1], blocks, *entries)
    de = None if e is None else torch.zeros_like(dc)
    if da.numel():
        g = rows(g)
        inputs, strides = _inputs(a, c, b, e, form)
        unused = inputs[0]  # an address for a gradient that the form does not have
        outputs = (da, unused if db is None else db, dc, dc if de is None else de)
        with torch.cuda.device_of(a):
            _kernels().backward_kernel[(len(g), blocks)](
                g, *inputs, *outputs, h, g.stride(0), *strides, NAMES=names, FORM=form, BLOCK=block, num_warps=4
            )
    axis = -1 - len(entries)
    return da, dc.sum(axis), db, None if de is None else de.sum(axis)


def _blocks(a: Tensor) -> tuple[int, int, int]:
    """Hidden width, hidden units a program, programs a row."""
    h = a.shape[-1]
    block = min(BLOCK, 1 << max(h - 1, 0).bit_length())
    return h, block, -(-h // block)


def _inputs(
    a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, form: Form
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """a, b, c, e as the kernels read them and their strides; a and c stand in for what the form does not have."""
    a, (c, c_stride) = rows(a), table(c, form)
    b = a if b is None else rows(b)
    e, e_stride = (c, 0) if e is None else table(e, form)
    return (a, b, c, e), (a.stride(0), b.stride(0), c_stride, e_stride)
