"""The feed-forward family in NumPy float64 with hand-derived gradients: the yardstick of the tests.

Written from the formulas (design notes of the family after arXiv 2605.26647; PolyNorm from arXiv 2411.03884, xIELU from
arXiv 2411.13010), not from the library: no torch, no autograd, no shared code. Parameters are a dict under the names
that a FeedForward's state dict has, so that comparing is key by key.

    c_k(x) = α_k + g(u_kᵀ x + b_k) − g(0)       dc/dα = 1,  dc/dlogit = g'
    y = Σ_k c_k σ_k(u)                          dy/du = Σ_k c_k σ_k'(u),  dy/dc_k = σ_k(u)
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array
from scipy.special import erf, expit

Params = dict[str, Array]

SEVEN = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")


def _normal_cdf(u: Array) -> Array:
    return (1 + erf(u / np.sqrt(2))) / 2


def _normal_pdf(u: Array) -> Array:
    return np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)


def _gelu_tanh(u: Array) -> Array:
    return u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))) / 2


def _gelu_tanh_slope(u: Array) -> Array:
    t = np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))
    return (1 + t) / 2 + u / 2 * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * u**2)


FUNCTION = {
    "identity": lambda u: u,
    "gelu": lambda u: u * _normal_cdf(u),
    "silu": lambda u: u * expit(u),
    "relu": lambda u: np.where(u > 0, u, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, u, 0.01 * u),
    "relu2": lambda u: np.where(u > 0, u**2, 0.0),
    "tanh": np.tanh,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda u: u * expit(1.702 * u),
    "sigmoid": expit,
}
SLOPE = {
    "identity": np.ones_like,
    "gelu": lambda u: _normal_cdf(u) + u * _normal_pdf(u),
    "silu": lambda u: expit(u) * (1 + u * expit(-u)),
    "relu": lambda u: np.where(u > 0, 1.0, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, 1.0, 0.01),
    "relu2": lambda u: np.where(u > 0, 2 * u, 0.0),
    "tanh": lambda u: 1 / np.cosh(u) ** 2,
    "gelu_tanh": _gelu_tanh_slope,
    "quick_gelu": lambda u: expit(1.702 * u) * (1 + 1.702 * u * expit(-1.702 * u)),
    "sigmoid": lambda u: expit(u) * expit(-u),
}


@dataclass(frozen=True)
class Spec:
    """Which member of the family; `activation` is read by the fixed member only, `gate` by MoA only."""

    mixing: str
    form: str
    activation: str = "gelu"
    dictionary: tuple[str, ...] = SEVEN
    branches: str = "one"
    gate: str = "sigmoid"


def gate_values(logits: Array, gate: str) -> Array:
    """g(logits) for logits (N, M); softmax over all M entries."""
    if gate == "softmax":
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)
    return {"sigmoid": expit, "tanh": np.tanh}[gate](logits)


def gate_gradient(g: Array, dg: Array, gate: str) -> Array:
    """dL/dlogits from g = gate(logits) and dL/dg, both (N, M)."""
    if gate == "softmax":
        return g * (dg - (g * dg).sum(axis=1, keepdims=True))
    return dg * (g * (1 - g) if gate == "sigmoid" else 1 - g**2)


class Coefficients:
    """c(x) of one mix for x (N, d), with entries flattened to M = K or K²."""

    def __init__(self, p: Params, prefix: str, x: Array, spec: Spec) -> None:
        self.p, self.prefix, self.x, self.gate = p, prefix, x, spec.gate if spec.mixing == "moa" else None
        alpha = p[f"{prefix}.base"]
        self.shape = alpha.shape
        self.value = np.tile(alpha.reshape(1, -1), (len(x), 1))
        if self.gate is not None:
            bias = p.get(f"{prefix}.gate_bias", 0.0)
            self.g = gate_values(x @ p[f"{prefix}.gate_weight"].T + bias, self.gate)
            self.value += self.g - {"sigmoid": 0.5, "softmax": 1 / alpha.size, "tanh": 0.0}[self.gate]

    def backward(self, dc: Array, grads: Params) -> None:
        grads[f"{self.prefix}.base"] = dc.sum(axis=0).reshape(self.shape)
        if self.gate is not None:
            dlogits = gate_gradient(self.g, dc, self.gate)
            grads[f"{self.prefix}.gate_weight"] = dlogits.T @ self.x
            if f"{self.prefix}.gate_bias" in self.p:
                grads[f"{self.prefix}.gate_bias"] = dlogits.sum(axis=0)
            grads["x"] += dlogits @ self.p[f"{self.prefix}.gate_weight"]


def stack(table: dict, names: tuple[str, ...], u: Array) -> Array:
    """σ_k(u), or its slopes: (N, K, h) for u (N, h)."""
    return np.stack([table[name](u) for name in names], axis=1)


def mix(u: Array, c: Array, names: tuple[str, ...]) -> Array:
    """Σ_k c_k σ_k(u): u (N, h), c (N, K)."""
    return np.einsum("nk,nkh->nh", c, stack(FUNCTION, names, u))


def mix_gradient(u: Array, c: Array, names: tuple[str, ...], dy: Array) -> tuple[Array, Array]:
    """dL/du (N, h) and dL/dc (N, K)."""
    du = dy * np.einsum("nk,nkh->nh", c, stack(SLOPE, names, u))
    return du, np.einsum("nh,nkh->nk", dy, stack(FUNCTION, names, u))


def mix_pairs(a: Array, b: Array, c: Array, names: tuple[str, ...]) -> Array:
    """Σ_kl c_kl σ_k(a) σ_l(b): a, b (N, h), c (N, K, K)."""
    return np.einsum("nkl,nkh,nlh->nh", c, stack(FUNCTION, names, a), stack(FUNCTION, names, b))


def mix_pairs_gradient(a: Array, b: Array, c: Array, names: tuple[str, ...], dy: Array) -> tuple[Array, Array, Array]:
    """dL/da, dL/db (N, h) and dL/dc (N, K, K)."""
    fa, fb = stack(FUNCTION, names, a), stack(FUNCTION, names, b)
    da = np.einsum("nh,nkl,nkh,nlh->nh", dy, c, stack(SLOPE, names, a), fb)
    db = np.einsum("nh,nkl,nkh,nlh->nh", dy, c, fa, stack(SLOPE, names, b))
    return da, db, np.einsum("nh,nkh,nlh->nkl", dy, fa, fb)


def polynorm(u: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Σ_p w_p u^p / rms(u^p) + b, p = 1, 2, 3, rms over the last axis."""
    terms = [u**p / np.sqrt((u ** (2 * p)).mean(axis=-1, keepdims=True) + eps) for p in (1, 2, 3)]
    return sum(w * t for w, t in zip(weight, terms, strict=True)) + bias


def polynorm_gradient(u: Array, weight: Array, dy: Array, eps: float = 1e-6) -> tuple[Array, Array, Array]:
    """dL/du, dL/dweight (3,), dL/dbias (1,). With n = v / r: dL/dv = (dn − n · mean(n · dn)) / r."""
    du, dweight = np.zeros_like(u), np.zeros(3)
    for i, p in enumerate((1, 2, 3)):
        r = np.sqrt((u ** (2 * p)).mean(axis=-1, keepdims=True) + eps)
        n, dn = u**p / r, weight[i] * dy
        dweight[i] = (dy * n).sum()
        du += (dn - n * (n * dn).mean(axis=-1, keepdims=True)) / r * p * u ** (p - 1)
    return du, dweight, np.array([dy.sum()])


def xielu(u: Array, p: Array, n: Array) -> Array:
    """α_p u² + u/2 for u > 0, α_n (e^u − 1 − u) + u/2 otherwise; α_p = softplus(p), α_n = 1/2 + softplus(n)."""
    alpha_p, alpha_n = np.logaddexp(0, p), 0.5 + np.logaddexp(0, n)
    return np.where(u > 0, alpha_p * u**2, alpha_n * (np.expm1(np.minimum(u, 0)) - u)) + u / 2


def xielu_gradient(u: Array, p: Array, n: Array, dy: Array) -> tuple[Array, Array, Array]:
    """dL/du, dL/dp (1,), dL/dn (1,)."""
    alpha_p, alpha_n, low = np.logaddexp(0, p), 0.5 + np.logaddexp(0, n), np.minimum(u, 0)
    du = dy * (np.where(u > 0, 2 * alpha_p * u, alpha_n * np.expm1(low)) + 0.5)
    dp = (dy * np.where(u > 0, u**2, 0)).sum() * expit(p)
    dn = (dy * np.where(u > 0, 0, np.expm1(low) - low)).sum() * expit(n)
    return du, dp, dn


class FixedBranch:
    """σ(u) of one branch; PolyNorm and xIELU read their parameters under `prefix`.activation."""

    def __init__(self, p: Params, prefix: str, u: Array, spec: Spec) -> None:
        self.p, self.prefix, self.u, self.name = p, f"{prefix}.activation", u, spec.activation
        if self.name == "polynorm":
            self.value = polynorm(u, p[f"{self.prefix}.weight"], p[f"{self.prefix}.bias"])
        elif self.name == "xielu":
            self.value = xielu(u, p[f"{self.prefix}.alpha_p"], p[f"{self.prefix}.alpha_n"])
        else:
            self.value = FUNCTION[self.name](u)

    def backward(self, dy: Array, grads: Params) -> Array:
        if self.name == "polynorm":
            du, grads[f"{self.prefix}.weight"], grads[f"{self.prefix}.bias"] = polynorm_gradient(
                self.u, self.p[f"{self.prefix}.weight"], dy
            )
        elif self.name == "xielu":
            du, grads[f"{self.prefix}.alpha_p"], grads[f"{self.prefix}.alpha_n"] = xielu_gradient(
                self.u, self.p[f"{self.prefix}.alpha_p"], self.p[f"{self.prefix}.alpha_n"], dy
            )
        else:
            du = dy * SLOPE[self.name](self.u)
        return du


class MixedBranch:
    """Σ_k c_k(x) σ_k(u) of one branch."""

    def __init__(self, p: Params, prefix: str, u: Array, x: Array, spec: Spec) -> None:
        self.u, self.names, self.c = u, spec.dictionary, Coefficients(p, prefix, x, spec)
        self.value = mix(u, self.c.value, self.names)

    def backward(self, dy: Array, grads: Params) -> Array:
        du, dc = mix_gradient(self.u, self.c.value, self.names, dy)
        self.c.backward(dc, grads)
        return du


class IdentityBranch:
    """A branch that is not activated."""

    def __init__(self, u: Array) -> None:
        self.value = u

    def backward(self, dy: Array, grads: Params) -> Array:
        return dy


def _branch(p: Params, prefix: str, u: Array, x: Array, spec: Spec) -> FixedBranch | MixedBranch:
    return FixedBranch(p, prefix, u, spec) if spec.mixing == "fixed" else MixedBranch(p, prefix, u, x, spec)


def _linear(p: Params, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def _linear_backward(p: Params, name: str, x: Array, dy: Array, grads: Params) -> Array:
    grads[f"{name}.weight"] = dy.T @ x
    if f"{name}.bias" in p:
        grads[f"{name}.bias"] = dy.sum(axis=0)
    return dy @ p[f"{name}.weight"]


def feedforward(p: Params, x: Array, spec: Spec, dy: Array) -> tuple[Array, Params]:
    """The layer's output for x (N, d), and the gradients of Σ dy · y under the parameters' names and "x"."""
    grads: Params = {"x": np.zeros_like(x)}
    up = _linear(p, "up_proj", x)
    gate = _linear(p, "gate_proj", x) if spec.form == "gated" else None
    if spec.form == "plain":
        only = _branch(p, "up_mix", up, x, spec)
        hidden = only.value
    elif spec.branches == "pairs" and spec.mixing != "fixed":
        c = Coefficients(p, "pair_mix", x, spec)
        square = c.value.reshape(len(x), *c.shape)
        hidden = mix_pairs(gate, up, square, spec.dictionary)
    else:
        first = _branch(p, "gate_mix", gate, x, spec)
        mixed = spec.branches == "both" and spec.mixing != "fixed"
        second = _branch(p, "up_mix", up, x, spec) if mixed else IdentityBranch(up)
        hidden = first.value * second.value

    dhidden = _linear_backward(p, "down_proj", hidden, dy, grads)
    if spec.form == "plain":
        dup = only.backward(dhidden, grads)
    elif spec.branches == "pairs" and spec.mixing != "fixed":
        dgate, dup, dc = mix_pairs_gradient(gate, up, square, spec.dictionary, dhidden)
        c.backward(dc.reshape(len(x), -1), grads)
    else:
        dgate = first.backward(dhidden * second.value, grads)
        dup = second.backward(dhidden * first.value, grads)
    grads["x"] += _linear_backward(p, "up_proj", x, dup, grads)
    if spec.form == "gated":
        grads["x"] += _linear_backward(p, "gate_proj", x, dgate, grads)
    return _linear(p, "down_proj", hidden), grads
