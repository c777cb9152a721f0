"""What the mix asks of a GPU, counted in the machine code that Triton makes of its kernels for an H100 (sm_90).

    python benchmarks/gpu_instructions.py [--width 1536] [--out FILE]

No GPU is needed and none is timed. Counted is what a thread executes for one hidden unit, in rows of --width units of
ordinary size: the far path, for infinite and very large numbers, is left out, the test for them is not. By NVIDIA's
data sheet an H100 (SXM) executes 33.5e12 float32 instructions a second (66.9 TFLOP/s, a multiply-add being two) and
moves 3.35e12 bytes; of special functions (exponentials, roots) a multiprocessor executes 16 a cycle instead of 128.
"Bound" is what these rates leave of the speed of a mere copy of the same bytes: no more than that can be reached, a
measurement it is not.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from moa_lightning.activations import DICTIONARY
from moa_lightning.kernels import triton_kernels, triton_mix

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CASES = {
    "gelu alone": ("plain", ("gelu",)),
    "plain": ("plain", DICTIONARY),
    "one": ("one", DICTIONARY),
    "both": ("both", DICTIONARY),
    "pairs": ("pairs", DICTIONARY),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TENSORS = {"plain": (2, 3), "one": (3, 5), "both": (3, 5), "pairs": (3, 5)}  # that forward and backward read and write
INSTRUCTIONS_A_BYTE = 33.5 / 3.35
SPECIAL = 128 / 16  # instructions in whose time a special function is executed


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # no GPU's, under which Triton would keep what is compiled here

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles what would be launched, and keeps it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.options: dict[str, Any] = {}
        self.binary = b""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return self._compile

    def _compile(self, *arguments: Any, **options: Any) -> None:
        stand_ins = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, torch.Tensor) else a for a in arguments]
        previous, self.options = driver._active, options
        driver.set_active(AbsentGPU())
        try:
            self.binary = self.kernel.warmup(*stand_ins, grid=self.grid, **options).asm["cubin"]
        finally:
            driver._active = previous


def compiled(module: Any, direction: str, names: tuple[str, ...], form: str, dtype: str, width: int) -> Compiled:
    """The kernel of a module as it would be launched for enough rows of `width` hidden units."""
    stand_in = Compiled(getattr(module, f"{direction}_kernel"))
    a = torch.empty(triton_mix.PROGRAMS, width, dtype=DTYPES[dtype])
    c = torch.empty(len(a), *(len(names),) * (2 if form == "pairs" else 1))
    inputs = (a, c, None if form == "plain" else a, c if form == "both" else None, names, form)
    module = mock.Mock(**{f"{direction}_kernel": stand_in})
    with mock.patch.object(triton_mix, "_kernels", return_value=module):
        if direction == "forward":
            triton_mix.forward(*inputs)
        else:
            triton_mix.backward(a, *inputs)
    return stand_in


class Code(NamedTuple):
    """What the disassembler says of a kernel."""

    once: int
    """instructions outside its loop"""
    repeated: int
    """those of the loop"""
    special: tuple[int, int]
    """special functions among the ones and the others"""
    registers: int
    spills: int


@triton.jit
def _no_mix(u, c_ptr, NAMES):  # type: ignore[no-untyped-def]
    return u, u


@triton.jit
def _no_backward(
    g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr, h, NAMES, FORM, BLOCK, TIMES
):  # type: ignore[no-untyped-def] # fmt: skip
    return


def near_only() -> Any:
    """The kernels, without a far path."""
    spec = importlib.util.spec_from_file_location("near_kernels", triton_kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._far_mix, module._far_backward = _no_mix, _no_backward  # type: ignore[attr-defined]
    return module


def read(binary: bytes) -> Code:
    """What NVIDIA's disassembler, which comes with Triton, says of a kernel with at most one loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = _said("nvdisasm", file.name)
        usage = _said("cuobjdump", "-res-usage", file.name)
    names: list[str] = []
    labels: dict[str, int] = {}
    loop = slice(0, 0)
    for line in text.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        code = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w*)(.*)", line)
        if label:
            labels[label[1]] = len(names)
        elif code and code[1] != "NOP":
            target = re.search(r"`\((\.L_x_\d+)\)", code[2]) if code[1] == "BRA" else None
            names.append(code[1])
            if target and labels.get(target[1], len(names)) < len(names) - 1:  # backwards
                loop = slice(labels[target[1]], len(names))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    inside, special = names[loop], names.count("MUFU")
    return Code(
        len(names) - len(inside),
        len(inside),
        (special - inside.count("MUFU"), inside.count("MUFU")),
        int(registers[1]),
        names.count("LDL") + names.count("STL"),
    )


def _said(*command: str) -> str:
    done = subprocess.run([TOOLS / command[0], *command[1:]], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def count(near: Any, case: str, direction: str, dtype: str, width: int) -> dict[str, Any]:
    """One row of the table."""
    form, names = CASES[case]
    launched = compiled(triton_kernels, direction, names, form, dtype, width)
    whole = read(launched.binary)
    code = whole if form == "pairs" else read(compiled(near, direction, names, form, dtype, width).binary)
    programs, times = launched.grid[1], launched.options.get("TIMES", 0)
    units = width / (32 * launched.options["num_warps"])  # a thread's share of a row
    instructions = programs * (code.once + times * code.repeated) / units
    special = programs * (code.special[0] + times * code.special[1]) / units
    memory = DTYPES[dtype].itemsize * TENSORS[form][direction == "backward"] * INSTRUCTIONS_A_BYTE
    return {
        "mix": case,
        "dtype": dtype,
        "direction": direction,
        "instructions": instructions,
        "special": special,
        "registers": whole.registers,
        "spills": whole.spills,
        "bound": min(1.0, memory / max(instructions, SPECIAL * special)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1536, help="hidden units of a row")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    near = near_only()
    found = [
        count(near, case, direction, dtype, options.width)
        for case in CASES
        for dtype in DTYPES
        for direction in ("forward", "backward")
    ]
    print("| mix | dtype | pass | instructions | special functions | registers | spills | bound |")
    print("| --- " * 8 + "|")
    for row in found:
        figures = f"{row['instructions']:.0f} | {row['special']:.1f} | {row['registers']} | {row['spills']}"
        print(f"| {row['mix']} | {row['dtype']} | {row['direction']} | {figures} | {row['bound']:.2f} |")
    if options.out is not None:
        settings = {"target": "sm_90, compiled and not run", "width": options.width, "triton": triton.__version__}
        options.out.write_text(json.dumps({"settings": settings, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
