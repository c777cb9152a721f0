"""The mix on the CPU as C++ (mix.cpp), built by the machine's own compiler on first use and called through ctypes.

One library a dictionary and form, compiled in a second or two for the processor at hand and kept in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache) under a name made of the source, the flags, the compiler and the processor.
Inductor's code for the same formula is more than twice as slow here (docs/log.md): it calls a library function for each
exponential and carries a mask for each coefficient. float32 and bfloat16, computed in float32; the package's own
activations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..activations import pointwise
from .common import BUILT_IN, Form, Gradients, like, rows, table

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("mix.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fschedule-insns",
    "-fsched-pressure",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
BUILD_SECONDS = 120
# Numbers that take a few microseconds, about what it takes to wake a thread. All threads or one: OpenMP ends the
# threads that a smaller team has no use for, and torch's next operation would start them again.
WORTH_THREADS = 8192


def supports(names: tuple[str, ...], dtype: torch.dtype, compute: torch.dtype, device: str) -> bool:
    """Whether the kernel knows these activations, dtypes and device, and can be built here."""
    known = device == "cpu" and dtype in DTYPES and compute == torch.float32 and BUILT_IN.issuperset(names)
    return known and available()


@functools.cache
def available() -> bool:
    """Whether the kernel can be built here; the reason why not is logged once."""
    try:
        _library(("identity",), "plain")
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        log.warning("no C++ kernel for the mix of activations (%s); the slower torch operations serve", detail[:300])
        return False
    return True


def forward(a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form) -> Tensor:
    """See kernels.common.

    Where all coefficients are those of one entry, as at the identity start, torch's own function answers, so that a
    layer that was swapped computes what it computed before to the last bit.
    """
    y = like(a)
    if not y.numel():
        return y
    entries = _single_entries(c, e, form)
    if entries is not None:
        single = pointwise(names[entries[0]]).function(a)
        if b is not None:
            single = single * (b if form == "one" else pointwise(names[entries[1]]).function(b))
        if single.isfinite().all():  # at the edges the kernel is right where torch's functions are not
            return y.copy_(single)
    inputs, sizes = _inputs(a, c, b, e, form)
    call = getattr(_library(names, form), f"forward_{DTYPES[a.dtype]}")
    call(*_pointers(*inputs, y), _numbers(*sizes, 0))
    return y


def _single_entries(c: Tensor, e: Tensor | None, form: Form) -> tuple[int, ...] | None:
    """The entry of each mix whose coefficient is 1 for all tokens, the others being 0; None unless there is one in
    each. What training has touched differs in the first token already, which makes the question cheap."""
    found: list[int] = []
    for coefficients in (c, e) if e is not None else (c,):
        entries = coefficients.flatten(-2) if form == "pairs" else coefficients
        first = entries.reshape(-1, entries.shape[-1])[0]
        row = first.tolist()
        if row.count(0.0) != len(row) - 1 or row.count(1.0) != 1 or not bool((entries == first).all()):
            return None
        place = row.index(1.0)
        found += divmod(place, coefficients.shape[-1]) if form == "pairs" else (place,)
    return tuple(found)


def backward(
    g: Tensor, a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, names: tuple[str, ...], form: Form
) -> Gradients:
    """See kernels.common."""
    shape = (*a.shape[:-1], *(len(names),) * (2 if form == "pairs" else 1))
    da, dc = like(a), torch.zeros(shape, dtype=c.dtype)
    db = None if b is None else like(b)
    de = None if e is None else torch.zeros_like(dc)
    if da.numel():
        g = rows(g)
        inputs, sizes = _inputs(a, c, b, e, form)
        call = getattr(_library(names, form), f"backward_{DTYPES[a.dtype]}")
        call(*_pointers(g, *inputs, da, db, dc, de), _numbers(*sizes, g.stride(0)))
    return da, dc, db, de


def _inputs(
    a: Tensor, c: Tensor, b: Tensor | None, e: Tensor | None, form: Form
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """a, b, c, e as mix.cpp reads them, and the rows, width and strides that describe them."""
    a, b = rows(a), None if b is None else rows(b)
    c, c_stride = table(c, form)
    e, e_stride = (None, 0) if e is None else table(e, form)
    return (a, b, c, e), (*a.shape, a.stride(0), 0 if b is None else b.stride(0), c_stride, e_stride)


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def _numbers(*sizes: int) -> ctypes.Array[ctypes.c_int64]:
    """Rows, width, strides of a, b, c, e, g; then the threads."""
    threads = torch.get_num_threads() if sizes[0] * sizes[1] >= WORTH_THREADS else 1
    return (ctypes.c_int64 * 8)(*sizes, threads)


@functools.cache
def _library(names: tuple[str, ...], form: Form) -> ctypes.CDLL:
    """The compiled kernel of a dictionary and form, from the cache folder or built now.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it fails.
    """
    compiler = _compiler()
    entries = ",".join("tanh_" if name == "tanh" else name for name in names)
    flags = (*FLAGS, _native(), f"-DENTRIES={entries}", f"-DFORM={form}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
    key = "\0".join((SOURCE.read_text(), *flags, version.stdout, _processor()))
    file = _folder() / f"mix-{form}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not file.exists():
        _build([compiler, *flags, str(SOURCE)], file)
    return ctypes.CDLL(str(file))


def _build(command: list[str], file: Path) -> None:
    """Compile under another name, then rename: other processes see a whole library or none."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fresh = Path(folder) / file.name
        subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        fresh.replace(file)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError("no C++ compiler: neither $CXX nor g++, clang++ or c++")


def _native() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _processor() -> str:
    """What `native` depends on: a home folder may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Feat"))}))


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa_lightning"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
