"""Every implementation of the mix agrees with NumPy in float64 (parity.py); Triton runs in its interpreter.

Compiling takes seconds a case, so `compiled` is compared on one mix here and on all of them in docs/kernels.md; what it
traces is compared in the other forms and dtypes, and its formulas one by one.
"""

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_lightning.kernels import compiled, compiler_works, cpp, formula, mix
from tests import reference
from tests.kernels import parity

ROOT = Path(__file__).parents[2]
ROUNDING = {"float32": 2e-6, "bfloat16": 4e-3}  # bfloat16 rounds to nearest: 2^-8 at most
TRUNCATION = 8e-3  # Triton's interpreter cuts bfloat16 off instead


def assert_parity(result: parity.Result, kernel: str) -> None:
    assert {label.partition(" | ")[0] for label in result["errors"]} == set(parity.cases(kernel))
    for label, pair in result["errors"].items():
        dtype = label.partition(" | ")[2]
        limit = TRUNCATION if (kernel, dtype) == ("triton", "bfloat16") else ROUNDING[dtype]
        assert max(pair) < limit, (kernel, label, pair)
    assert result["faults"] == []


@pytest.mark.parametrize("kernel", ["cpp", "recompute", "reference"])
def test_agrees_with_numpy(kernel: str) -> None:
    if kernel == "cpp" and not cpp.available():
        pytest.skip("no C++ compiler")
    assert_parity(parity.measure(kernel), kernel)


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Rows of 16 numbers of float32, a lattice and what lies far out, or all of bfloat16 below 1e18."""
    if dtype == torch.float32:
        far = torch.logspace(-30, 18, 4_800)
        return torch.cat([torch.linspace(-30, 30, 120_000), far, -far]).view(-1, 16)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.float().abs() < 1e18]
    return numbers[: len(numbers) // 16 * 16].view(-1, 16)


@pytest.mark.parametrize(
    ("dtype", "bits", "off", "slope_off"), [("float32", 22, 8e-8, 4e-7), ("bfloat16", 8, 7e-7, 9e-6)]
)
@pytest.mark.parametrize("name", parity.TEN)
def test_cpp_is_this_near_everywhere(name: str, dtype: str, bits: int, off: float, slope_off: float) -> None:
    """What docs/kernels.md and mix.cpp say of the polynomials. Half the activation: with a coefficient of 1 the forward
    pass would be torch's."""
    if not cpp.available():
        pytest.skip("no C++ compiler")
    u = all_numbers(parity.DTYPES[dtype]).requires_grad_()
    y = mix(u, torch.tensor([0.5]), (name,), kernel="cpp")
    y.backward(torch.full_like(y, 2.0))
    point = u.detach().double().numpy()
    with np.errstate(all="ignore"):
        value, slope = reference.FUNCTION[name](point) / 2, reference.SLOPE[name](point)
    denormal = 1e-44 if dtype == "float32" else 1.2e-38  # may become zero
    size = np.where(abs(point) < 15, np.minimum(abs(point), 1), 5)  # the tail bends to its limit there
    allowed = 2.0**-bits * abs(value) + off / 2 * size + denormal
    np.testing.assert_array_less(abs(y.detach().double().numpy() - value), allowed)
    assert u.grad is not None
    np.testing.assert_array_less(abs(u.grad.double().numpy() - slope), 2.0**-bits * abs(slope) + slope_off + denormal)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the option is one of x86 compilers")
def test_cpp_of_processors_without_avx512_agrees_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpp.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-mno-avx512f"))
    cpp._library.cache_clear()
    try:
        assert_parity(parity.measure("cpp"), "cpp")
    finally:
        cpp._library.cache_clear()


@pytest.mark.timeout(600)
def test_triton_agrees_with_numpy() -> None:
    pytest.importorskip("triton")
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.kernels.parity", "--json", "triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert_parity(json.loads(outcome.stdout)["triton"], "triton")


def test_compiled_agrees_with_numpy() -> None:
    if not compiler_works():
        pytest.skip("no compiler for torch.compile")
    found = parity.errors(*parity.MIXES["both"], torch.float32, "compiled", (2, 5, 33))
    assert max(found) < ROUNDING["float32"]


@pytest.mark.parametrize(
    ("label", "shape", "dtype"),
    [("plain", (3, 17), "bfloat16"), ("one", (1, 1), "bfloat16"), ("pairs", (2, 5, 33), "float32")],
)
def test_what_is_compiled_agrees_with_numpy_in_other_forms(
    monkeypatch: pytest.MonkeyPatch, label: str, shape: tuple[int, ...], dtype: str
) -> None:
    """Traced and taken apart as for the compiler, then run by PyTorch, which takes no time to compile."""
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled._passes.cache_clear()
    try:
        found = parity.errors(*parity.MIXES[label], parity.DTYPES[dtype], "compiled", shape)
    finally:
        compiled._passes.cache_clear()
    assert max(found) < ROUNDING[dtype]


@pytest.mark.parametrize("name", parity.TEN)
def test_traced_formulas_agree_with_numpy(name: str) -> None:
    u = torch.cat([torch.linspace(-12, 12, 500), torch.tensor([1e-40, -1e-20, 1e-4, 50.0, -90.0, 1e18, -1e18])])
    value, slope = formula.traced(name, u)
    point = u.double().numpy()
    with np.errstate(all="ignore"):
        wanted, wanted_slope = reference.FUNCTION[name](point), reference.SLOPE[name](point)
    np.testing.assert_array_less(abs(value.double().numpy() - wanted), 1e-6 * (abs(point) + abs(wanted)) + 1e-44)
    np.testing.assert_array_less(abs(slope.double().numpy() - wanted_slope), 1e-6 * (1 + abs(wanted_slope)))


@pytest.mark.parametrize("name", parity.TEN)
def test_traced_formulas_at_infinity_are_the_limits(name: str) -> None:
    ends, far = torch.tensor([torch.inf, -torch.inf]), np.array([parity.FAR, -parity.FAR])
    with np.errstate(all="ignore"):
        wanted = [torch.from_numpy(table[name](far)).float() for table in (reference.FUNCTION, reference.SLOPE)]
    for ours, theirs in zip(formula.traced(name, ends), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
