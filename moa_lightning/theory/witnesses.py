"""The two functions that separate the families, and the layers of one hidden unit that compute them exactly.

    LA    f(x) = ReLU(x) + ReLU²(x)            on [-1, 1]       [S] theorem 4.1
    MoA   f(x) = tanh(λ x₁) · ReLU(x₂)         on [-1, 1]²      [S] theorem 4.2, proved there with tanh gates

The layers are this project's own FeedForward modules with weights set by hand. In the additive form of the coefficients
([O], see mixing.py) a sigmoid gate serves as well: tanh(z) = 2 (sigmoid(2z) - 1/2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moa_lightning.activations import DICTIONARY
from moa_lightning.feedforward import FeedForward, FFNConfig

LAMBDA = 3.0  # λ [O]
OFF_THE_KINK = 1e-7  # distance from a kink at which one-sided derivatives are looked at


@dataclass(frozen=True)
class Target:
    """A function to be represented: values (N,) of points (N, dim)."""

    name: str
    formula: str
    dim: int
    function: Callable[[Tensor], Tensor]

    def grid(self, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Points (N, dim) on [-1, 1]^dim and quadrature weights (N,) that sum to 1, in float64.

        Midpoints along each axis; along the last, on which the kink lies, they are squared, so that they crowd around
        zero: a fit that rounds the kink off between two points would seem exact.
        """
        *others, last = (_midpoints(count) for count in counts)
        axes = [*others, last * last.abs()]
        weights = [*(torch.full_like(axis, 1 / len(axis)) for axis in others), 2 * last.abs() / len(last)]
        points = torch.cartesian_prod(*axes).reshape(-1, self.dim)
        return points, torch.cartesian_prod(*weights).reshape(-1, self.dim).prod(-1)

    def beside_the_kink(self, count: int) -> Tensor:
        """Points (N, dim) just above and below zero of the last coordinate."""
        along = _midpoints(count)[:, None] if self.dim == 2 else torch.empty(1, 0, dtype=torch.float64)
        sides = [torch.full((len(along), 1), side * OFF_THE_KINK, dtype=torch.float64) for side in (-1, 1)]
        return torch.cat([torch.cat([along, side], dim=1) for side in sides])


def _midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 / count) - 1


def _relu_and_square(x: Tensor) -> Tensor:
    positive = x[:, 0].clamp(min=0)
    return positive + positive.square()


def _modulated_ridge(x: Tensor) -> Tensor:
    return torch.tanh(LAMBDA * x[:, 0]) * x[:, 1].clamp(min=0)


SQUARED = Target("squared", "ReLU(x) + ReLU²(x)", 1, _relu_and_square)
MODULATED = Target("modulated", f"tanh({LAMBDA:g} x₁) · ReLU(x₂)", 2, _modulated_ridge)
TARGETS = (SQUARED, MODULATED)


@torch.no_grad()
def la_witness() -> FeedForward:
    """One hidden unit of LA, (N, 1) -> (N, 1): u = x, coefficients 1 on ReLU and ReLU², 0 elsewhere."""
    layer = FeedForward(1, FFNConfig(mixing="la", bias=False), hidden_dim=1).double()
    layer.up_proj.weight.fill_(1.0)
    layer.down_proj.weight.fill_(1.0)
    (mix,) = layer.mixings().values()
    mix.base.copy_(_one_hot("relu") + _one_hot("relu2"))
    return layer


@torch.no_grad()
def moa_witness(gate: Literal["tanh", "sigmoid"] = "tanh") -> FeedForward:
    """One hidden unit of MoA, (N, 2) -> (N, 2) with the function in the first output: u = x₂, α = 0, a gate on ReLU
    that reads x₁."""
    layer = FeedForward(2, FFNConfig(mixing="moa", gate=gate, bias=False), hidden_dim=1).double()
    double = 2.0 if gate == "sigmoid" else 1.0
    layer.up_proj.weight.copy_(torch.tensor([[0.0, 1.0]]))
    layer.down_proj.weight.copy_(torch.tensor([[double], [0.0]]))
    (mix,) = layer.mixings().values()
    assert mix.gate_weight is not None
    mix.base.zero_()
    mix.gate_weight.copy_(torch.outer(_one_hot("relu"), torch.tensor([double * LAMBDA, 0.0], dtype=torch.float64)))
    return layer


def _one_hot(name: str) -> Tensor:
    return torch.tensor([float(entry == name) for entry in DICTIONARY], dtype=torch.float64)


@torch.no_grad()
def largest_error(layer: FeedForward, target: Target, count: int = 201) -> float:
    """The largest |layer - target| on a grid of [-1, 1]^dim, the kink's neighbourhood included."""
    x = torch.cat([target.grid((count,) * target.dim)[0], target.beside_the_kink(count)])
    return float((layer(x)[:, 0] - target.function(x)).abs().max())
