"""The coefficients of a mix: fixed, LA and MoA as one family, each containing the one before.

    c_k(x) = α_k + g(u_kᵀ x + b_k) - g(0)        g = sigmoid | softmax over k | tanh,  g(0) = 1/2 | 1/K | 0

fixed: one entry, its coefficient held at 1. LA: α trained, no gate. MoA: α held or trained, gate trained. [P] LA's
coefficients do not depend on the input, MoA's do, per token; [S] both are scalars per activation, the gate reads the
FFN's input x, sigmoid > softmax > tanh. The additive form around g(0) is our choice [O]: with u = b = 0 the layer is
exactly its LA, with α one-hot exactly its fixed activation, and every gate row gets a gradient from the first step,
which a multiplicative form α_k g_k(x) denies to entries with α_k = 0.

Two starts. `identity`: α is one-hot at the activation that the layer had, u = b = 0: the layer computes what it
computed before. `paper`: MoA starts at c = g(Ux) with small random U and α = g(0); LA at α = 1/K [O].

Three members serve as controls: they say where a gain of MoA comes from [O].

    frozen      u and b stay where they were drawn: the mix follows the token, but has not learned how to
    shuffled    c_k(x_i) = α_k + g(u_kᵀ x_j + b_k) - g(0), j another token: the spread of the mix without its sense
    averaged    c_k = mean over tokens of c_k(x), put into a trained net (`hold_at`): MoA becomes the LA nearest to it

Shuffled, token t of sample i has the gates of token t of sample i - 1 of its batch (of the last sample for the first
one). The order of training samples is drawn from the run's seed, so the donor is a random sample, and no permutation
need be drawn here, which would break a compiled graph. Within a sequence nothing moves: the gates of position t are
made of tokens up to t, if of another sample, so a causal language model learns nothing about its own future.
Evaluation windows lie in the order of the text, so there the donor is the text before.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .activations import is_pointwise, module_activation, pointwise
from .autocast import without_autocast
from .errors import UserError

Gate = Literal["sigmoid", "softmax", "tanh"]
Gates = Literal["trained", "frozen", "shuffled"]
GATE_STD = 0.02  # of u where it starts at random [O]


def gate_function(logits: Tensor, gate: Gate, entry_axes: int) -> Tensor:
    """g(logits) with the entries on the last `entry_axes` axes; softmax runs over all of them jointly."""
    if gate == "sigmoid":
        return torch.sigmoid(logits)
    if gate == "tanh":
        return torch.tanh(logits)
    return logits.flatten(-entry_axes).softmax(-1).unflatten(-1, logits.shape[-entry_axes:])


def gate_at_zero(gate: Gate, entries: int) -> float:
    """g(0), the value that the additive form subtracts."""
    return {"sigmoid": 0.5, "softmax": 1 / entries, "tanh": 0.0}[gate]


class _WideLinear(torch.autograd.Function):
    """weight x in the weight's wider dtype, keeping x as it came: the projections keep that x anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.to(weight.dtype) @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with without_autocast(x.device.type):
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(weight.dtype)
            return (dy @ weight).to(x.dtype), dweight


