"""Every implementation of the mix against NumPy in float64: what test_parity.py asserts and docs/kernels.md shows.

    python -m tests.kernels.parity cpp recompute                  a table in Markdown
    TRITON_INTERPRET=1 python -m tests.kernels.parity triton      Triton's interpreter, without a GPU
    python -m tests.kernels.parity --json cpp                     what the tests read

Errors are norm of the difference over norm, the largest over the shapes, and over the gradients for a backward pass.
The numbers that a kernel sees are the ones that NumPy sees: bfloat16 inputs are rounded first.
"""

import json
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from moa_lightning.kernels import Kernel, mix, mix_pairs, triton_mix
from tests import reference
from tests.reference import SEVEN

TEN = (*SEVEN, "gelu_tanh", "quick_gelu", "sigmoid")
PAIRS = ("identity", "gelu", "relu2", "tanh")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ((1, 1), (3, 17), (2, 5, 33), (2, 1100))
MIXES = {
    "plain": ("plain", TEN, False),
    "plain, shared": ("plain", SEVEN, True),
    "one": ("one", TEN, False),
    "both": ("both", TEN, False),
    "both, shared": ("both", SEVEN, True),
    "pairs": ("pairs", PAIRS, False),
    "pairs, shared": ("pairs", PAIRS, True),
}
EDGES = (
    0.0,
    1e-45,
    1e-40,
    1e-30,
    1e-20,
    1e-5,
    0.03,
    0.05,
    5.0,
    12.9,
    13.1,
    20.0,
    49.0,
    60.0,
    86.0,
    88.0,
    1e4,
    9e11,
    1e12,
    2e13,
    1e15,
    1e18,
    1e30,
    3e38,
)
FAR = 1e50  # stands for infinity in NumPy: the limits, where the formula itself would say inf · 0

Result = dict[str, Any]


def apply(form: str, a: Tensor, b: Tensor, c: Tensor, e: Tensor, names: tuple[str, ...], kernel: Kernel) -> Tensor:
    if form == "pairs":
        return mix_pairs(a, b, c, names, kernel)
    return mix(a, c, names, None if form == "plain" else b, e if form == "both" else None, kernel)


def expected(form: str, a: Any, b: Any, c: Any, e: Any, names: tuple[str, ...], g: Any) -> tuple[Any, list[Any]]:
    """y and the gradients of a, c, b, e as far as the form has them, in float64."""
    if form == "pairs":
        da, db, dc = reference.mix_pairs_gradient(a, b, c, names, g)
        return reference.mix_pairs(a, b, c, names), [da, dc, db]
    first = reference.mix(a, c, names)
    if form == "plain":
        return first, list(reference.mix_gradient(a, c, names, g))
    second = b if form == "one" else reference.mix(b, e, names)
    da, dc = reference.mix_gradient(a, c, names, g * second)
    if form == "one":
        return first * second, [da, dc, g * first]
    return first * second, [da, dc, *reference.mix_gradient(b, e, names, g * first)]


def _relative(ours: Tensor, theirs: Any) -> float:
    return float(np.linalg.norm(ours.detach().double().numpy().reshape(theirs.shape) - theirs) / np.linalg.norm(theirs))


