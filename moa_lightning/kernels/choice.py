"""Which implementation computes a mix.

`auto` on the CPU: the C++ kernel, without a compiler torch operations in cache-sized blocks. `auto` on a GPU: the
Triton kernels, else what torch.compile makes, else torch operations. A user's own activation is unknown to the
hand-written kernels, so torch operations or torch.compile serve it, which is said once in the log. What is asked for by
name and cannot be had is an error.
"""

import functools
import logging
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from . import compiled, cpp, recompute, triton_mix
from .common import BUILT_IN

log = logging.getLogger(__name__)

Kernel = Literal["auto", "reference", "recompute", "compiled", "cpp", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernel)


def implementation(kernel: str, names: tuple[str, ...], a: Tensor, c: Tensor) -> ModuleType:
    """The module that computes the mix of these tensors."""
    return _choose(kernel, names, a.dtype, c.dtype, a.device.type)


@functools.cache
def _choose(kernel: str, names: tuple[str, ...], dtype: torch.dtype, compute: torch.dtype, device: str) -> ModuleType:
    """As `implementation`.

    Raises:
        UserError: a kernel asked for by name does not work here or does not compute that dtype.
    """
    if kernel == "compiled":
        if not compiled.compiler_works():
            raise UserError("ffn.kernel is 'compiled', but torch.compile does not work here; set it to 'auto'")
        return compiled
    for name, module, home in (("cpp", cpp, "cpu"), ("triton", triton_mix, "cuda")):
        if kernel != name and not (kernel == "auto" and device == home):
            continue
        if module.supports(names, dtype, compute, device):
            return module
        if kernel == name and BUILT_IN.issuperset(names):
            raise UserError(
                f"ffn.kernel is '{name}', which does not work here for {dtype} tensors on '{device}'; set it to 'auto'"
            )
    module = compiled if device != "cpu" and compiled.compiler_works() else recompute
    for name in sorted(set(names) - BUILT_IN) if kernel != "recompute" else []:
        _say_unknown(name, module.__name__)
    return recompute if kernel == "recompute" else module


@functools.cache
def _say_unknown(name: str, module: str) -> None:
    log.warning("no hand-written kernel for the activation %s; %s computes the mix", name, module)


@torch.compiler.assume_constant_result
def traces(kernel: str, names: tuple[str, ...], dtype: torch.dtype, compute: torch.dtype, device: str) -> bool:
    """Whether a graph that is being compiled should hold the mix's operations (and not one call): where no
    hand-written kernel is to be used."""
    if kernel == "recompute":
        return False
    return kernel == "compiled" or _choose(kernel, names, dtype, compute, device) in (compiled, recompute)
