"""The dictionary: activation functions by name, each with its derivative and its cost.

Two kinds. A *pointwise* activation has no parameters and acts on each number alone; it may enter a mix and a fused
kernel. A *module* activation normalises over the hidden axis or owns parameters (PolyNorm, xIELU); it serves as a
baseline for the fixed form only. The default dictionary is the one of arXiv 2605.26647 as read second-hand [S];
LeakyReLU's slope 0.01 is our choice [O].

Note that LeakyReLU = 0.99 ReLU + 0.01 identity: single coefficients of a mix are not identifiable, so judge the curve
sum_k c_k sigma_k(u) and not its entries.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

Pointwise = Callable[[Tensor], Tensor]

LEAKY_SLOPE = 0.01
DICTIONARY = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")


@dataclass(frozen=True)
class Activation:
    """A pointwise activation function."""

    name: str
    function: Pointwise
    derivative: Pointwise | None
    """The derivative as a function of the input; None: taken by autograd."""
    cost: float
    """Elementwise operations per number, forward; a transcendental function counts as 10."""

    joint: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """Value and derivative together, quicker than one after the other; may be NaN where the input is infinite."""

    def quick(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The function and its derivative at finite u."""
        return self.joint(u) if self.joint is not None else self.value_and_derivative(u)

    def value_and_derivative(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The function and its derivative at u, both of u's shape."""
        if self.derivative is not None:
            return self.function(u), self.derivative(u)
        value, pull_back = torch.func.vjp(self.function, u)[:2]  # unlike autograd.grad, torch.compile traces it whole
        return value, pull_back(torch.ones_like(u))[0]


class ModuleActivation(nn.Module, ABC):
    """An activation that owns parameters or couples neurons; maps (..., h) to (..., h)."""

    def forward(self, u: Tensor) -> Tensor:
        return self.curve(u, *self.parameters(recurse=False))

    @abstractmethod
    def curve(self, u: Tensor, *parameters: Tensor) -> Tensor:
        """The activation with these parameters in the order of their names here, of their
        shapes, or with leading axes that broadcast against those of u (one set for each row or group of rows)."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Write the start of the parameters, which is not random."""


_POINTWISE: dict[str, Activation] = {}
_MODULES: dict[str, Callable[[], ModuleActivation]] = {}


def register_activation(
    name: str, function: Pointwise, derivative: Pointwise | None = None, cost: float = 10.0
) -> Activation:
    """Add a pointwise activation that dictionaries and configs can name.

    Args:
        name: new name, not yet taken.
        function: maps a tensor to one of the same shape, each number alone, differentiable by autograd.
        derivative: the derivative as a function of the same input, or a surrogate for it (ffn.kernel "reference" takes
            autograd's all the same); None lets autograd take it.
        cost: elementwise operations per number, for cost estimates.

    Raises:
        UserError: the name is taken, or the function does not act on each number alone or has no derivative.
    """
    if not name or not callable(function):
        raise UserError(f"activation '{name}' is {function!r}; give a name and a function of a tensor")
    if derivative is not None and not callable(derivative):
        raise UserError(
            f"the derivative of activation '{name}' is {derivative!r}; give a function of a tensor, or None"
        )
    if name in _POINTWISE or name in _MODULES:
        raise UserError(f"activation '{name}' is already registered; choose another name")
    activation = Activation(name, function, derivative, cost)
    probe = torch.linspace(-2.97, 3.01, 24)
    if not _acts_alone(function, probe):
        raise UserError(f"activation '{name}' must map each number alone to one number of its dtype, in a new tensor")
    with torch.enable_grad():
        differentiable = function(probe.clone().requires_grad_()).requires_grad
    if derivative is None and not differentiable:
        raise UserError(f"activation '{name}' must be differentiable by autograd, or come with its derivative")
    slope = activation.value_and_derivative(probe)[1]
    if slope.shape != probe.shape or slope.dtype != probe.dtype:
        raise UserError(f"the derivative of activation '{name}' must have the shape and dtype of its input")
    _POINTWISE[name] = activation
    return activation


def _acts_alone(function: Pointwise, probe: Tensor) -> bool:
    """Whether the function gives each number of a vector what it gives that number on its own."""
    given = probe.clone()
    whole, alone = function(given), [function(number.clone()) for number in probe.split(1)]
    if whole.shape != probe.shape or whole.dtype != probe.dtype or any(value.shape != (1,) for value in alone):
        return False
    return given._version == 0 and torch.allclose(whole, torch.cat(alone), atol=1e-6)


def pointwise(name: str) -> Activation:
    """The pointwise activation of that name; UserError names the known ones."""
    if name not in _POINTWISE:
        extra = " (it has parameters or couples neurons, so it only serves the fixed form)" if name in _MODULES else ""
        known = ", ".join(_POINTWISE)
        raise UserError(f"unknown activation '{name}' for a mix{extra}; known: {known}")
    return _POINTWISE[name]


def is_pointwise(name: str) -> bool:
    return name in _POINTWISE


def activation_names() -> tuple[str, ...]:
    """All names that the fixed form accepts."""
    return (*_POINTWISE, *_MODULES)


def module_activation(name: str) -> ModuleActivation:
    """A fresh module for an activation with parameters; UserError for an unknown name."""
    if name not in _MODULES:
        raise UserError(f"unknown activation '{name}'; known: {', '.join(activation_names())}")
    return _MODULES[name]()


def _gelu_derivative(u: Tensor) -> Tensor:
    density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(u) + torch.where(density == 0, 0.0, u * density)  # u · 0 at ±inf would be NaN


def _silu_derivative(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    rest = s * (1 - s)
    return s + torch.where(rest == 0, 0.0, u * rest)


def _sigmoid_joint(u: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(u)
    return s, s * (1 - s)


def _leaky_derivative(u: Tensor) -> Tensor:
    return torch.ones_like(u).masked_fill_(u <= 0, LEAKY_SLOPE)


def _gelu_joint(u: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(u), torch.ops.aten.gelu_backward(torch.ones_like(u), u)


def _silu_joint(u: Tensor) -> tuple[Tensor, Tensor]:
    return F.silu(u), torch.ops.aten.silu_backward(torch.ones_like(u), u)


def _tanh_joint(u: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(u)
    return value, 1 - value.square()


for _name, _function, _derivative, _cost in (
    ("identity", lambda u: u, torch.ones_like, 0.0),
    ("gelu", F.gelu, _gelu_derivative, 13.0),
    ("silu", F.silu, _silu_derivative, 12.0),
    ("relu", F.relu, lambda u: (u > 0).to(u.dtype), 1.0),
    ("leaky_relu", lambda u: F.leaky_relu(u, LEAKY_SLOPE), _leaky_derivative, 2.0),
    ("relu2", lambda u: F.relu(u).square(), lambda u: 2 * F.relu(u), 2.0),
    ("tanh", torch.tanh, lambda u: 1 - torch.tanh(u).square(), 10.0),
    ("gelu_tanh", lambda u: F.gelu(u, approximate="tanh"), None, 17.0),
    ("quick_gelu", lambda u: u * torch.sigmoid(1.702 * u), None, 13.0),
    ("sigmoid", torch.sigmoid, lambda u: torch.sigmoid(u) * torch.sigmoid(-u), 10.0),
):
    register_activation(_name, _function, _derivative, _cost)
for _name, _joint in (
    ("gelu", _gelu_joint),
    ("silu", _silu_joint),
    ("tanh", _tanh_joint),
    ("sigmoid", _sigmoid_joint),
):
    _POINTWISE[_name] = replace(_POINTWISE[_name], joint=_joint)


class PolyNorm(ModuleActivation):
    """a_1 n(x) + a_2 n(x²) + a_3 n(x³) + b with n(v) = v / rms(v) over the hidden axis (Zhuo et al., "Polynomial
    Composition Activations", arXiv 2411.03884, eq. 5). Input and output (..., h); computed in float32 at least."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(1))
        self.eps = eps
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start: the plain mean of the three terms."""
        self.weight.fill_(1 / 3)
        self.bias.zero_()

    def curve(self, u: Tensor, *parameters: Tensor) -> Tensor:
        weights, bias = parameters
        v = u.to(torch.promote_types(u.dtype, torch.float32))
        total = bias.to(v.dtype)
        for power, weight in enumerate(weights.split(1, dim=-1), start=1):
            term = v**power
            total = total + weight * term * torch.rsqrt(term.square().mean(-1, keepdim=True) + self.eps)
        return total.to(u.dtype)


class XIELU(ModuleActivation):
    """α_p u² + β u for u > 0, α_n (exp(u) - 1 - u) + β u otherwise, with α_p = softplus(p), α_n = β + softplus(n) and
    β = 0.5 (Huang and Schlag, "Deriving Activation Functions Using Integration", arXiv 2411.13010). Both α start at
    0.8. Input and output (..., h); computed in float32 at least."""

    beta = 0.5

    def __init__(self, start: float = 0.8) -> None:
        super().__init__()
        self.start = start
        self.alpha_p = nn.Parameter(torch.empty(1))
        self.alpha_n = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start: both α at `start`."""
        self.alpha_p.fill_(math.log(math.expm1(self.start)))
        self.alpha_n.fill_(math.log(math.expm1(self.start - self.beta)))

    def curve(self, u: Tensor, *parameters: Tensor) -> Tensor:
        v = u.to(torch.promote_types(u.dtype, torch.float32))
        alpha_p = F.softplus(parameters[0])
        alpha_n = self.beta + F.softplus(parameters[1])
        negative = v.clamp(max=0.0)
        curve = torch.where(v > 0, alpha_p * v.square(), alpha_n * (torch.expm1(negative) - negative))
        return (curve + self.beta * v).to(u.dtype)


_MODULES["polynorm"] = PolyNorm
_MODULES["xielu"] = XIELU
MODULE_COST = 20.0  # elementwise operations per number of PolyNorm and xIELU, for cost estimates
