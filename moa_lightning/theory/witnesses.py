"""The functions that separate the families, and the layers of one hidden unit that compute them exactly.

    plain LA         ReLU(x) + ReLU²(x)                  on [-1, 1]     [S] theorem 4.1
    plain MoA        tanh(λ x₁) · ReLU(x₂)               on [-1, 1]²    [S] theorem 4.2, proved there with tanh gates

Gated layers multiply two branches, so the same functions come one family earlier [O]: gated ReLU is the first of them,
LA on both branches the second. What separates them instead:

    gated LA, one    ReLU(x) + tanh(x)                   on [-1, 1]
    gated LA, both   tanh(λ x₁) · ReLU(x₂)               on [-1, 1]²
    gated MoA, one   the same
    gated MoA, both  tanh(λ x₁) · ReLU(x₂) · ReLU(x₃)    on [-1, 1]³

`pairs` contains what LA on both branches is, and has the last one too. The layers are this project's own FeedForward
modules with weights set by hand. In the additive form of the coefficients ([O], see mixing.py) a sigmoid gate serves as
well: tanh(z) = 2 (sigmoid(2z) - 1/2).
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
CHECKED = {1: 201, 2: 201, 3: 41}  # points along each axis that a witness is compared on, by dimension

Saturating = Literal["tanh", "sigmoid"]


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
        along = torch.empty(1, 0, dtype=torch.float64)
        if self.dim > 1:
            along = torch.cartesian_prod(*[_midpoints(count)] * (self.dim - 1)).reshape(-1, self.dim - 1)
        sides = [torch.full((len(along), 1), side * OFF_THE_KINK, dtype=torch.float64) for side in (-1, 1)]
        return torch.cat([torch.cat([along, side], dim=1) for side in sides])


def _midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 / count) - 1


def _relu_and_square(x: Tensor) -> Tensor:
    positive = x[:, 0].clamp(min=0)
    return positive + positive.square()


def _modulated_ridge(x: Tensor) -> Tensor:
    return torch.tanh(LAMBDA * x[:, 0]) * x[:, 1].clamp(min=0)


def _relu_and_tanh(x: Tensor) -> Tensor:
    return x[:, 0].clamp(min=0) + torch.tanh(x[:, 0])


def _ridge_times_relu(x: Tensor) -> Tensor:
    return _modulated_ridge(x) * x[:, 2].clamp(min=0)


SQUARED = Target("squared", "ReLU(x) + ReLU²(x)", 1, _relu_and_square)
MODULATED = Target("modulated", f"tanh({LAMBDA:g} x₁) · ReLU(x₂)", 2, _modulated_ridge)
TARGETS = (SQUARED, MODULATED)  # of plain layers
SATURATED = Target("saturated", "ReLU(x) + tanh(x)", 1, _relu_and_tanh)
TWICE_BENT = Target("twice bent", f"tanh({LAMBDA:g} x₁) · ReLU(x₂) · ReLU(x₃)", 3, _ridge_times_relu)


@torch.no_grad()
def la_witness() -> FeedForward:
    """One hidden unit of plain LA, (N, 1) -> (N, 1): u = x, coefficients 1 on ReLU and ReLU², 0 elsewhere."""
    layer = FeedForward(1, FFNConfig(mixing="la", bias=False), hidden_dim=1).double()
    layer.up_proj.weight.fill_(1.0)
    layer.down_proj.weight.fill_(1.0)
    (mix,) = layer.mixings().values()
    mix.base.copy_(_one_hot("relu") + _one_hot("relu2"))
    return layer


@torch.no_grad()
def moa_witness(gate: Saturating = "tanh") -> FeedForward:
    """One hidden unit of plain MoA, (N, 2) -> (N, 2) with the function in the first output: u = x₂, α = 0, a gate on
    ReLU that reads x₁."""
    layer = FeedForward(2, FFNConfig(mixing="moa", gate=gate, bias=False), hidden_dim=1).double()
    double = 2.0 if gate == "sigmoid" else 1.0
    layer.up_proj.weight.copy_(torch.tensor([[0.0, 1.0]]))
    layer.down_proj.weight.copy_(torch.tensor([[double], [0.0]]))
    (mix,) = layer.mixings().values()
    assert mix.gate_weight is not None
    mix.base.zero_()
    mix.gate_weight.copy_(torch.outer(_one_hot("relu"), torch.tensor([double * LAMBDA, 0.0], dtype=torch.float64)))
    return layer


@torch.no_grad()
def gated_fixed_witness() -> FeedForward:
    """One hidden unit of a gated layer with ReLU and biases is ReLU(x) (x + 1), the function that plain layers with a
    fixed activation are not."""
    return _gated(FFNConfig(form="gated", activation="relu"), gate=[1.0], up=[1.0], up_bias=1.0)


@torch.no_grad()
def gated_la_witness(branches: Literal["one", "both", "pairs"]) -> FeedForward:
    """One hidden unit of gated LA. One branch: (ReLU + tanh)(x) · 1, (N, 1); both, and pairs: the modulated ridge as
    tanh(λ x₁) · ReLU(x₂), (N, 2), each branch with one activation of its own."""
    config = FFNConfig("la", "gated", branches=branches, bias=branches == "one")
    if branches == "one":
        layer = _gated(config, gate=[1.0], up=[0.0], up_bias=1.0)
        layer.mixings()["gate_mix"].base.copy_(_one_hot("relu") + _one_hot("tanh"))
        return layer
    layer = _gated(config, gate=[LAMBDA, 0.0], up=[0.0, 1.0])
    mixes = layer.mixings()
    if branches == "pairs":
        mixes["pair_mix"].base.copy_(torch.outer(_one_hot("tanh"), _one_hot("relu")))
    else:
        mixes["gate_mix"].base.copy_(_one_hot("tanh"))
        mixes["up_mix"].base.copy_(_one_hot("relu"))
    return layer


@torch.no_grad()
def gated_moa_witness(branches: Literal["one", "both", "pairs"], gate: Saturating = "tanh") -> FeedForward:
    """One hidden unit of gated MoA, a gate that reads x₁ on the ReLU of x₂. One branch: the modulated ridge, times 1,
    (N, 2); both, and pairs: times ReLU(x₃), (N, 3)."""
    config = FFNConfig("moa", "gated", branches=branches, gate=gate, bias=branches == "one")
    double = 2.0 if gate == "sigmoid" else 1.0
    if branches == "one":
        layer = _gated(config, gate=[0.0, 1.0], up=[0.0, 0.0], up_bias=1.0, out=double)
    else:
        layer = _gated(config, gate=[0.0, 1.0, 0.0], up=[0.0, 0.0, 1.0], out=double)
    for mix in layer.mixings().values():
        mix.base.zero_()
    reader = torch.zeros(layer.dim, dtype=torch.float64)
    reader[0] = double * LAMBDA
    entry = _one_hot("relu")
    if branches == "pairs":
        entry = torch.outer(entry, entry).flatten()
    elif branches == "both":
        layer.mixings()["up_mix"].base.copy_(entry)
    gated = layer.mixings()["pair_mix" if branches == "pairs" else "gate_mix"]
    assert gated.gate_weight is not None
    gated.gate_weight.copy_(torch.outer(entry, reader))
    return layer


def _gated(
    config: FFNConfig, gate: list[float], up: list[float], up_bias: float = 0.0, out: float = 1.0
) -> FeedForward:
    """A gated layer of one hidden unit with these rows of W_gate and W_up; the other biases are 0."""
    layer = FeedForward(len(up), config, hidden_dim=1).double()
    assert layer.gate_proj is not None
    for projection in layer.projections():
        projection.weight.zero_()
        if projection.bias is not None:
            projection.bias.zero_()
    layer.gate_proj.weight.copy_(torch.tensor([gate]))
    layer.up_proj.weight.copy_(torch.tensor([up]))
    if up_bias:
        layer.up_proj.bias.fill_(up_bias)
    layer.down_proj.weight[0, 0] = out
    return layer


def _one_hot(name: str) -> Tensor:
    return torch.tensor([float(entry == name) for entry in DICTIONARY], dtype=torch.float64)


@torch.no_grad()
def largest_error(layer: FeedForward, target: Target) -> float:
    """The largest |layer - target| on a grid of [-1, 1]^dim, the kink's neighbourhood included."""
    count = CHECKED[target.dim]
    x = torch.cat([target.grid((count,) * target.dim)[0], target.beside_the_kink(count)])
    return float((layer(x)[:, 0] - target.function(x)).abs().max())
