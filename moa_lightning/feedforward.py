"""The feed-forward layer with a swappable activation: one config, one module, closed-form costs.

    plain   y = W_down M(W_up x)                               M = sigma, LA or MoA           [P] Type-I
    gated   y = W_down (M(W_gate x) ⊙ W_up x)                  branches: one                  [P] Type-II
            y = W_down (M(W_gate x) ⊙ M'(W_up x))              branches: both, "bi-MoA"       [S]
            y = W_down sum_kl c_kl sigma_k(W_gate x) ⊙ sigma_l(W_up x)    branches: pairs     [S]

after arXiv 2605.26647 ([P] its abstract, [S] second-hand readings, [O] our choice; see mixing.py for the coefficients).
GELU, ReLU², SwiGLU, GEGLU, PolyNorm and xIELU layers are configurations of this module, not modules of their own.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .activations import DICTIONARY, MODULE_COST, activation_names, is_pointwise, pointwise
from .autocast import autocast_on
from .errors import UserError
from .kernels import KERNELS, Kernel, mix, mix_pairs
from .mixing import GATE_STD, FixedActivation, Gate, Gates, Mixing, PairMixing

WEIGHT_STD = 0.02  # trunk weights of a layer that is built on its own; nets with their own rule overwrite it

_CHOICES: dict[str, tuple[str, ...]] = {
    "mixing": ("fixed", "la", "moa"),
    "form": ("plain", "gated"),
    "branches": ("one", "both", "pairs"),
    "gate": ("sigmoid", "softmax", "tanh"),
    "init": ("identity", "paper"),
    "base": ("trained", "held"),
    "gates": ("trained", "frozen", "shuffled"),
    "match": ("width", "parameters", "flops"),
    "attention_gate": ("none", "fixed", "la", "moa"),
    "pointwise_norm": ("none", "fixed", "la", "moa"),
    "kernel": KERNELS,
}
Place = Literal["none", "fixed", "la", "moa"]


@dataclass(frozen=True)
class FFNConfig:
    """What a feed-forward layer computes. Frozen, of plain values: it can be hashed, saved and merged."""

    mixing: Literal["fixed", "la", "moa"] = "fixed"
    """fixed activation, one learned mix (LA), or a mix gated per token (MoA)"""
    form: Literal["plain", "gated"] = "plain"
    """two projections, or three with a product in the middle"""
    activation: str = "gelu"
    """the fixed activation; for LA and MoA the entry that the identity start selects"""
    dictionary: tuple[str, ...] = DICTIONARY
    """pointwise activations that LA and MoA mix"""
    branches: Literal["one", "both", "pairs"] = "one"
    """gated form: mix the gate branch, both branches, or all products of entries"""
    gate: Gate = "sigmoid"
    """function of the gate logits (MoA)"""
    gate_bias: bool = False
    """a bias on the gate logits (MoA); the paper shows none [S]"""
    init: Literal["identity", "paper"] = "identity"
    """start as the fixed activation, or as the paper writes it: c = g(Ux) with small random U, LA at 1/K"""
    base: Literal["trained", "held"] = "trained"
    """train α or hold it where it starts; the paper's MoA holds it"""
    gates: Gates = "trained"
    """controls for MoA: gates frozen at random, or shuffled between the samples of a batch (see mixing.py)"""
    gate_std: float = GATE_STD
    """standard deviation of U where it starts at random: the paper's start, frozen gates"""
    start_from: str | None = None
    """a run whose mixes these start from, by name or by their place in the transformer. Its folder, or its mixing.json:
    LA's α starts at the mean coefficients. Its folder, or its checkpoint: MoA's α and, at equal width, gates start as
    they are there"""
    hidden_ratio: float = 4.0
    """hidden width of the baseline layer, a plain fixed one, in units of the model width; a layer that is swapped into
    a net has the replaced layer as its baseline instead"""
    match: Literal["width", "parameters", "flops"] = "width"
    """what this layer has in common with that baseline: its hidden width, its parameters or its FLOPs"""
    multiple_of: int = 1
    """a matched hidden width is rounded to the nearest multiple of this; 64 and more suit accelerators"""
    hidden_extra: int = 0
    """hidden neurons more than that: MoA's extra parameters spent on width instead"""
    bias: bool = True
    """biases in the projections; a layer that is swapped into a net follows the replaced one"""

    attention_gate: Place = "none"
    """a gate on the output of attention: none, a sigmoid of W_g x, or LA or MoA in its place (see places.py)"""
    pointwise_norm: Place = "none"
    """what takes the place of the norms: none, a tanh of a x (DyT), or LA or MoA in its place (see places.py)"""

    kernel: Kernel = "auto"
    """what computes a learned mix: the fastest implementation that works here, or one by name (see kernels)"""

    def __post_init__(self) -> None:
        if isinstance(self.dictionary, str):
            raise UserError(f"ffn.dictionary is '{self.dictionary}'; give a list of activations, [{self.dictionary}]")
        object.__setattr__(self, "dictionary", tuple(self.dictionary))
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(f"ffn.{field} is '{getattr(self, field)}'; choose from {', '.join(allowed)}")
        for field in ("gate_bias", "bias"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"ffn.{field} is '{getattr(self, field)}'; give true or false")
        if self.activation not in activation_names():
            known = ", ".join(activation_names())
            raise UserError(f"ffn.activation '{self.activation}' is unknown; known: {known}")
        if self.learned:
            self._check_dictionary()
        if self.mixing != "fixed" and self.init == "identity":
            self._check_start()
        if self.form == "plain" and self.branches != "one":
            raise UserError(f"ffn.branches '{self.branches}' needs ffn.form 'gated': the plain form has one branch")
        if not 0 < self.hidden_ratio < math.inf:
            raise UserError(f"ffn.hidden_ratio is {self.hidden_ratio}; give a finite number above 0")
        if self.hidden_extra < 0:
            raise UserError(f"ffn.hidden_extra is {self.hidden_extra}; give a whole number of at least 0")
        if not 0 < self.gate_std < math.inf:
            raise UserError(f"ffn.gate_std is {self.gate_std}; give a finite number above 0")
        if self.gates != "trained" and "moa" not in self.learned:
            raise UserError(f"ffn.gates '{self.gates}' needs ffn.mixing 'moa': {self.mixing} has no gates")
        if self.start_from is not None and not self.learned:
            raise UserError("ffn.start_from sets the coefficients of LA and MoA; ffn.mixing is 'fixed'")
        if self.multiple_of < 1:
            raise UserError(f"ffn.multiple_of is {self.multiple_of}; give a whole number of at least 1")

    def _check_dictionary(self) -> None:
        if not self.dictionary or len(set(self.dictionary)) != len(self.dictionary):
            given = ", ".join(self.dictionary) or "empty"
            raise UserError(f"ffn.dictionary is {given}; name at least one activation and none of them twice")
        for name in self.dictionary:
            try:
                pointwise(name)
            except UserError as error:
                raise UserError(f"ffn.dictionary: {error}") from None

    def _check_start(self) -> None:
        for name in [self.activation] + (["identity"] if self.branches != "one" else []):
            if name not in self.dictionary:
                raise UserError(
                    f"the identity start needs '{name}' in ffn.dictionary, which has {', '.join(self.dictionary)}; "
                    "add it or set ffn.init to 'paper'"
                )

    @property
    def learned(self) -> set[Place]:
        """Kinds of learned mixes, "la" and "moa", in the feed-forward layer and the other places."""
        return {self.mixing, self.attention_gate, self.pointwise_norm} & {"la", "moa"}

    @property
    def gated(self) -> bool:
        return self.form == "gated"

    @property
    def mixed_branches(self) -> int:
        """Branches with learned coefficients of their own (pairs counts as one)."""
        return 0 if self.mixing == "fixed" else 2 if self.branches == "both" else 1

    @property
    def entries(self) -> int:
        """Coefficients per mix: K, K² for pairs, 0 for the fixed form."""
        if self.mixing == "fixed":
            return 0
        return len(self.dictionary) ** (2 if self.branches == "pairs" else 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and YAML."""
        return {**asdict(self), "dictionary": list(self.dictionary)}


def parameter_count(dim: int, hidden_dim: int, config: FFNConfig) -> int:
    """Trainable parameters of FeedForward(dim, config, hidden_dim), in closed form (without a norm inside)."""
    ins = 2 if config.gated else 1
    count = (ins + 1) * dim * hidden_dim
    if config.bias:
        count += ins * hidden_dim + dim
    if config.mixing == "fixed":
        return count + {"polynorm": 4, "xielu": 2}.get(config.activation, 0)
    return count + config.mixed_branches * mix_parameter_count(dim, config)


def mix_parameter_count(dim: int, config: FFNConfig) -> int:
    """Trainable parameters of one mix: α, and the gates where there are such."""
    count = config.entries if config.base == "trained" else 0
    if config.mixing == "moa" and config.gates != "frozen":
        count += config.entries * (dim + config.gate_bias)
    return count


def flops_per_token(dim: int, hidden_dim: int, config: FFNConfig) -> int:
    """Matrix-product FLOPs of one forward pass for one token; a multiply-add counts as two. Backward takes twice that.

    Elementwise work is not in it: see elementwise_per_token.
    """
    flops = 2 * (3 if config.gated else 2) * dim * hidden_dim
    if config.mixing == "moa":
        flops += 2 * config.mixed_branches * config.entries * dim
    return flops


def elementwise_per_token(hidden_dim: int, config: FFNConfig) -> float:
    """Elementwise operations of one forward pass for one token, by the activations' costs: each entry is evaluated
    once per branch that reads it and joined by a multiply-add; gated forms add the product."""
    product = hidden_dim if config.gated else 0
    if config.mixing == "fixed":
        cost = pointwise(config.activation).cost if is_pointwise(config.activation) else MODULE_COST
        return cost * hidden_dim + product
    evaluate = sum(pointwise(name).cost for name in config.dictionary) * hidden_dim
    branches = 1 if config.branches == "one" else 2
    join = 2 * config.entries * hidden_dim * config.mixed_branches
    return branches * evaluate + join + (product if config.branches != "pairs" else 0)


def matched_hidden_dim(
    dim: int,
    config: FFNConfig,
    baseline_hidden_dim: int,
    by: Literal["width", "parameters", "flops"],
    baseline: FFNConfig | None = None,
) -> int:
    """The hidden width at which `config` has the width, parameters or FLOPs of a baseline layer.

    Args:
        dim: model width d.
        baseline_hidden_dim: the baseline's hidden width.
        baseline: None for the plain fixed layer with `config.bias`.

    Returns:
        The nearest multiple of config.multiple_of, at least one multiple; config.hidden_extra comes on top.
    """
    if by == "width":
        return baseline_hidden_dim + config.hidden_extra
    baseline = baseline or FFNConfig(bias=config.bias)
    cost = parameter_count if by == "parameters" else flops_per_token
    target = cost(dim, baseline_hidden_dim, baseline)
    fixed_part, slope = cost(dim, 0, config), cost(dim, 1, config) - cost(dim, 0, config)
    multiple = config.multiple_of
    return max(multiple, round((target - fixed_part) / slope / multiple) * multiple) + config.hidden_extra


class MixedLayer(nn.Module):
    """A layer whose nonlinearity is fixed or a mix, as its config says: what looks for mixes in a net asks for these.

    Attributes:
        dim: width d of the x that gates read.
        config: what it computes.
    """

    dim: int
    config: FFNConfig
    mix_names: tuple[str, ...] = ("mix",)
    """attributes that may hold mixes"""

    def mixings(self) -> dict[str, Mixing | PairMixing]:
        """The learned mixes by attribute name; empty for the fixed form."""
        named = {name: getattr(self, name) for name in self.mix_names}
        return {name: m for name, m in named.items() if m is not None and not isinstance(m, FixedActivation)}

    def _fixed_activation(self) -> FixedActivation:
        return FixedActivation(self.config.activation)

    def _mixing(self, start: str) -> Mixing:
        return Mixing(*self._mixing_arguments(start))

    def _mixing_arguments(self, *start: str) -> tuple[Any, ...]:
        config = self.config
        where = tuple(config.dictionary.index(name) if config.init == "identity" else 0 for name in start)
        gate = config.gate if config.mixing == "moa" else None
        learns = (config.init, config.base == "trained", config.gates, config.gate_std)
        return (self.dim, config.dictionary, where, gate, config.gate_bias, *learns)


def as_projected(x: Tensor) -> Tensor:
    """x in the dtype in which autocast multiplies it: projections and gates keep this one for the backward pass."""
    device = x.device.type
    if x.dtype == torch.float32 and autocast_on(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class FeedForward(MixedLayer):
    """A feed-forward layer as its config says; x (..., d) -> (..., d).

    Args:
        dim: model width d.
        config: what it computes.
        hidden_dim: hidden width h; None resolves config.hidden_ratio and config.match.
        norm: module applied to the hidden vector before the down projection (EVA-02 has one); None for none.
        dropout: rate applied to the hidden vector and to the output, or one rate for each.

    Attributes:
        up_proj, gate_proj (gated only), down_proj: nn.Linear.
        up_mix (plain; gated with both), gate_mix (gated: one, both), pair_mix (pairs): their `coefficients(x)` are
            (..., K), or (..., K, K) for pairs.
    """

    mix_names = ("up_mix", "gate_mix", "pair_mix")

    def __init__(
        self,
        dim: int,
        config: FFNConfig,
        hidden_dim: int | None = None,
        norm: nn.Module | None = None,
        dropout: float | tuple[float, float] = 0.0,
    ) -> None:
        super().__init__()
        if hidden_dim is None:
            hidden_dim = matched_hidden_dim(dim, config, round(config.hidden_ratio * dim), config.match)
            if hidden_dim < 1:
                raise UserError(f"the hidden width is {hidden_dim} at model width {dim}; raise ffn.hidden_ratio")
        elif hidden_dim < 1:
            raise UserError(f"hidden_dim is {hidden_dim}; give a whole number of at least 1")
        self.dim, self.hidden_dim, self.config = dim, hidden_dim, config
        self.up_proj = self._linear(dim, hidden_dim)
        self.gate_proj = self._linear(dim, hidden_dim) if config.gated else None
        self.down_proj = self._linear(hidden_dim, dim)
        self.norm = norm
        hidden_rate, output_rate = dropout if isinstance(dropout, tuple) else (dropout, dropout)
        self.hidden_drop = nn.Dropout(hidden_rate) if hidden_rate else None
        self.drop = nn.Dropout(output_rate) if output_rate else None
        self.up_mix: FixedActivation | Mixing | None = None
        self.gate_mix: FixedActivation | Mixing | None = None
        self.pair_mix: PairMixing | None = None
        self._add_mixes()
        self.reset_parameters()

    def _add_mixes(self) -> None:
        config = self.config
        fixed = config.mixing == "fixed"
        if not config.gated:
            self.up_mix = self._fixed_activation() if fixed else self._mixing(config.activation)
        elif fixed:
            self.gate_mix = self._fixed_activation()
        elif config.branches == "pairs":
            self.pair_mix = self._pair_mixing()
        else:
            self.gate_mix = self._mixing(config.activation)
            if config.branches == "both":
                self.up_mix = self._mixing("identity")

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=self.config.bias)

    def _pair_mixing(self) -> PairMixing:
        return PairMixing(*self._mixing_arguments(self.config.activation, "identity"))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights of standard deviation 0.02, zero biases, mixes at their start."""
        for projection in self.projections():
            nn.init.trunc_normal_(projection.weight, std=WEIGHT_STD, generator=generator)
            if projection.bias is not None:
                projection.bias.zero_()
        for mixing in self.mixings().values():
            mixing.reset_parameters(generator)
        for branch in (self.up_mix, self.gate_mix):
            if isinstance(branch, FixedActivation):
                branch.reset_parameters()

    def projections(self) -> list[nn.Linear]:
        return [p for p in (self.up_proj, self.gate_proj, self.down_proj) if p is not None]

    def forward(self, x: Tensor, *rows: Any) -> Tensor:
        """x (..., d) -> (..., d). `rows`, for the parts: which expert each row of x belongs to, in moe.Experts."""
        hidden = self._hidden(x, *rows)  # (..., h)
        if self.hidden_drop is not None:
            hidden = self.hidden_drop(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        y = self.down_proj(hidden, *rows)
        return self.drop(y) if self.drop is not None else y

    def _hidden(self, x: Tensor, *rows: Any) -> Tensor:
        x = as_projected(x)
        up = self.up_proj(x, *rows)
        gate = None if self.gate_proj is None else self.gate_proj(x, *rows)
        if self.config.mixing == "fixed":
            return self._fixed(up, gate, x, *rows)
        names, kernel = self.config.dictionary, self.config.kernel
        if self.pair_mix is not None:
            assert gate is not None
            return mix_pairs(gate, up, self.pair_mix(x, *rows), names, kernel)
        coefficients = None if self.up_mix is None else self.up_mix(x, *rows)
        if gate is None:
            assert coefficients is not None
            return mix(up, coefficients, names, kernel=kernel)
        assert self.gate_mix is not None
        return mix(gate, self.gate_mix(x, *rows), names, up, coefficients, kernel)

    def _fixed(self, up: Tensor, gate: Tensor | None, x: Tensor, *rows: Any) -> Tensor:
        if gate is None:
            assert self.up_mix is not None
            return self.up_mix(up, x, *rows)
        assert self.gate_mix is not None
        return self.gate_mix(gate, x, *rows) * up

    def parameter_count(self) -> int:
        """Trainable parameters in closed form, a norm inside not counted."""
        return parameter_count(self.dim, self.hidden_dim, self.config)

    def flops_per_token(self) -> int:
        """Forward matrix-product FLOPs for one token."""
        return flops_per_token(self.dim, self.hidden_dim, self.config)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}, mixing={self.config.mixing}, form={self.config.form}"
