"""The best plain fixed-activation or LA layer of a given width for a target function, found numerically.

    y(x) = Σ_i a_i φ(w_iᵀ x + b_i) + a_0,      φ = σ for the fixed form, φ = Σ_k α_k σ_k for LA

Least squares on a grid. Given the inner weights and α, the last layer a is solved in closed form (variable projection,
Golub and Pereyra 1973), so the search is over w, b and α only: Adam on several starts
at once, then L-BFGS on the best of them. Starts are random with their kinks inside the domain; one continues the best
fit of the width before, with random units added, and LA's others include the best fixed fits, since LA contains them.

What comes out is an upper bound of the smallest possible error: the problem is not convex, and a better fit may exist.
Nothing holds the weights back but the ridge that keeps the last layer's equations solvable: see `Fit.largest_weight`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from moa_lightning.activations import DICTIONARY, pointwise
from moa_lightning.feedforward import FeedForward, FFNConfig

from .witnesses import Target

RIDGE = 1e-8  # added to the last layer's equations, relative to the size of the features
POINTS = {1: (384,), 2: (32, 40)}  # of the grid that is fitted, by dimension
FINE = {1: (2000,), 2: (120, 120)}  # of the grid that errors are measured on
LEARNING_RATE = 0.03


@dataclass(frozen=True)
class Effort:
    """How hard to search."""

    starts: int = 6
    adam_steps: int = 150
    lbfgs_steps: int = 200

    def starts_at(self, width: int) -> int:
        """Random starts: fewer of wide layers, whose search costs more and depends less on the start."""
        return max(2, min(self.starts, 32 // width))


@dataclass(frozen=True)
class Inner:
    """Inner weights of R layers at once: w (R, m, d), b (R, m), α (R, K)."""

    w: Tensor
    b: Tensor
    alpha: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w, self.b, self.alpha

    def start(self, index: int) -> "Inner":
        return Inner(*(part[index : index + 1] for part in self.parts()))


def join(inners: Sequence[Inner]) -> Inner:
    """Many starts as one."""
    return Inner(*(torch.cat(parts) for parts in zip(*(inner.parts() for inner in inners), strict=True)))


@dataclass(frozen=True)
class Errors:
    """Of a layer against a target, on a grid finer than the fitted one; derivatives are gradients with respect to x."""

    function: float  # root mean square, relative to the target's
    derivative: float  # root mean square of the gradient's error, relative to the target's gradient
    largest_derivative: float  # the largest entry of it, absolute, just beside the kink included


@dataclass(frozen=True)
class Fit:
    """The best layer found."""

    entries: tuple[str, ...]  # one for the fixed form
    width: int
    inner: Inner  # of one start
    outer: Tensor  # (m + 1,), a_0 last
    errors: Errors

    @property
    def largest_weight(self) -> float:
        """The largest weight between input and output of a unit or its slope, max |a_i| |w_i|, whichever is larger."""
        lengths = self.inner.w[0].norm(dim=-1)
        scale = float(self.inner.alpha.abs().max()) if len(self.entries) > 1 else 1.0
        return float(torch.maximum(lengths, scale * self.outer[:-1].abs() * lengths).max())

    def layer(self) -> FeedForward:
        """The same as a FeedForward module, its function in the first output."""
        return _as_layer(self.entries, self.inner, self.outer)


def features(inner: Inner, entries: tuple[str, ...], x: Tensor) -> Tensor:
    """φ(w x + b) and a column of ones: (R, N, m + 1) for points (N, d)."""
    u = x @ inner.w.transpose(-1, -2) + inner.b[:, None]  # (R, N, m)
    if len(entries) == 1:
        hidden = pointwise(entries[0]).function(u)
    else:
        hidden = sum(
            (inner.alpha[:, k, None, None] * pointwise(name).function(u) for k, name in enumerate(entries)),
            torch.zeros_like(u),
        )
    return torch.cat([hidden, torch.ones_like(u[..., :1])], dim=-1)


@dataclass(frozen=True)
class Samples:
    """The target on the fitted grid; y and roots of the quadrature weights are (N,)."""

    x: Tensor
    y: Tensor
    roots: Tensor

    @classmethod
    def of(cls, target: Target) -> "Samples":
        x, weights = target.grid(POINTS[target.dim])
        return cls(x, target.function(x), weights.sqrt())


def residual(inner: Inner, entries: tuple[str, ...], samples: Samples) -> Tensor:
    """Mean squares left by the best last layer, ridge included, (R,).

    The gradient needs none through that layer, which is at its own minimum.
    """
    phi = features(inner, entries, samples.x) * samples.roots[:, None]
    goal = samples.y * samples.roots
    with torch.no_grad():
        outer, ridge = _last_layer(phi, goal)
        penalty = (ridge * outer).square().sum((-1, -2))
    return ((phi @ outer)[..., 0] - goal).square().sum(-1) + penalty


def _last_layer(phi: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression by QR (R, m + 1, 1), and the ridge (R, 1, 1)."""
    size = phi.shape[-1]
    ridge = RIDGE * phi.square().sum((-1, -2), keepdim=True).div(size).sqrt()
    q, r = torch.linalg.qr(torch.cat([phi, ridge * torch.eye(size, dtype=phi.dtype)], dim=1))
    right = q[:, : len(goal)].mT @ goal[:, None]
    return torch.linalg.solve_triangular(r, right, upper=True), ridge