class _GatedCoefficients(torch.autograd.Function):
    """base + g(logits) - g(0), keeping for the backward pass only its result, which the mix keeps anyway, and base.

    The gate's values are read back from the coefficients, to about the coefficients' last bit, and put back into the
    gate's range: where a gate is shut or wide open its slope may come out as 0, never with the wrong sign.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, logits: Tensor, gate: Gate, at_zero: float, entry_axes: int) -> Tensor:
        c = base + (gate_function(logits, gate, entry_axes) - at_zero)
        ctx.save_for_backward(base, c)
        ctx.gate, ctx.at_zero, ctx.entry_axes = gate, at_zero, entry_axes
        return c

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        base, c = ctx.saved_tensors
        g = ((c - base) + ctx.at_zero).clamp(-1.0 if ctx.gate == "tanh" else 0.0, 1.0)
        axes = tuple(range(-ctx.entry_axes, 0))
        if ctx.gate == "softmax":
            dlogits = g * (dc - (g * dc).sum(axes, keepdim=True))
        else:
            dlogits = dc * (g * (1 - g) if ctx.gate == "sigmoid" else 1 - g * g)
        return dc.sum_to_size(base.shape), dlogits, None, None, None


class FixedActivation(nn.Module):
    """The member with nothing to learn about the mix: one entry, coefficient 1, computed in the input's dtype.

    Takes any activation, also those with parameters of their own (PolyNorm, xIELU).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.entries = (name,)
        self.activation = None if is_pointwise(name) else module_activation(name)

    def reset_parameters(self) -> None:
        """Write the start of an activation with parameters of its own; it is not random."""
        if self.activation is not None:
            self.activation.reset_parameters()

    def coefficients(self, x: Tensor) -> Tensor:
        """Ones (..., 1) for x (..., d)."""
        return x.new_ones(*x.shape[:-1], 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """sigma(u), u (..., h); x is not looked at."""
        return self.activation(u) if self.activation is not None else pointwise(self.entries[0]).function(u)

    def extra_repr(self) -> str:
        return self.entries[0]


class MixCoefficients(nn.Module):
    """The learned coefficients c(x) of a mix: LA without a gate, MoA with one.

    Args:
        dim: width d of the FFN's input x, which the gate reads.
        entries: names of the K pointwise activations.
        start: index of the entry that is 1 at the identity start (one index per entry axis).
        gate: None for LA.
        gate_bias: give the gate logits a bias b.
        init: "identity" or "paper".
        train_base: train α; otherwise it is held where it starts.
        gates: "trained"; "frozen" at a random u, whatever `init` says of α; "shuffled" between samples, see above: the
            first axis of x counts samples, and a sample that is alone in its batch keeps its own gates.
        gate_std: standard deviation of u where it starts at random.

    Parameters: base (K,) (α; a buffer when held), gate_weight (K, d), gate_bias (K,) (buffers when frozen). None of
    them takes weight decay.

    Attributes:
        given_start: α as `hold_at` has put it there; None for a start by `init`.
    """

    entry_axes = 1
    stack: tuple[int, ...] = ()
    """leading axes of all parameters, for several layers held as one"""

    def __init__(
        self,
        dim: int,
        entries: tuple[str, ...],
        start: tuple[int, ...],
        gate: Gate | None,
        gate_bias: bool = False,
        init: Literal["identity", "paper"] = "identity",
        train_base: bool = True,
        gates: Gates = "trained",
        gate_std: float = GATE_STD,
    ) -> None:
        super().__init__()
        self.entries, self.start, self.gate, self.init = entries, start, gate, init
        self.kind, self.gate_std = gates, gate_std
        self.given_start: Tensor | None = None
        self.entry_shape = (len(entries),) * self.entry_axes
        count = math.prod(self.entry_shape)
        base = torch.empty(*self.stack, *self.entry_shape)
        if train_base:
            self.base = nn.Parameter(base)
        else:
            self.register_buffer("base", base)
        self.gate_weight: Tensor | None
        self.gate_bias: Tensor | None
        self._add_gate("gate_weight", torch.empty(*self.stack, count, dim) if gate else None)
        self._add_gate("gate_bias", torch.empty(*self.stack, count) if gate and gate_bias else None)
        self.gate_zero = gate_at_zero(gate, count) if gate else 0.0
        self.reset_parameters()

    def _add_gate(self, name: str, value: Tensor | None) -> None:
        if self.kind == "frozen":
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, None if value is None else nn.Parameter(value))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Write the start that `init` names; only u is random, in the paper's start and where it is frozen."""
        if self.init == "identity":
            self.base.zero_()
            at: tuple[Any, ...] = (..., *self.start)
            self.base[at] = 1.0
        else:
            self.base.fill_(self.gate_zero if self.gate else 1 / math.prod(self.entry_shape))
        if self.gate_weight is not None:
            if self.init == "identity" and self.kind != "frozen":
                self.gate_weight.zero_()
            else:
                self.gate_weight.normal_(std=self.gate_std, generator=generator)
        if self.gate_bias is not None:
            self.gate_bias.zero_()

    @torch.no_grad()
    def hold_at(self, coefficients: Tensor) -> None:
        """Take these coefficients, (K,) or (K, K), for α and give up the gate: the mix is LA from here on.

        Raises:
            UserError: they are not of this mix's shape.
        """
        self.start_at(coefficients)
        self.gate = self.gate_weight = self.gate_bias = None

    @torch.no_grad()
    def start_at(self, coefficients: Tensor) -> None:
        """Take these coefficients, (K,) or (K, K), for α. Errors as in `hold_at`."""
        if coefficients.shape != self.base.shape:
            given, wanted = tuple(coefficients.shape), tuple(self.base.shape)
            raise UserError(
                f"coefficients of shape {given} are no start for a mix of shape {wanted}; match dictionaries"
            )
        self.base.copy_(coefficients)
        self.given_start = self.base.detach().clone()

    @torch.no_grad()
    def start_gates(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take these gates, u of gate_weight's shape and b of gate_bias's (None: 0), for a mix that has gates."""
        assert self.gate_weight is not None
        self.gate_weight.copy_(weight)
        if self.gate_bias is not None:
            self.gate_bias.zero_() if bias is None else self.gate_bias.copy_(bias)

    def gates(self, x: Tensor) -> Tensor | None:
        """g(u_kᵀ x + b_k) in float32 at least, (..., K) or (..., K, K) for pairs; None without a gate."""
        if self.gate is None:
            return None
        return gate_function(self._logits(x), self.gate, self.entry_axes)

    def _logits(self, x: Tensor) -> Tensor:
        """u_kᵀ x + b_k in float32 at least, whatever the autocast."""
        assert self.gate_weight is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.gate_weight.to(dtype)
        with without_autocast(x.device.type):
            if x.dtype == dtype or not torch.is_grad_enabled():
                logits = nn.functional.linear(x.to(dtype), weight)
            else:
                logits = _WideLinear.apply(x, weight)
            logits = logits if self.gate_bias is None else logits + self.gate_bias
        if self.kind == "shuffled":
            logits = logits.roll(1, 0)
        return logits if self.entry_axes == 1 else logits.unflatten(-1, self.entry_shape)

    def coefficients(self, x: Tensor) -> Tensor:
        """c(x) in float32 at least: x (..., d) -> (..., K), or (..., K, K) for pairs."""
        return self.forward(x).expand(*x.shape[:-1], *self.entry_shape)  # no call: hooks on the module look in here

    def forward(self, x: Tensor) -> Tensor:
        """As `coefficients`, but without the token axes where c does not depend on the token."""
        base = self.base.to(torch.promote_types(x.dtype, torch.float32))
        if self.gate is None:
            return base
        return self._gated(base, self._logits(x))

    def _gated(self, base: Tensor, logits: Tensor) -> Tensor:
        """base + g(logits) - g(0)."""
        assert self.gate is not None
        if torch.is_grad_enabled():
            return _GatedCoefficients.apply(base, logits, self.gate, self.gate_zero, self.entry_axes)
        return base + (gate_function(logits, self.gate, self.entry_axes) - self.gate_zero)

    def extra_repr(self) -> str:
        return f"{' + '.join(self.entries)}, gate={self.gate}, gates={self.kind}, init={self.init}"


class Mixing(MixCoefficients):
    """The coefficients (..., K) of the mix sum_k c_k(x) sigma_k(u) of one branch."""


class PairMixing(MixCoefficients):
    """The coefficients (..., K, K) of sum_kl c_kl(x) sigma_k(a) sigma_l(b); base (K, K), gate_weight (K², d)."""

    entry_axes = 2
