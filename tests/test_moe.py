"""The mixture of experts against a loop over tokens and experts in float64, its losses against their formulas, its
balance, its counts."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moa_lightning import FeedForward, FFNConfig, UserError
from moa_lightning.experts import Experts, Rows, grouped_linear, own_of_every_linear
from moa_lightning.moe import MoE, MoEConfig, Routing, balance_loss
from tests.layers import randomise

DIM, BATCH, LENGTH = 10, 3, 7  # rows of 40 bytes: not the 16 that a grouped product wants
FFNS = {
    "gelu": FFNConfig(),
    "swiglu": FFNConfig("fixed", "gated", "silu", bias=False),
    "polynorm": FFNConfig(activation="polynorm"),
    "xielu": FFNConfig("fixed", "gated", "xielu"),
    "la": FFNConfig("la"),
    "la-pairs": FFNConfig("la", "gated", branches="pairs"),
    "moa": FFNConfig("moa", gate_bias=True),
    "moa-held": FFNConfig("moa", base="held", gate="tanh"),
    "moa-both": FFNConfig("moa", "gated", branches="both", bias=False),
    "moa-pairs": FFNConfig("moa", "gated", branches="pairs", gate="softmax"),
}
ROUTERS = {
    "top1": MoEConfig(5, 1),
    "top2": MoEConfig(5, 2),
    "top2-shared": MoEConfig(4, 2, shared_experts=2),
    "top3-bias": MoEConfig(5, 3, balance="bias"),
    "top2-capacity": MoEConfig(4, 2, capacity_factor=0.6),
    "top1-roomy": MoEConfig(4, 1, capacity_factor=4.0),
    "experts-choose": MoEConfig(4, router="expert_choice", capacity_factor=1.5, shared_experts=1),
}


def layer(ffn: str, router: str, dtype: torch.dtype = torch.float64) -> MoE:
    made = MoE(DIM, FFNS[ffn], ROUTERS[router]).to(dtype)
    randomise(made)
    return made


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def expert(moe: MoE, index: int) -> Callable[[Tensor], Tensor]:
    """A FeedForward whose parameters are views of one expert's."""
    single = FeedForward(DIM, moe.experts.config).to(moe.router.weight.dtype)
    stacked = dict(moe.experts.named_parameters()) | dict(moe.experts.named_buffers())
    own = {name: stacked[name][index] for name, _ in (*single.named_parameters(), *single.named_buffers())}
    return lambda x: torch.func.functional_call(single, own, (x,))


def assignments(moe: MoE, p: Tensor) -> list[tuple[int, int, Tensor]]:
    """(token, expert, weight), computed one token, or one expert and sequence, at a time."""
    config, count = moe.config, moe.config.experts
    if config.router == "expert_choice":
        places = math.ceil(config.capacity_factor * LENGTH / count)
        found = []
        for e, b in itertools.product(range(count), range(BATCH)):
            best = sorted(range(b * LENGTH, (b + 1) * LENGTH), key=lambda n: -p[n, e].item())[:places]
            found += [(n, e, p[n, e]) for n in best]
        return found
    capacity = math.inf
    if config.capacity_factor is not None and moe.training:
        capacity = math.ceil(config.capacity_factor * len(p) * config.top_k / count)
    taken, found = [0] * count, []
    for n in range(len(p)):
        scores = p[n] if moe.router.bias is None else p[n] + moe.router.bias
        best = sorted(range(count), key=lambda e: -scores[e].item())[: config.top_k]
        total = sum(p[n, e] for e in best) if config.top_k > 1 else 1.0
        for e in best:
            taken[e] += 1
            if taken[e] <= capacity:
                found.append((n, e, p[n, e] / total))
    return found


def reference(moe: MoE, x: Tensor) -> Tensor:
    flat = x.flatten(0, -2)
    p = (flat @ moe.router.weight.T).softmax(-1)
    y = [torch.zeros(DIM, dtype=x.dtype) for _ in flat]
    for n, e, weight in assignments(moe, p):
        y[n] = y[n] + weight * expert(moe, e)(flat[n : n + 1])[0]
    out = torch.stack(y).view_as(x)
    return out if moe.shared is None else out + moe.shared(x)