def random_inner(starts: int, width: int, dim: int, entries: tuple[str, ...], generator: torch.Generator) -> Inner:
    """Directions even on the sphere, lengths log-normal around 2, kinks even in the domain, α normal."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = (
        torch.nn.functional.normalize(normal(starts, width, dim), dim=-1)
        * 2
        * torch.exp(0.7 * normal(starts, width, 1))
    )
    at = 2 * torch.rand(starts, width, dim, generator=generator, dtype=torch.float64) - 1
    return Inner(w, -(w * at).sum(-1), normal(starts, len(entries)))


def widened(inner: Inner, width: int, generator: torch.Generator) -> Inner:
    """The same with random units added."""
    starts, before, dim = inner.w.shape
    new = random_inner(starts, width - before, dim, ("",), generator)
    return Inner(torch.cat([inner.w, new.w], 1), torch.cat([inner.b, new.b], 1), inner.alpha)


def as_mix(inner: Inner, name: str) -> Inner:
    """Inner weights of a fixed fit as those of an LA with the default dictionary."""
    alpha = torch.tensor([[float(entry == name) for entry in DICTIONARY]], dtype=torch.float64)
    return Inner(inner.w, inner.b, alpha.expand(len(inner.w), -1))


def padded(fit: Fit, width: int) -> Fit:
    """The same function written with more units, whose last-layer weights are 0."""
    _, before, dim = fit.inner.w.shape
    w, b = fit.inner.w.new_ones(1, width - before, dim), fit.inner.b.new_zeros(1, width - before)
    inner = Inner(torch.cat([fit.inner.w, w], 1), torch.cat([fit.inner.b, b], 1), fit.inner.alpha)
    outer = torch.cat([fit.outer[:-1], fit.outer.new_zeros(width - before), fit.outer[-1:]])
    return Fit(fit.entries, width, inner, outer, fit.errors)


def best_fit(target: Target, entries: tuple[str, ...], inner: Inner, effort: Effort) -> Fit:
    """Search from the given starts.

    Args:
        entries: one activation's name for the fixed form, the dictionary for LA.
        inner: R starts of one width.

    Returns:
        The one of smaller error on the fine grid of what Adam found and what L-BFGS made of it: a fit may hide a spike
        between the points that it was fitted on.
    """
    samples = Samples.of(target)
    inner = _adam(inner, entries, samples, effort.adam_steps)
    coarse = inner.start(int(residual(inner, entries, samples).argmin()))
    found = (_finish(target, entries, inner, samples) for inner in (coarse, _lbfgs(coarse, entries, samples, effort)))
    return min(found, key=lambda fit: fit.errors.function)


def _finish(target: Target, entries: tuple[str, ...], inner: Inner, samples: Samples) -> Fit:
    phi = features(inner, entries, samples.x) * samples.roots[:, None]
    outer = _last_layer(phi, samples.y * samples.roots)[0][0, :, 0]
    return Fit(entries, inner.w.shape[1], inner, outer, measure(_as_layer(entries, inner, outer), target))


def _adam(inner: Inner, entries: tuple[str, ...], samples: Samples, steps: int) -> Inner:
    """All starts at once; each keeps the best point of its way."""
    parts = [part.clone().requires_grad_(True) for part in inner.parts()]
    optimizer = torch.optim.Adam(parts, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    kept = [part.detach().clone() for part in parts]
    lowest = torch.full((len(parts[0]),), math.inf, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = residual(Inner(parts[0], parts[1], parts[2]), entries, samples)
        # logarithms, so that starts of very different errors move alike
        losses.clamp(min=1e-300).log().sum().backward()
        with torch.no_grad():
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            for old, part in zip(kept, parts, strict=True):
                old[better] = part[better]
        optimizer.step()
        schedule.step()
    return Inner(kept[0], kept[1], kept[2])


def _lbfgs(inner: Inner, entries: tuple[str, ...], samples: Samples, effort: Effort) -> Inner:
    """scipy's L-BFGS-B on one start."""
    shapes = [part.shape for part in inner.parts()]

    def unpack(flat: Tensor) -> Inner:
        w, b, alpha = (
            piece.reshape(shape) for piece, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
        )
        return Inner(w, b, alpha)

    scale = float((samples.y * samples.roots).square().sum())

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(values.copy()).requires_grad_(True)
        loss = residual(unpack(flat), entries, samples)[0] / scale
        loss.backward()
        assert flat.grad is not None
        return float(loss.detach()), flat.grad.numpy()

    start = torch.cat([part.flatten() for part in inner.parts()]).numpy()
    options = {"maxiter": effort.lbfgs_steps, "ftol": 1e-15, "gtol": 1e-12}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return unpack(torch.from_numpy(found.x))


