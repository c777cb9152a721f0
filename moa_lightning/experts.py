"""Several FeedForwards of one config held as one: parameters stacked along a first axis, products computed in groups.

Expert e is a FeedForward with the values [e] of every parameter, gates and coefficients of a mix included: in a
mixture-of-experts model each expert mixes activations for itself. No Python loop runs over the experts. Their input
comes in one of two layouts:

    packed   x (R, d), rows sorted by expert, with Rows that says whose they are: grouped matrix products
    slots    x (E, C, d), the same number of rows for each expert: batched matrix products

torch's grouped product takes float32, bfloat16 and float16, and rows whose length is a multiple of 16 bytes, so
narrower matrices are padded for it. Its backward pass needs a contiguous gradient. On CUDA only bfloat16 has a kernel
(torch 2.11 to 2.15, aten/src/ATen/native/cuda/GroupedBlas.cpp): for other types torch waits for the sizes of the groups
and multiplies them one after another. Gates of mixes are always float32, and few, so there they are made by one product
with those of all experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import without_autocast
from .errors import UserError
from .feedforward import FeedForward, FFNConfig
from .mixing import FixedActivation, MixCoefficients, Mixing, PairMixing, gate_function

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes


class Rows(NamedTuple):
    """Whose the rows of a packed input are."""

    expert: Tensor
    """int64 (R,), ascending"""
    ends: Tensor
    """int32 (E,): the row after each expert's last one"""


def grouped_linear(x: Tensor, weight: Tensor, rows: Rows | None) -> Tensor:
    """x_r weight_e(r)ᵀ: packed x (R, in) or, without rows, slots x (E, C, in); weight (E, out, in) in x's dtype."""
    if rows is None:
        return torch.bmm(x, weight.mT)
    unit, outputs = ALIGNMENT // x.element_size(), weight.shape[1]
    spare_in, spare_out = -x.shape[1] % unit, -outputs % unit
    if spare_in or spare_out:
        x, weight = F.pad(x, (0, spare_in)), F.pad(weight, (0, spare_in, 0, spare_out))
    return F.grouped_mm(x, weight.mT, offs=rows.ends)[:, :outputs]


def own_of_every_linear(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """What grouped_linear returns for packed x, by the products with all experts' weights: for few outputs."""
    products = F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])  # (R, E, out)
    own = rows.expert[:, None] == torch.arange(len(weight), device=x.device)
    return products.masked_fill(~own[..., None], 0.0).sum(1)


def _of_rows(parameter: Tensor, rows: Rows | None) -> Tensor:
    """A stacked parameter (E, ...) for each row: (R, ...) packed, (E, 1, ...) to broadcast over slots."""
    return parameter[:, None] if rows is None else parameter[rows.expert]


class StackedLinear(nn.Module):
    """E linear layers: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        y = grouped_linear(x, self.weight.to(x.dtype), rows)
        return y if self.bias is None else y + _of_rows(self.bias.to(x.dtype), rows)

    def extra_repr(self) -> str:
        experts, outputs, inputs = self.weight.shape
        return f"experts={experts}, in_features={inputs}, out_features={outputs}, bias={self.bias is not None}"


class StackedActivation(FixedActivation):
    """The fixed activation of E layers; its parameters, where it has any, have the experts on their first axis."""

    def __init__(self, experts: int, name: str) -> None:
        super().__init__(name)
        if self.activation is not None:
            for leaf, parameter in list(self.activation.named_parameters(recurse=False)):
                setattr(self.activation, leaf, nn.Parameter(parameter.detach().expand(experts, -1).clone()))

    def forward(self, u: Tensor, x: Tensor, rows: Rows | None = None) -> Tensor:
        if self.activation is None:
            return super().forward(u, x)
        return self.activation.curve(u, *(_of_rows(p, rows) for p in self.activation.parameters(recurse=False)))


class StackedMixing(MixCoefficients):
    """The coefficients of E mixes: base (E, K), gate_weight (E, K, d), gate_bias (E, K); K x K for K in pairs."""

    def __init__(self, experts: int, *arguments: Any) -> None:
        self.stack = (experts,)
        super().__init__(*arguments)
        if self.kind == "shuffled":
            raise UserError("ffn.gates 'shuffled' moves gates between samples, whose places experts do not keep")

    def gates(self, x: Tensor, rows: Rows | None = None) -> Tensor | None:
        """g(u_kᵀ x + b_k) of each row's own expert."""
        return None if self.gate is None else gate_function(self._logits(x, rows), self.gate, self.entry_axes)

    def _logits(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        assert self.gate_weight is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            x, weight = x.to(dtype), self.gate_weight.to(dtype)
            if rows is not None and x.is_cuda:
                logits = own_of_every_linear(x, weight, rows)
            else:
                logits = grouped_linear(x, weight, rows)
            if self.gate_bias is not None:
                logits = logits + _of_rows(self.gate_bias, rows)
        return logits.unflatten(-1, self.entry_shape)

    def coefficients(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """c(x) of each row's own expert, in float32 at least: (..., K), or (..., K, K) for pairs."""
        return self.forward(x, rows)

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        base = _of_rows(self.base.to(torch.promote_types(x.dtype, torch.float32)), rows)
        if self.gate is None:
            return base.expand(*x.shape[:-1], *self.entry_shape)
        return self._gated(base, self._logits(x, rows))


class StackedMix(StackedMixing, Mixing):
    """Of one branch."""


class StackedPairMix(StackedMixing, PairMixing):
    """Of the products of two branches' entries."""


class Experts(FeedForward):
    """E FeedForwards of one config and width: packed x (R, d) with their Rows, or slots x (E, C, d) alone.

    The state has FeedForward's names; every tensor has the experts on its first axis.
    """

    def __init__(self, experts: int, dim: int, config: FFNConfig) -> None:
        self.experts = experts
        super().__init__(dim, config)

    def _linear(self, inputs: int, outputs: int) -> Any:
        return StackedLinear(self.experts, inputs, outputs, self.config.bias)

    def _fixed_activation(self) -> FixedActivation:
        return StackedActivation(self.experts, self.config.activation)

    def _mixing(self, start: str) -> Any:
        return StackedMix(self.experts, *self._mixing_arguments(start))

    def _pair_mixing(self) -> Any:
        return StackedPairMix(self.experts, *self._mixing_arguments(self.config.activation, "identity"))

    def parameter_count(self) -> int:
        """Of all experts."""
        return self.experts * super().parameter_count()

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"
