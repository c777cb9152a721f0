"""A mixture of experts: a router sends each token to a few of many feed-forward layers and adds up what they return.

    token choice    p = softmax(W x); a token goes to the k experts of largest p (+ b, see below)
                    y = sum over them of w_e FFN_e(x),  w = p / sum of the chosen p  (k = 1: w = p)
    expert choice   each expert takes the tokens of largest p_e in a sequence, of equals the first; w = p

Token choice: Shazeer et al., arXiv 1701.06538; Lepikhin et al. (GShard), 2006.16668; Fedus et al. (Switch), 2101.03961.
With k = 1 the weight stays p, or the router had no gradient from the loss. Expert choice: Zhou et al., 2202.09368; who
is taken depends on the tokens that follow, so a causal model refuses it unless MoEConfig.see_later_tokens says so.
Shared experts, which every token passes: DeepSeekMoE, 2401.06066. Balance by a loss (Switch, equation 4) or by a bias
that only chooses and that the load moves, not a gradient (Wang et al., 2408.15664). Router z-loss: ST-MoE, 2202.08906.

The router computes in float32. Without a capacity no token is dropped: rows are sorted by expert for grouped products.
A capacity makes slots, the same number for each expert, filled in the order of the tokens (a GShard-like order, first
choices first, would let a later token take the place of an earlier one). It holds in training only, so that an
evaluated token does not depend on its neighbours. Of token choice, dispatch and combination are gathers both ways, no
atomic additions; expert choice adds up what its experts return by index, on CUDA in any order.

Sequences of different lengths may be padded. Padding takes no place: capacities follow from the real tokens (of each
sequence for expert choice, of the batch for token choice), which come first, and only real tokens are counted. So what
a real token gets is what it would get without padding.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .autocast import without_autocast
from .errors import UserError
from .experts import GROUPED_DTYPES, Experts, Rows
from .feedforward import FeedForward, FFNConfig, flops_per_token, matched_hidden_dim, parameter_count

RouterKind = Literal["token_choice", "expert_choice"]
Balance = Literal["loss", "bias", "none"]
ROUTER_STD = 0.02  # of the router's weights at the start


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of each block's feed-forward layer; every one is a FeedForward as model.ffn says."""

    experts: int = 0
    """experts of a block; 0: one feed-forward layer, no router"""
    top_k: int = 2
    """experts that a token goes to (token choice)"""
    shared_experts: int = 0
    """experts that every token passes: one feed-forward layer of so many times an expert's hidden width"""
    router: RouterKind = "token_choice"
    """whether tokens choose experts or experts choose tokens"""
    see_later_tokens: bool = False
    """allow expert choice in a causal model, where it lets a token's output depend on later tokens"""
    capacity_factor: float | None = None
    """places of all experts over assignments, in training: what does not fit is dropped; none: nothing is. For expert
    choice the mean number of experts of a token, always needed"""
    balance: Balance = "loss"
    """what keeps the load of token choice even: a loss, a bias on the choice that follows the load, or nothing"""
    balance_loss_weight: float = 0.01
    """of the balance loss, a mean over the blocks"""
    balance_bias_rate: float = 0.001
    """step of the bias in an optimiser step"""
    z_loss_weight: float = 0.001
    """of the router z-loss, a mean over the blocks"""

    def __post_init__(self) -> None:
        for name, allowed in (("router", get_args(RouterKind)), ("balance", get_args(Balance))):
            if getattr(self, name) not in allowed:
                raise UserError(f"moe.{name} is '{getattr(self, name)}'; choose from {', '.join(allowed)}")
        for name in ("experts", "shared_experts", "balance_loss_weight", "balance_bias_rate", "z_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"moe.{name} is {getattr(self, name)} but must be a finite number of at least 0")
        for name in ("experts", "shared_experts", "top_k"):
            if getattr(self, name) % 1 != 0:  # inf and NaN too
                raise UserError(f"moe.{name} is {getattr(self, name)}; give a whole number")
        if self.experts and self.router == "token_choice" and not 1 <= self.top_k <= self.experts:
            raise UserError(f"moe.top_k is {self.top_k}; give a number from 1 to moe.experts, which is {self.experts}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(f"moe.capacity_factor is {self.capacity_factor}; give a finite number above 0, or null")
        if self.router == "expert_choice" and self.capacity_factor is None:
            raise UserError(
                "moe.router 'expert_choice' needs moe.capacity_factor, the mean number of experts of a token"
            )

    @property
    def chooses_from_sequences(self) -> bool:
        """Whether experts choose tokens, so that outputs depend on a whole sequence."""
        return bool(self.experts) and self.router == "expert_choice"

    @property
    def balances_by_bias(self) -> bool:
        return self.router == "token_choice" and self.balance == "bias"

    @property
    def balances_by_loss(self) -> bool:
        return self.router == "token_choice" and self.balance == "loss"


class Routing(NamedTuple):
    """What a router did with the tokens of one forward pass on this process, dropped assignments included and padding
    left out."""

    load: Tensor
    """tokens assigned to each expert, int64 (E,)"""
    probability: Tensor
    """mean of p over the tokens, float32 (E,), with gradient"""
    z_loss: Tensor
    """mean squared logsumexp of the logits, with gradient"""
    entropy: Tensor
    """mean entropy of p over log E: 1 is a router that has not decided, 0 one that is certain"""
    dropped: Tensor
    """share of assignments without a place; for expert choice, of tokens that no expert took"""


class Router(nn.Module):
    """Logits W x in float32 at least: x (N, d) -> (N, E). Its bias (balance: bias) only takes part in choosing."""

    bias: Tensor | None

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, dim))
        self.register_buffer("bias", torch.empty(config.experts) if config.balances_by_bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation 0.02, no preference among the experts."""
        self.weight.normal_(std=ROUTER_STD, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype))

    @torch.no_grad()
    def follow(self, load: Tensor, rate: float) -> None:
        """Raise the bias of experts with less than the mean load (E,), lower that of those with more."""
        assert self.bias is not None
        load = load.to(self.bias.dtype)
        self.bias += rate * torch.sign(load.mean() - load)


class _Take(torch.autograd.Function):
    """x[index] over rows, with zeros where index is len(x); backward the sum of g[places] (len(x), m), likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.holes = holes
        return _take(x, index, holes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        gathered = _take(g, places.flatten(), ctx.holes)
        return gathered.unflatten(0, places.shape).sum(1), None, None, None


def _take(x: Tensor, index: Tensor, holes: bool) -> Tensor:
    if not holes:
        return x[index]
    return torch.where((index < x.shape[0])[:, None], x[index.clamp(max=x.shape[0] - 1)], 0.0)


class _Dispatch(NamedTuple):
    """Where assignments go: assignment a = token · k + choice, and row r of the experts' input."""

    source: Tensor
    """the assignment in each row, (R,); N · k in an empty one"""
    place: Tensor
    """the row of each assignment, (N · k,); R for a dropped one"""
    rows: Rows | None
    """None: the rows are slots, R = E · C"""


class MoE(nn.Module):
    """Experts behind a router: x (..., T, d) -> y of that shape, and what the router did.

    Args:
        dim: model width d.
        ffn: what each expert computes.
        config: experts and router.

    Attributes:
        router: Router. experts: Experts. shared: FeedForward, or None.
    """

    def __init__(self, dim: int, ffn: FFNConfig, config: MoEConfig) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.router = Router(dim, config)
        self.experts = Experts(config.experts, dim, ffn)
        width = config.shared_experts * self.experts.hidden_dim
        self.shared = FeedForward(dim, ffn, width) if width else None

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`real`, bool (..., T), is False for padding, whose y means nothing; None: there is none."""
        tokens = x.flatten(0, -2)  # (N, d)
        real = None if real is None else real.flatten()
        logits = self.router(tokens)
        probabilities = logits.softmax(-1)  # (N, E)
        if self.config.router == "expert_choice":
            y, load, dropped = self._experts_choose(tokens, probabilities, x.shape[-2], real)
        else:
            y, load, dropped = self._tokens_choose(tokens, probabilities, real)
        y = y.view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        with torch.no_grad():
            entropy = _mean(torch.special.entr(probabilities).sum(-1), real) / math.log(max(2, self.config.experts))
        z_loss = _mean(logits.logsumexp(-1).square(), real)
        return y, Routing(load, _mean(probabilities, real), z_loss, entropy, dropped)

    def _tokens_choose(self, x: Tensor, probabilities: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, d), real (N,) -> y (N, d), load (E,), dropped ()."""
        top_k, bias = self.config.top_k, self.router.bias
        scores = probabilities if bias is None else probabilities + bias
        chosen = scores.detach().topk(top_k, dim=-1).indices  # (N, k)
        weights = probabilities.gather(-1, chosen)
        if top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        counted = None if real is None else real.repeat_interleave(top_k)
        rank = chosen.flatten() if counted is None else 2 * chosen.flatten() + ~counted
        order = rank.argsort(stable=True)  # by expert, padding last, then by token
        expert = chosen.flatten()[order]
        ends = torch.searchsorted(expert, torch.arange(self.config.experts, device=x.device), right=True)
        rows = ends.diff(prepend=ends.new_zeros(1))
        load = (
            rows if counted is None else torch.zeros_like(rows).index_add(0, chosen.flatten(), counted.to(rows.dtype))
        )
        capacity = self._capacity(x, rows)
        if capacity is None:
            plan = _Dispatch(order, order.argsort(), Rows(expert, ends.to(torch.int32)))
        else:
            plan = _slots(order, expert, ends - rows, capacity, self._filled(load, real))
        y = self._through_experts(x, plan, top_k)  # (N, k, d)
        if plan.rows is None:
            dropped = _mean((plan.place == len(plan.source)).float(), counted)
        else:
            dropped = torch.zeros((), device=x.device)
        return (y * weights.to(y.dtype)[..., None]).sum(1), load, dropped

    def _filled(self, load: Tensor, real: Tensor | None) -> Tensor | None:
        """Slots of each expert (E,) that may be filled where padding must not, in training; None: all."""
        if real is None or not self.training or self.config.capacity_factor is None:
            return None
        own = self.config.capacity_factor * real.sum().double() * self.config.top_k / self.config.experts
        return torch.minimum(load, own.ceil().to(load.dtype))

    def _capacity(self, x: Tensor, load: Tensor) -> int | None:
        """Slots of an expert, None for rows without slots."""
        factor = self.config.capacity_factor
        if self.training and factor is not None:
            return math.ceil(factor * x.shape[0] * self.config.top_k / self.config.experts)
        if x.dtype in GROUPED_DTYPES:
            return None
        return int(load.max())  # float64 has no grouped product; this waits for the device

    def _through_experts(self, x: Tensor, plan: _Dispatch, top_k: int) -> Tensor:
        holes = plan.rows is None
        rows = _Take.apply(x, plan.source // top_k, plan.place.view(-1, top_k), holes)
        if plan.rows is None:
            y = self.experts(rows.unflatten(0, (self.config.experts, -1))).flatten(0, 1)
        else:
            y = self.experts(rows, plan.rows)
        return _Take.apply(y, plan.place, plan.source[:, None], holes).unflatten(0, (-1, top_k))

    def _experts_choose(
        self, x: Tensor, probabilities: Tensor, length: int, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As above; each expert takes as many tokens as every other from a sequence, in proportion to its real ones."""
        assert self.config.capacity_factor is not None
        experts = self.config.experts
        places = min(length, math.ceil(self.config.capacity_factor * length / experts))
        by_sequence = probabilities.unflatten(0, (-1, length)).transpose(0, 2)  # (E, T, B)
        if real is not None:
            by_sequence = by_sequence.masked_fill(~real.view(-1, length).T, -1.0)  # below any probability
        # topk would choose among equals (at the start all tokens of an id) by the shape of the batch
        ranked, order = by_sequence.sort(dim=1, descending=True, stable=True)
        weights, taken = ranked[:, :places], order[:, :places]  # (E, C, B), best first
        index = (taken + length * torch.arange(taken.shape[-1], device=x.device)).flatten()
        load = torch.full((experts,), places * taken.shape[-1], device=x.device)
        seen = torch.zeros(x.shape[0], device=x.device)
        if real is None:
            seen = seen.index_fill(0, index, 1.0)
        else:
            lengths = real.view(-1, length).sum(1)
            own = (self.config.capacity_factor * lengths.double() / experts).ceil().to(lengths.dtype).clamp(max=lengths)
            used = torch.arange(places, device=x.device)[:, None] < own  # (C, B)
            weights, load = torch.where(used, weights, 0.0), own.sum().expand(experts)
            seen = seen.index_add(0, index, used.expand_as(taken).flatten().to(seen.dtype)).clamp(max=1.0)
        y = self.experts(x[index].unflatten(0, (experts, -1))).flatten(0, 1)
        total = torch.zeros_like(x, dtype=y.dtype).index_add(0, index, y * weights.flatten()[:, None].to(y.dtype))
        return total, load, 1 - _mean(seen, real)

    def parameter_count(self) -> int:
        """Trainable parameters in closed form."""
        return moe_parameter_count(self.dim, self.experts.config, self.config)

    def flops_per_token(self) -> int:
        """Forward matrix-product FLOPs for one token, none dropped."""
        return moe_flops_per_token(self.dim, self.experts.config, self.config)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of the values (N, ...) over the first axis, of those that `counted`, bool (N,), names."""
    if counted is None:
        return values.mean(0)
    return (values.movedim(0, -1) * counted).sum(-1) / counted.sum()


def _slots(order: Tensor, expert: Tensor, starts: Tensor, capacity: int, filled: Tensor | None) -> _Dispatch:
    """The first `capacity` assignments of each expert, in `order`, which sorts them by expert, or fewer where `filled`
    (E,) says so; starts (E,)."""
    count, size = len(order), len(starts) * capacity
    position = torch.arange(count, device=order.device) - starts[expert]
    slot = torch.where(position < (capacity if filled is None else filled[expert]), expert * capacity + position, size)
    place = torch.empty_like(order).scatter(0, order, slot)
    source = torch.full((size + 1,), count, device=order.device).scatter(0, slot, order)
    return _Dispatch(source[:size], place, None)


def balance_loss(load: Tensor, probability: Tensor) -> Tensor:
    """E · sum_e f_e P_e: f the share of assignments that expert e got, P its mean probability; 1 where both are even.

    Args:
        load: (..., E), over all processes.
        probability: (..., E), of this process; its gradient, averaged over processes, is that of the whole batch.

    Returns:
        (...).
    """
    share = load / load.sum(-1, keepdim=True)
    return load.shape[-1] * (share.to(probability.dtype) * probability).sum(-1)


def _widths(dim: int, ffn: FFNConfig, config: MoEConfig) -> tuple[int, int]:
    """Hidden width of an expert, and of the shared ones together."""
    hidden = matched_hidden_dim(dim, ffn, round(ffn.hidden_ratio * dim), ffn.match)
    return hidden, config.shared_experts * hidden


def moe_parameter_count(dim: int, ffn: FFNConfig, config: MoEConfig, active: bool = False) -> int:
    """Trainable parameters of MoE(dim, ffn, config), or those of them that a token meets (for expert choice: on
    average); the whole router always counts."""
    hidden, shared = _widths(dim, ffn, config)
    count = _experts_of_a_token(config) if active else config.experts
    return round(
        config.experts * dim
        + count * parameter_count(dim, hidden, ffn)
        + (parameter_count(dim, shared, ffn) if shared else 0)
    )


def moe_flops_per_token(dim: int, ffn: FFNConfig, config: MoEConfig) -> int:
    """Forward matrix-product FLOPs of MoE(dim, ffn, config) for one token, none dropped."""
    hidden, shared = _widths(dim, ffn, config)
    return round(
        2 * config.experts * dim
        + _experts_of_a_token(config) * flops_per_token(dim, hidden, ffn)
        + (flops_per_token(dim, shared, ffn) if shared else 0)
    )


def _experts_of_a_token(config: MoEConfig) -> float:
    if config.router == "token_choice":
        return config.top_k
    assert config.capacity_factor is not None
    return min(config.capacity_factor, config.experts)