@torch.no_grad()
def _as_layer(entries: tuple[str, ...], inner: Inner, outer: Tensor) -> FeedForward:
    _, width, dim = inner.w.shape
    if len(entries) == 1:
        config = FFNConfig(mixing="fixed", activation=entries[0])
    else:
        config = FFNConfig(mixing="la", dictionary=entries)
    layer = FeedForward(dim, config, hidden_dim=width).double()
    layer.up_proj.weight.copy_(inner.w[0])
    layer.up_proj.bias.copy_(inner.b[0])
    layer.down_proj.weight.zero_()
    layer.down_proj.weight[0] = outer[:-1]
    layer.down_proj.bias.zero_()
    layer.down_proj.bias[0] = outer[-1]
    for mix in layer.mixings().values():
        mix.base.copy_(inner.alpha[0])
    return layer


def measure(layer: FeedForward, target: Target) -> Errors:
    """Errors of a layer, its gradients by autograd through the module itself."""
    x, weights = target.grid(FINE[target.dim])
    value, gradient = _with_gradient(lambda points: layer(points)[:, 0], x)
    truth, true_gradient = _with_gradient(target.function, x)
    beside = target.beside_the_kink(FINE[target.dim][0])
    kink = _with_gradient(lambda points: layer(points)[:, 0], beside)[1] - _with_gradient(target.function, beside)[1]
    wrong = gradient - true_gradient

    def size(values: Tensor) -> float:
        return math.sqrt(float((weights[:, None] * values.reshape(len(weights), -1).square()).sum()))

    return Errors(
        function=size(value - truth) / size(truth),
        derivative=size(wrong) / size(true_gradient),
        largest_derivative=float(torch.cat([wrong, kink]).abs().max()),
    )


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    value = function(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient
