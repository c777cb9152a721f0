"""The activation alone (`op`) and inside the feed-forward layer (`layer`), forward and backward.

`op` sets the mix, by each implementation that works here, against one GELU of torch, and gated mixes against torch's
SiLU with a product. `layer` takes gradients of the input and of every parameter, eager and compiled.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import DICTIONARY
from ..feedforward import FeedForward, FFNConfig, flops_per_token
from ..kernels import Kernel, compiler_works, cpp, mix, mix_pairs, triton_mix
from ..mixing import MixCoefficients
from .machine import DTYPES, Machine, Setting
from .timing import Row, Seconds, alternate, rows
from .traffic import bytes_per_token

VARIANTS = {
    "GELU": FFNConfig(),
    "MoA plain": FFNConfig("moa"),
    "SwiGLU": FFNConfig(form="gated", activation="silu"),
    "MoA both": FFNConfig("moa", "gated", "silu", branches="both"),
}
BASELINES = {"MoA plain": "GELU", "MoA both": "SwiGLU"}
GATED = {branches: FFNConfig("moa", "gated", "silu", branches=branches) for branches in ("one", "both", "pairs")}
COPY = "copy"
Measured = list[Row]


def trained(net: nn.Module) -> nn.Module:
    """The net with its mixes moved away from their start, as training leaves them.

    At the identity start the CPU's kernel answers with torch's own function, which would then be measured.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, MixCoefficients):
                for parameter in module.parameters(recurse=False):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.02 * noise.to(parameter.device))
    return net


def op(setting: Setting, machine: Machine) -> Measured:
    """The mix of seven activations, and the gated mixes."""
    found = []
    for name in setting.dtypes:
        for group, calls, configs in (_plain(setting, name), _gated(setting, name)):
            baseline = next(iter(calls))
            seconds = alternate(calls, setting.effort, setting.device, before=_copy(_activation(setting, name)))
            measured = rows(f"{group}, {name}", seconds, dict.fromkeys([*calls][1:], baseline))
            _add_traffic(measured, seconds, configs, setting, DTYPES[name].itemsize)
            found += measured
    return found


Group = tuple[str, dict[str, Callable[[], Any]], dict[str, FFNConfig]]


def _plain(setting: Setting, dtype: str) -> Group:
    u, c = _activation(setting, dtype), _coefficients(setting, len(DICTIONARY))
    both_ways = partial(_both_ways, torch.randn_like(u))
    calls = {"GELU": both_ways(F.gelu, u)}
    configs = {"GELU": FFNConfig()}
    if compiler_works():
        calls["GELU, compiled"] = both_ways(torch.compile(_gelu), u)
    for kernel in kernels(setting, DTYPES[dtype]):
        calls[f"mix, {kernel}"] = both_ways(partial(_mix, kernel=kernel), u, c)
    if compiler_works():
        calls["mix, auto in a compiled graph"] = both_ways(torch.compile(partial(_mix, kernel="auto")), u, c)
    for name in calls:
        configs[name] = FFNConfig("moa") if name.startswith("mix") else FFNConfig()
    calls[COPY] = _copy(u)
    return "op, plain", calls, configs


def _gated(setting: Setting, dtype: str) -> Group:
    a, b = _activation(setting, dtype), _activation(setting, dtype)
    c, e = (_coefficients(setting, len(DICTIONARY)) for _ in range(2))
    square = _coefficients(setting, len(DICTIONARY), len(DICTIONARY))
    both_ways = partial(_both_ways, torch.randn_like(a))
    calls = {"SwiGLU": both_ways(_swiglu, a, b)}
    if compiler_works():
        calls["SwiGLU, compiled"] = both_ways(torch.compile(_swiglu), a, b)
    if setting.device.type == "cuda" and (liger := _liger()) is not None:
        # its backward pass writes the gradients over its inputs, so it gets its own
        calls["SwiGLU, liger_kernel"] = both_ways(liger, _activation(setting, dtype), _activation(setting, dtype))
    configs = dict.fromkeys(calls, FFNConfig(form="gated", activation="silu"))
    calls["mix one"] = both_ways(lambda a, c, b: mix(a, c, DICTIONARY, b), a, c, b)
    calls["mix both"] = both_ways(lambda a, c, b, e: mix(a, c, DICTIONARY, b, e), a, c, b, e)
    calls["mix pairs"] = both_ways(lambda a, b, c: mix_pairs(a, b, c, DICTIONARY), a, b, square)
    configs |= {f"mix {branches}": config for branches, config in GATED.items()}
    calls[COPY] = _copy(a)
    return "op, gated", calls, configs