def errors(
    form: str, names: tuple[str, ...], shared: bool, dtype: torch.dtype, kernel: Kernel, shape: tuple[int, ...]
) -> tuple[float, float]:
    """Relative error of the values and, the largest, of the gradients."""
    draw = torch.Generator().manual_seed(len(shape) + shape[-1])
    tokens, entries = shape[:-1], (len(names),) * (2 if form == "pairs" else 1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    a, b = ((2 * randn(*shape)).to(dtype).requires_grad_() for _ in range(2))
    c, e = (randn(*(() if shared else tokens), *entries).requires_grad_() for _ in range(2))
    g = randn(*shape).to(dtype)
    y = apply(form, a, b, c, e, names, kernel)
    y.backward(g)
    count = int(np.prod(tokens))
    flat = [t.detach().double().numpy().reshape(count, -1) for t in (a, b, g)]
    full = [np.broadcast_to(t.detach().double().numpy(), (*tokens, *entries)).reshape(count, *entries) for t in (c, e)]
    value, gradients = expected(form, flat[0], flat[1], *full, names, flat[2])
    ours = [t.grad for t in (a, c, b, e) if t.grad is not None]
    per_token = (False, True, False, True)  # a, c, b, e
    theirs = [d.sum(0) if shared and sums else d for d, sums in zip(gradients, per_token, strict=False)]
    return _relative(y, value), max(_relative(*pair) for pair in zip(ours, theirs, strict=True))


def edge_faults(name: str, dtype: torch.dtype, kernel: Kernel) -> list[str]:
    """Where σ or its slope is wrong at zeros, denormals, large numbers, infinities and NaN, each in a row of its own,
    as a kernel may treat rows with such numbers apart; empty when nowhere."""
    magnitudes = torch.tensor([*EDGES, torch.inf]).to(dtype)
    u = torch.cat([magnitudes, -magnitudes])[:, None].requires_grad_()
    y = mix(u, torch.ones(1), (name,), kernel=kernel)
    y.backward(torch.ones_like(y))
    point = u.detach().double().clamp(-FAR, FAR).numpy()
    with np.errstate(all="ignore"):
        wanted = [torch.from_numpy(f[name](point)).to(dtype).double() for f in (reference.FUNCTION, reference.SLOPE)]
    # an error of a factor like Φ(u), 1e-7, is one of 1e-7 · u in the value; bfloat16 rounds to 8 bits, denormals may go
    slack = (1e-6, 1e-44) if dtype == torch.float32 else (8e-3, 1e-38)
    scale = torch.from_numpy(np.abs(point))
    flushed = (scale > 0) & (scale < 1.2e-38) & (dtype == torch.bfloat16)
    faults = []
    for what, ours, theirs, size in zip(("value", "slope"), (y, u.grad), wanted, (scale, 1 + 0 * scale), strict=True):
        ours = ours.detach().double()
        near = (ours - theirs).abs() <= slack[0] * theirs.abs() + 3e-7 * size + slack[1]
        for i in torch.nonzero(~(near | flushed | (ours == theirs)))[:, 0].tolist():
            faults.append(f"{what} of {name} at {u[i].item()}: {ours[i].item()} instead of {theirs[i].item()}")
    nan = torch.full((2, 3), torch.nan, dtype=dtype)
    nan[0] = 1.0
    spoilt = mix(nan, torch.ones(1), (name,), kernel=kernel).isnan()
    return faults if spoilt.tolist() == [[False] * 3, [True] * 3] else [*faults, f"{name} of NaN"]


def property_faults(kernel: Kernel, dtype: torch.dtype) -> list[str]:
    """What else must hold: layouts, empty batches, zero coefficients that hide overflows."""
    faults = []
    for form, names in (("plain", TEN), ("one", SEVEN), ("both", SEVEN), ("pairs", PAIRS)):
        entries = (len(names),) * (2 if form == "pairs" else 1)
        draw = torch.Generator().manual_seed(1)
        a, b, g = (torch.randn(4, 6, generator=draw).to(dtype) for _ in range(3))
        c, e = (torch.randn(4, *entries, generator=draw) for _ in range(2))
        plain = _all(form, names, kernel, a, b, c, e, g)
        for layout in (_strided, _transposed, _wide):
            other = _all(form, names, kernel, *(layout(t) for t in (a, b, c, e, g)))
            if not all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(plain, other, strict=True)):
                faults.append(f"{form}, {layout.__name__}")
        empty = _all(form, names, kernel, a[:0], b[:0], c[:0], e[:0], g[:0])
        if any(x.numel() for x in empty):
            faults.append(f"{form}, empty")
        shared = _all(form, names, kernel, a[:0], b[:0], c[0], e[0], g[:0])
        if any(x.any() for x in shared):
            faults.append(f"{form}, empty with shared coefficients")
        a, b, g = (torch.randn(3, 1100, generator=draw).to(dtype) for _ in range(3))
        g[1, 700] = 0  # what is large there has no share in the gradients of coefficients
        ordinary = _all(form, names, kernel, a, b, c[:3], e[:3], g)
        a[1, 700] = b[1, 700] = 1e15
        beside = _all(form, names, kernel, a, b, c[:3], e[:3], g)
        for x, y in zip(ordinary, beside, strict=True):
            if x.shape == a.shape:
                x[1, 700] = y[1, 700] = 0
            if not torch.allclose(x, y, rtol=1e-5 if x.dtype == torch.float32 else 8e-3, atol=1e-4):
                faults.append(f"{form}, a large number in the row")
    u = torch.tensor([[torch.inf, 1e30, -torch.inf, 2.0]], dtype=dtype)
    for form, c in (
        ("plain", torch.tensor([[0.0, 0.5, 0.0]])),
        ("pairs", torch.tensor([[[0.0] * 3, [0, 0, 0.5], [0.0] * 3]])),
    ):
        y, da, *_ = _all(form, ("relu2", "tanh", "identity"), kernel, u, torch.ones_like(u), c, c, torch.ones_like(u))
        curve = 0.5 * torch.tanh(u.double())
        slope = 0.5 * (1 - torch.tanh(u.double()).square())
        if not (torch.allclose(y.double(), curve, rtol=8e-3) and torch.allclose(da.double(), slope, rtol=1e-2)):
            faults.append(f"{form}, a coefficient of 0 does not hide an overflow")
    return faults


