"""The mix on a GPU by the kernels of triton_kernels.py; with TRITON_INTERPRET=1 they run on the CPU, to test them.

float32 and bfloat16, computed in float32; the package's own activations.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import BUILT_IN, Form, Gradients, like, rows, table

DTYPES = (torch.float32, torch.bfloat16)


class Launch(NamedTuple):
    """How a kernel runs."""

    block: int
    """hidden units at a time, at most: as many as fit the registers of its warps"""
    warps: int
    """1 needs no barriers for sums"""


FORWARD = {"plain": Launch(512, 1), "one": Launch(512, 1), "both": Launch(512, 1), "pairs": Launch(512, 4)}
BACKWARD = {"plain": Launch(256, 1), "one": Launch(256, 1), "both": Launch(128, 1), "pairs": Launch(512, 4)}
PROGRAMS = 4096  # of the backward pass, at least: 32 on each of 128 multiprocessors; then rows are not divided


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
        block, blocks = _blocks(a, FORWARD[form])
        options = _options(names, form, block, FORWARD[form])
        with torch.cuda.device_of(a):  # not the current device, where that is another one
            _kernels().forward_kernel[(len(inputs[0]), blocks)](*inputs, y, a.shape[-1], *strides, **options)
    return y


def backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    """See kernels.common."""
    entries = (len(names),) * (2 if form == "pairs" else 1)
    da, db = like(a), None if b is None else like(b)
    block, blocks = _blocks(a, BACKWARD[form])
    count = a.shape[:-1].numel()
    programs = min(blocks, -(-PROGRAMS // max(count, 1)))
    dc = c.new_zeros(*a.shape[:-1], programs, *entries)
    de = None if e is None else torch.zeros_like(dc)
    if da.numel():
        g = rows(g)
        inputs, strides = _inputs(a, c, b, e, form)
        unused = inputs[0]  # an address for a gradient that the form does not have
        outputs = (da, unused if db is None else db, dc, dc if de is None else de)
        options = {"TIMES": -(-blocks // programs), **_options(names, form, block, BACKWARD[form])}
        with torch.cuda.device_of(a):
            _kernels().backward_kernel[(count, programs)](
                g, *inputs, *outputs, a.shape[-1], g.stride(0), *strides, **options
            )
    axis = -1 - len(entries)
    return da, dc.sum(axis), db, None if de is None else de.sum(axis)


def _blocks(a: Tensor, launch: Launch) -> tuple[int, int]:
    """Hidden units at a time, a power of two, and how often."""
    h = a.shape[-1]
    block = min(launch.block, 1 << max(h - 1, 0).bit_length())
    return block, -(-h // block)


def _options(names: tuple[str, ...], form: Form, block: int, launch: Launch) -> dict[str, Any]:
    """Constants of a kernel. Products and sums are fused, as everywhere in torch."""
    constants = {"NAMES": names, "FORM": form, "BLOCK": block}
    return {**constants, "num_warps": launch.warps, "enable_fp_fusion": True}


def _inputs(
    a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, form: Form
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """a, b, c, e as the kernels read them and their strides; a and c stand in for what the form does not have."""
    a, (c, c_stride) = rows(a), table(c, form)
    b = a if b is None else rows(b)
    e, e_stride = (c, 0) if e is None else table(e, form)
    return (a, b, c, e), (a.stride(0), b.stride(0), c_stride, e_stride)
