"""The activations as the compiler should see them: written on the same few subexpressions, which it then computes once.

exp(-|u|) gives sigmoid, SiLU and tanh; one erf and one exp(-u²/2) give GELU and its slope. Infinite u gives the limits.
Only for tracing: run one by one these lines would be slower than torch's own functions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import LEAKY_SLOPE

Both = tuple[Tensor, Tensor]


def applies(name: str, u: Tensor) -> bool:
    """Whether code is being traced for a compiler in float32 and the activation is written here."""
    return torch.compiler.is_compiling() and u.dtype == torch.float32 and name in _FORMULAS


def traced(name: str, u: Tensor) -> Both:
    """sigma(u) and sigma'(u); a caller that drops one of them leaves dead code, which costs nothing."""
    return _FORMULAS[name](u)


def _side(u: Tensor, above: float, else_: float) -> Tensor:
    return torch.where(u > 0, torch.full_like(u, above), torch.full_like(u, else_))


def _logistic(z: Tensor) -> Both:
    """sigmoid(z) and its slope."""
    e = torch.exp(-z.abs())
    i = 1 / (1 + e)
    return torch.where(z < 0, e * i, i), e * i * i


def _times(u: Tensor, weight: Tensor) -> Tensor:
    """u · weight where the weight vanishes faster than u grows."""
    return torch.where(weight == 0, weight, u * weight)


def _gelu(u: Tensor) -> Both:
    density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    distribution = 0.5 + 0.5 * torch.erf(u * math.sqrt(0.5))
    return _times(u, distribution), distribution + _times(u, density)


def _silu(u: Tensor) -> Both:
    s, slope = _logistic(u)
    return _times(u, s), s + _times(u, slope)


def _tanh(u: Tensor) -> Both:
    e = torch.exp(-u.abs())
    square = e * e
    j = 1 / (1 + square)
    t = (1 - square) * j
    small = u * (1 - u * u / 3 * (1 - 0.4 * u * u))  # the quotient cancels near 0
    t = torch.where(u.abs() < 0.04, small, torch.where(u < 0, -t, t))
    return t, 4 * square * j * j


def _quick_gelu(u: Tensor) -> Both:
    s, slope = _logistic(1.702 * u)
    return _times(u, s), s + 1.702 * _times(u, slope)


def _gelu_tanh(u: Tensor) -> Both:
    """u · sigmoid(2 z), as (1 + tanh z) / 2 is that sigmoid."""
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    s, slope = _logistic(scale * (u + cubic * u * u * u))
    return _times(u, s), s + _times(u * scale * (1 + 3 * cubic * u * u), slope)


def _relu2(u: Tensor) -> Both:
    positive = u.clamp(min=0)
    return positive * positive, 2 * positive


_FORMULAS: dict[str, Callable[[Tensor], Both]] = {
    "identity": lambda u: (u, torch.ones_like(u)),
    "gelu": _gelu,
    "silu": _silu,
    "relu": lambda u: (u.clamp(min=0), _side(u, 1.0, 0.0)),
    "leaky_relu": lambda u: (torch.where(u < 0, LEAKY_SLOPE * u, u), _side(u, 1.0, LEAKY_SLOPE)),
    "relu2": _relu2,
    "tanh": _tanh,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "sigmoid": _logistic,
}