def _all(form: str, names: tuple[str, ...], kernel: Kernel, *tensors: Tensor) -> list[Tensor]:
    """y and all gradients that there are."""
    a, b, c, e = (t.detach().requires_grad_() for t in tensors[:4])
    y = apply(form, a, b, c, e, names, kernel)
    y.backward(tensors[4])
    return [y.detach(), *(t.grad for t in (a, b, c, e) if t.grad is not None)]


def _strided(t: Tensor) -> Tensor:
    """Every second number of a wider row."""
    return torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _wide(t: Tensor) -> Tensor:
    """Rows that lie apart, as slices of a wider projection do."""
    return torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)[..., 1:-2].copy_(t)


def cases(kernel: Kernel) -> dict[str, tuple[str, tuple[str, ...], bool]]:
    """Form, names and sharing by label: each activation alone, then the mixes. Compiling takes seconds for each, so
    for `compiled` the mixes must do."""
    alone = {name: ("plain", (name,), False) for name in TEN}
    return MIXES if kernel == "compiled" else {**alone, **MIXES}


def measure(kernel: Kernel) -> Result:
    """All that this file can say about an implementation."""
    result: Result = {"errors": {}, "faults": []}
    shapes = {"compiled": SHAPES[2:3], "triton": SHAPES[3:]}.get(kernel, SHAPES)
    for dtype_name, dtype in DTYPES.items():
        for label, case in cases(kernel).items():
            found = [errors(*case, dtype, kernel, shape) for shape in shapes]
            result["errors"][f"{label} | {dtype_name}"] = [max(column) for column in zip(*found, strict=True)]
        faults = [] if kernel in ("reference", "compiled") else property_faults(kernel, dtype)
        if kernel == "triton":  # which divides rows among programs where there are few
            with mock.patch.object(triton_mix, "PROGRAMS", 1):
                for label, case in cases(kernel).items():
                    pair = result["errors"][f"{label} | {dtype_name}"]
                    pair[:] = map(max, pair, errors(*case, dtype, kernel, shapes[-1]))
                faults += [f"{fault}, rows not divided" for fault in property_faults(kernel, dtype)]
        if kernel in ("cpp", "triton"):  # the others are torch's own functions there
            faults += [fault for name in TEN for fault in edge_faults(name, dtype, kernel)]
        result["faults"] += [f"{dtype_name}: {fault}" for fault in faults]
    return result


def markdown(results: dict[str, Result]) -> str:
    """One row a mix and dtype, one column an implementation: error forward / backward."""
    rows = list(dict.fromkeys(row for result in results.values() for row in result["errors"]))
    lines = [f"| mix | dtype | {' | '.join(results)} |", "| --- " * (2 + len(results)) + "|"]
    for row in rows:
        cells = []
        for result in results.values():
            pair = result["errors"].get(row)
            cells.append("" if pair is None else f"{pair[0]:.0e} / {pair[1]:.0e}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    results = {kernel: measure(kernel) for kernel in arguments if not kernel.startswith("-")}
    print(json.dumps(results) if "--json" in arguments else markdown(results))
    for kernel, result in results.items():
        for fault in result["faults"]:
            print(f"{kernel}: {fault}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
