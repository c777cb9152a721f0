"""The Triton kernels as a GPU would run them: compiled for an H100, which needs none. The interpreter, where
test_parity.py runs them, takes things that the compiler refuses."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_instructions import CASES, TOOLS, compiled, read
from moa_lightning.kernels import triton_kernels, triton_mix
from tests.kernels.parity import TEN

pytestmark = pytest.mark.skipif(
    not (TOOLS / "ptxas").exists() or triton_mix.interpreted(), reason="no NVIDIA tools in Triton, or its interpreter"
)


@pytest.mark.parametrize("form", triton_mix.FORWARD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_and_its_numbers_fit_the_registers(form: str, dtype: str) -> None:
    names = TEN if form == "plain" else CASES[form][1]
    for direction in ("forward", "backward"):
        code = read(compiled(triton_kernels, direction, names, form, dtype, 1536).binary)
        assert code.spills <= 0.05 * (code.once + code.repeated)