def kernels(setting: Setting, dtype: torch.dtype) -> Iterator[Kernel]:
    """The implementations of the mix that work on this device."""
    if cpp.supports(DICTIONARY, dtype, torch.float32, setting.device.type):
        yield "cpp"
    if triton_mix.supports(DICTIONARY, dtype, torch.float32, setting.device.type):
        yield "triton"
    if compiler_works():
        yield "compiled"
    yield from ("recompute", "reference")


def _liger() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The fused SiLU product of the package liger_kernel, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _mix(u: Tensor, c: Tensor, kernel: Kernel) -> Tensor:
    return mix(u, c, DICTIONARY, kernel=kernel)


def _gelu(u: Tensor) -> Tensor:
    return F.gelu(u)


def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def _activation(setting: Setting, dtype: str) -> Tensor:
    sizes = setting.sizes
    shape = (sizes.tokens, sizes.hidden)
    return torch.randn(shape, device=setting.device, dtype=DTYPES[dtype], requires_grad=True)


def _coefficients(setting: Setting, *entries: int) -> Tensor:
    return torch.randn(setting.sizes.tokens, *entries, device=setting.device, requires_grad=True)


def _both_ways(g: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, g)


def _copy(u: Tensor) -> Callable[[], Any]:
    source, target = u.detach(), torch.empty_like(u)
    return lambda: target.detach().copy_(source)


def _add_traffic(
    measured: Measured, seconds: Seconds, configs: dict[str, FFNConfig], setting: Setting, itemsize: int
) -> None:
    """Bytes a second of the traffic that cannot be avoided, and its share of what a copy reaches in the same round."""
    sizes = setting.sizes
    copied = 2 * sizes.tokens * sizes.hidden * itemsize
    for row in measured:
        config = configs.get(row.variant)
        moved = copied if config is None else sizes.tokens * bytes_per_token(sizes.hidden, config, itemsize)
        row.figures["GB/s"] = moved / row.ms / 1e6
        pairs = zip(seconds[row.variant], seconds[COPY], strict=True)
        row.figures["of a copy"] = statistics.median(moved / own / (copied / copy) for own, copy in pairs)


def layer(setting: Setting, machine: Machine) -> Measured:
    """The feed-forward layer."""
    found = []
    sizes = setting.sizes
    x = torch.randn(1, sizes.tokens, sizes.dim, device=setting.device, requires_grad=True)
    for dtype in setting.dtypes:
        for how in ("eager", "compiled") if compiler_works() else ("eager",):
            calls = {}
            for name, config in VARIANTS.items():
                net = trained(FeedForward(sizes.dim, config, sizes.hidden)).to(setting.device)
                function = net if how == "eager" else torch.compile(net)
                calls[name] = partial(_gradients, function, net, x, dtype)
            seconds = alternate(calls, setting.effort, setting.device)
            measured = rows(f"layer, {dtype}, {how}", seconds, BASELINES)
            for row in measured:
                flops = 3 * sizes.tokens * flops_per_token(sizes.dim, sizes.hidden, VARIANTS[row.variant])
                row.figures["TFLOP/s"] = flops / row.ms / 1e9
                row.figures["of a product"] = flops / row.ms * 1e3 / machine.product[dtype]
            found += measured
    return found


def _gradients(function: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, dtype: str) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        y = function(x)
    torch.autograd.grad(y, (x, *net.parameters()), torch.ones_like(y))
