"""Other places for a mix: the gate on the output of attention, and a point-wise function in place of the norms.

    gate    y = W_o (attended ⊙ M(W_g x))       M = sigmoid, LA or MoA; x goes into attention, attended comes out of it
    norm    y = γ ⊙ M(a x) + β                  M = tanh, LA or MoA; a is one number, γ and β one a channel

The gate is elementwise, after the attention function and before the output projection, without a bias: the place and
form that Qiu et al. ("Gated Attention for Large Language Models", arXiv 2505.06708) found best. The norm is DyT (Zhu et
al., "Transformers without Normalization", arXiv 2503.10622). As there, it replaces every norm over the width of the
stream, the last one too, not those of queries and keys; a starts at 0.5, in language models as LANGUAGE_SCALES has it.
There it also takes a learned number behind the embedding, without which the stream starts too small for tanh to bend.
The paper starts it at sqrt(d), which at width 4096 makes embeddings of standard deviation 0.02 nearly unit ones; ours
start as unit ones at every width, because sqrt(d) learns far more slowly in narrow nets (docs/log.md). [O]

LA and MoA are those of mixing.py with ffn's dictionary, gate, init, base and controls. The identity start is the
sigmoid or tanh; where the dictionary lacks that, it is put in front. The gates of a mix read the layer's own x: for the
norm the stream as it comes, neither normalised nor scaled by a. Unlike tanh, a mix does not bound the stream: together
with ReLU² in the feed-forward layer it can run away (docs/places.md). [O]
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .feedforward import WEIGHT_STD, FFNConfig, MixedLayer, Place, as_projected, mix_parameter_count
from .kernels import mix

GATE_START, NORM_START = "sigmoid", "tanh"
SCALE = 0.5  # where a starts
# a by model width up to the number given, before attention and elsewhere: the paper's table for Llama, read second-hand
LANGUAGE_SCALES = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15)}
WIDEST_SCALES = (0.2, 0.05)  # beyond


def entries(dictionary: Iterable[str], start: str) -> tuple[str, ...]:
    """The activations that a mix in such a place has: the dictionary, with the one that it starts as."""
    names = tuple(dictionary)
    return names if start in names else (start, *names)


def start_of(name: str) -> str | None:
    """What the mix of that qualified name starts as; None in a feed-forward layer."""
    path, _, leaf = name.rpartition(".")
    if leaf != "mix":
        return None
    return GATE_START if path.endswith("output_gate") else NORM_START


def gate_config(ffn: FFNConfig) -> FFNConfig:
    """What the gate on attention computes."""
    return replace(_config(ffn, ffn.attention_gate, GATE_START), form="gated")


def norm_config(ffn: FFNConfig) -> FFNConfig:
    """What the point-wise norms compute."""
    return _config(ffn, ffn.pointwise_norm, NORM_START)


def _config(ffn: FFNConfig, mixing: Place, start: str) -> FFNConfig:
    return replace(
        ffn,
        mixing="fixed" if mixing == "none" else mixing,
        form="plain",
        branches="one",
        activation=start,
        dictionary=entries(ffn.dictionary, start),
        gates=ffn.gates if mixing == "moa" else "trained",
        start_from=ffn.start_from if mixing in ("la", "moa") else None,
        attention_gate="none",
        pointwise_norm="none",
    )


class OutputGate(MixedLayer):
    """attended ⊙ M(W_g x): x (..., d), attended (..., h) -> (..., h).

    Args:
        dim: width d of what attention reads.
        width: width h of what it puts out, all heads together.
        ffn: its attention_gate says which M.
    """

    def __init__(self, dim: int, width: int, ffn: FFNConfig) -> None:
        super().__init__()
        self.dim, self.config = dim, gate_config(ffn)
        self.gate_proj = nn.Linear(dim, width, bias=False)
        fixed = self.config.mixing == "fixed"
        self.mix = self._fixed_activation() if fixed else self._mixing(GATE_START)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights of standard deviation 0.02, the mix at its start."""
        nn.init.trunc_normal_(self.gate_proj.weight, std=WEIGHT_STD, generator=generator)
        for mixing in self.mixings().values():
            mixing.reset_parameters(generator)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = as_projected(x)
        u = self.gate_proj(x)
        if self.config.mixing == "fixed":
            return self.mix(u, x) * attended
        return mix(u, self.mix(x), self.config.dictionary, attended.to(u.dtype), kernel=self.config.kernel)


