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

from moa_lightning.kernels import compiled, compiler_works, cpp, formula
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