def gradients(moe: MoE, x: Tensor, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    found = torch.autograd.grad(call(x), (x, *parameters), dy.to(x.dtype), allow_unused=True)
    zero = (torch.zeros_like(t) if g is None else g for g, t in zip(found, (x, *parameters), strict=True))
    return dict(zip(("x", *names), zero, strict=True))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("ffn", FFNS)
def test_any_routing_equals_a_loop_over_tokens(ffn: str, router: str) -> None:
    moe, x = layer(ffn, router), tokens()
    torch.testing.assert_close(moe(x)[0], reference(moe, x), rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(moe, x, lambda x: moe(x)[0]), gradients(moe, x, lambda x: reference(moe, x))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("router", ["top1", "top2-shared", "top3-bias"])
@pytest.mark.parametrize("ffn", FFNS)
def test_grouped_products_equal_the_loop(ffn: str, router: str) -> None:
    """float32 takes torch's grouped product, float64 batched slots: two ways to one result."""
    wide, x = layer(ffn, router), tokens()
    narrow = layer(ffn, router, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    y = narrow(x.float())[0]
    assert (y - wide(x)[0]).norm() < 1e-5 * y.norm()
    ours, theirs = gradients(narrow, x.float(), lambda x: narrow(x)[0]), gradients(wide, x, lambda x: wide(x)[0])
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() < 2e-5 * theirs[name].norm() + 1e-6, name


class Calls(TorchDispatchMode):
    """Counts operations, those of the backward pass too."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("ffn", FFNS)
def test_more_experts_are_not_more_operations(ffn: str, router: str, dtype: torch.dtype) -> None:
    counts = []
    for experts in (4, 32):
        chosen = {"top_k": 2} if router == "token_choice" else {"router": router, "capacity_factor": 1.5}
        moe, x = MoE(16, FFNS[ffn], MoEConfig(experts, **chosen)).to(dtype), torch.randn(2, 40, 16, dtype=dtype)
        with Calls() as calls:
            moe(x)[0].sum().backward()
        counts.append(calls.number)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ffn", FFNS)
def test_one_expert_is_the_dense_layer(ffn: str, dtype: torch.dtype) -> None:
    for config in (MoEConfig(1, 1), MoEConfig(1, router="expert_choice", capacity_factor=1.0)):
        moe = MoE(DIM, FFNS[ffn], config).to(dtype)
        randomise(moe)
        dense, x = FeedForward(DIM, FFNS[ffn]).to(dtype), tokens(dtype)
        dense.load_state_dict({name: value[0] for name, value in moe.experts.state_dict().items()})
        assert (moe(x)[0] - dense(x)).norm() < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * dense(x).norm()


def test_bfloat16_is_computed_under_autocast_and_the_router_is_not() -> None:
    moe, x = layer("moa-both", "top2", torch.float32), tokens(torch.float32)
    exact = moe(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
        assert moe.router(x.flatten(0, 1)).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(routing.probability, moe(x)[1].probability)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_without_tokens_get_a_zero_gradient(dtype: torch.dtype) -> None:
    moe, x = layer("moa", "top1", dtype), tokens(dtype).abs()
    with torch.no_grad():
        moe.router.weight.fill_(-1.0)
        moe.router.weight[2] = 1.0  # the tokens are positive: all go to expert 2
    y, routing = moe(x)
    assert routing.load.tolist() == [0, 0, BATCH * LENGTH, 0, 0]
    y.square().sum().backward()
    for name, parameter in moe.experts.named_parameters():
        alone = parameter.grad.clone()
        assert alone[2].abs().sum() > 0, name
        alone[2] = 0
        assert not alone.any(), name


def test_what_is_dropped_is_counted_and_returns_zero() -> None:
    moe, x = layer("gelu", "top1"), tokens().abs()
    moe.config = MoEConfig(5, 1, capacity_factor=1.0)
    with torch.no_grad():
        moe.router.weight.fill_(-1.0)
        moe.router.weight[2] = 1.0
    places = math.ceil(BATCH * LENGTH / 5)
    y, routing = moe(x)
    assert routing.dropped.item() == pytest.approx(1 - places / (BATCH * LENGTH))
    assert (y.flatten(0, 1)[:places].abs().sum(-1) > 0).all()
    assert not y.flatten(0, 1)[places:].any()
    y, routing = moe.eval()(x)  # evaluation drops nothing
    assert routing.dropped.item() == 0
    assert (y.abs().sum(-1) > 0).all()


def test_tokens_that_no_expert_takes_are_counted() -> None:
    moe, x = layer("gelu", "experts-choose"), tokens()
    moe.config = MoEConfig(4, router="expert_choice", capacity_factor=0.5)
    y, routing = moe(x)
    untouched = (y - moe.shared(x)).flatten(0, 1).abs().amax(-1) < 1e-12
    assert 0 < routing.dropped.item() == pytest.approx(untouched.double().mean().item())
    assert routing.load.tolist() == [BATCH * math.ceil(0.5 * LENGTH / 4)] * 4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_takes_no_place_and_is_not_counted(router: str, training: bool) -> None:
    """Sequences of 7, 3 and 5 real tokens give what they give in a row (a capacity is that of all their tokens), or one
    by one where experts choose in each."""
    moe, x = layer("moa", router).train(training), tokens()
    real = torch.arange(LENGTH) < torch.tensor([7, 3, 5])[:, None]
    y, routing = moe(x, real)
    if moe.config.router == "token_choice":
        expected, plain = moe(x[real][None])
        for found, wanted in zip(routing, plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        expected = expected[0]
    else:
        parts = [moe(row[None, keep]) for row, keep in zip(x, real, strict=True)]
        expected = torch.cat([part[0] for part, _ in parts])
        assert torch.equal(routing.load, sum(part.load for _, part in parts))
        for name in ("probability", "z_loss", "entropy", "dropped"):
            means = [getattr(part, name) * n for (_, part), n in zip(parts, (7, 3, 5), strict=True)]
            torch.testing.assert_close(getattr(routing, name).double(), sum(means).double() / 15, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(y[real], expected, rtol=1e-10, atol=1e-10)


def test_of_tokens_that_it_likes_equally_an_expert_takes_the_first() -> None:
    """As at the start of training, where all tokens of an id are equal; padding must not change who is taken."""
    moe, generator = layer("gelu", "experts-choose"), torch.Generator().manual_seed(3)
    x = tokens()[0, :2][torch.randint(0, 2, (1, 64), generator=generator)]  # two vectors over and over
    real = torch.arange(104)[None] < 64
    y, padded = moe(x)[0], moe(torch.cat([x, x[:, :40]], dim=1), real)[0]
    torch.testing.assert_close(padded[:, :64], y, rtol=1e-10, atol=1e-10)
    alike = (y[0, :, None] - y[0, None]).abs().amax(-1) < 1e-12
    first, last = int((~alike[0] & (x[0] == x[0, 0]).all(-1)).nonzero()[0]), int(alike[0].nonzero()[-1])
    assert first > last  # of the tokens that equal the first one, those that are served stand before the others


def test_losses_are_their_formulas() -> None:
    moe, x = layer("gelu", "top2"), tokens()
    _, routing = moe(x)
    logits = x.flatten(0, 1) @ moe.router.weight.T
    p = logits.softmax(-1)
    load = [0] * 5
    for row in p:
        for e in sorted(range(5), key=lambda e: -row[e].item())[:2]:
            load[e] += 1
    assert routing.load.tolist() == load
    share = torch.tensor(load, dtype=torch.float64) / (2 * BATCH * LENGTH)
    expected = 5 * sum(share[e] * p[:, e].mean() for e in range(5))
    assert balance_loss(routing.load, routing.probability).item() == pytest.approx(expected.item(), rel=1e-6)
    assert routing.z_loss.item() == pytest.approx((logits.exp().sum(-1).log() ** 2).mean().item())
    entropy = -(p * p.log()).sum(-1).mean() / math.log(5)
    assert routing.entropy.item() == pytest.approx(entropy.item())


def test_an_even_load_has_balance_loss_one_and_a_collapsed_one_more() -> None:
    even = balance_loss(torch.full((2, 4), 3), torch.full((2, 4), 0.25))
    assert even.tolist() == [1.0, 1.0]
    assert balance_loss(torch.tensor([8, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])).item() == 4


def test_the_gradient_of_the_balance_loss_moves_tokens_away_from_the_fullest_expert() -> None:
    moe, x = layer("gelu", "top1"), tokens()
    _, routing = moe(x)
    balance_loss(routing.load, routing.probability).backward()
    with torch.no_grad():
        moe.router.weight -= 0.05 * moe.router.weight.grad
    fullest = routing.load.argmax()
    assert moe(x)[1].probability[fullest] < routing.probability[fullest]


def test_the_bias_follows_the_load_and_leaves_the_weights_alone() -> None:
    moe, x = (
        layer("gelu", "top3-bias", torch.float32),
        torch.randn(300, DIM, generator=torch.Generator().manual_seed(1)),
    )
    moe.router.bias.zero_()
    first = moe(x)[1].load
    moe.router.follow(first, 0.25)
    mean = first.float().mean()
    assert moe.router.bias.tolist() == [0.25 * float(torch.sign(mean - count)) for count in first]
    for _ in range(300):
        load = moe(x)[1].load
        moe.router.follow(load, 0.002)
    assert load.max() - load.min() < (first.max() - first.min()) / 4
    scores = (x @ moe.router.weight.T).softmax(-1)
    chosen = (scores + moe.router.bias).topk(3).indices
    weights = scores.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)  # the bias has no part in them
    each = torch.stack([expert(moe, index)(x) for index in range(5)], dim=1)  # (N, E, d)
    expected = (each.gather(1, chosen[..., None].expand(-1, -1, DIM)) * weights[..., None]).sum(1)
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert "bias" in moe.router.state_dict()  # what a run resumes from
    assert "bias" not in dict(moe.router.named_parameters())


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("router", ROUTERS)
def test_parameters_are_those_of_the_closed_form(ffn: str, router: str) -> None:
    with torch.device("meta"):
        moe = MoE(DIM, FFNS[ffn], ROUTERS[router])
    assert moe.parameter_count() == sum(p.numel() for p in moe.parameters())


def counted(moe: MoE, x: Tensor) -> int:
    """torch's counter does not know grouped products: a row of x meets one matrix (in, out)."""
    known = {torch.ops.aten._grouped_mm: lambda a, b, *rest, out_shape=None, **options: 2 * a[0] * a[1] * b[-1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        moe(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("ffn", ["gelu", "la", "moa-both", "moa-pairs"])
@pytest.mark.parametrize("router", ["top1", "top2", "top2-shared"])
def test_flops_are_those_that_torch_counts(ffn: str, router: str) -> None:
    config = FFNConfig(**FFNS[ffn].as_dict() | {"dictionary": ("identity", "gelu", "silu", "relu")})  # nothing to pad
    moe, x = MoE(16, config, ROUTERS[router]), torch.randn(6, 16)
    assert moe.flops_per_token() * 6 == counted(moe, x)


def test_rows_of_a_packed_input_see_their_own_expert_only() -> None:
    experts = Experts(3, DIM, FFNS["moa"])
    randomise(experts)
    x = torch.randn(5, DIM)
    rows = Rows(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([2, 2, 5], dtype=torch.int32))
    y = experts(x, rows)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[1].fill_(torch.nan)
    assert torch.equal(experts(x, rows), y)


def test_the_own_of_all_products_are_the_grouped_ones() -> None:
    """What gates are computed by on CUDA; one expert has no rows."""
    rows = Rows(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([2, 2, 5], dtype=torch.int32))
    found = []
    for product in (grouped_linear, own_of_every_linear):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((5, DIM), (3, 7, DIM)))
        y = product(x, weight, rows)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, weight.grad))
    for grouped, own in zip(*found, strict=True):
        torch.testing.assert_close(own, grouped)


def test_a_checkpointed_layer_returns_the_same() -> None:
    moe, x = layer("moa-both", "top2", torch.float32), tokens(torch.float32)
    y, routing = moe(x)
    again, other = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
    assert torch.equal(y, again)
    assert isinstance(other, Routing)
    assert torch.equal(routing.load, other.load)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"experts": 4, "top_k": 5}, "moe.top_k is 5"),
        ({"experts": 4, "top_k": 0}, "moe.top_k is 0"),
        ({"experts": -1}, "moe.experts is -1"),
        ({"experts": 2.5}, "moe.experts is 2.5; give a whole number"),
        ({"top_k": float("inf")}, "moe.top_k is inf"),
        ({"experts": 4, "router": "hash"}, "moe.router is 'hash'"),
        ({"experts": 4, "balance": "luck"}, "moe.balance is 'luck'"),
        ({"experts": 4, "capacity_factor": 0.0}, "moe.capacity_factor is 0.0"),
        ({"experts": 4, "router": "expert_choice"}, "needs moe.capacity_factor"),
        ({"experts": 4, "capacity_factor": math.nan}, "moe.capacity_factor is nan"),
        ({"experts": 4, "capacity_factor": math.inf}, "moe.capacity_factor is inf"),
        ({"experts": 4, "shared_experts": -1}, "moe.shared_experts is -1"),
        ({"experts": 4, "balance_loss_weight": -0.1}, "moe.balance_loss_weight is -0.1"),
        ({"experts": 4, "balance_bias_rate": math.inf}, "moe.balance_bias_rate is inf"),
        ({"experts": 4, "z_loss_weight": math.nan}, "moe.z_loss_weight is nan"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        MoEConfig(**options)