class Scale(nn.Module):
    """w x with one learned number w."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(1))  # one axis: FSDP2 cannot shard a parameter without any
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(self.start)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class PointwiseNorm(MixedLayer):
    """γ ⊙ M(a x) + β: x (..., d) -> (..., d).

    Args:
        dim: width d.
        ffn: its pointwise_norm says which M.
        scale: where a starts.

    Attributes:
        weight: γ (d,), ones at the start. bias: β (d,), zeros. scale: a.
    """

    def __init__(self, dim: int, ffn: FFNConfig, scale: float = SCALE) -> None:
        super().__init__()
        self.dim, self.config = dim, norm_config(ffn)
        self.scale = Scale(scale)
        fixed = self.config.mixing == "fixed"
        self.mix = self._fixed_activation() if fixed else self._mixing(NORM_START)
        self.weight, self.bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """γ = 1, β = 0, a and the mix at their start."""
        self.weight.fill_(1.0)
        self.bias.zero_()
        self.scale.reset_parameters()
        for mixing in self.mixings().values():
            mixing.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        u = self.scale(x)
        if self.config.mixing == "fixed":
            return self.weight * self.mix(u, x) + self.bias
        mixed = mix(u, self.mix(x), self.config.dictionary, kernel=self.config.kernel)
        return self.weight * mixed + self.bias


def language_norm(dim: int, ffn: FFNConfig, before_attention: bool = False) -> nn.Module:
    """A norm of a language model: RMSNorm, or what ffn says takes its place."""
    if ffn.pointwise_norm == "none":
        return nn.RMSNorm(dim)
    widths = list(LANGUAGE_SCALES)
    place = bisect_left(widths, dim)
    attention, other = LANGUAGE_SCALES[widths[place]] if place < len(widths) else WIDEST_SCALES
    return PointwiseNorm(dim, ffn, attention if before_attention else other)


def gate_parameter_count(dim: int, width: int, ffn: FFNConfig) -> int:
    """Trainable parameters that the gate adds to one attention, in closed form."""
    return 0 if ffn.attention_gate == "none" else dim * width + _of_mix(dim, gate_config(ffn))


def norm_parameter_count(dim: int, ffn: FFNConfig) -> int:
    """Trainable parameters of one norm of a language model, in closed form: d of RMSNorm, or 2 d + 1 and the mix's."""
    return dim if ffn.pointwise_norm == "none" else 2 * dim + 1 + _of_mix(dim, norm_config(ffn))


def _of_mix(dim: int, config: FFNConfig) -> int:
    return 0 if config.mixing == "fixed" else mix_parameter_count(dim, config)


def gate_flops_per_token(dim: int, width: int, ffn: FFNConfig) -> int:
    """Matrix-product FLOPs that the gate adds to one attention, forward, for one token."""
    return 0 if ffn.attention_gate == "none" else 2 * dim * width + _mix_flops(dim, gate_config(ffn))


def norm_flops_per_token(dim: int, ffn: FFNConfig) -> int:
    """Matrix-product FLOPs of one norm, forward, for one token: those of MoA's gates."""
    return 0 if ffn.pointwise_norm == "none" else _mix_flops(dim, norm_config(ffn))


def _mix_flops(dim: int, config: FFNConfig) -> int:
    return 2 * config.entries * dim if config.mixing == "moa" else 0
