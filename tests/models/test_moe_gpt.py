"""The GPT with experts: what a token may depend on, the cache, its costs, compiled and checkpointed blocks."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.models.trunk import Cache
from moa_lightning.moe import MoEConfig
from moa_lightning.parallel import checkpoint_blocks
from moa_lightning.sampling import Sampling
from tests.models.nets import FFNS, PLACES, fragment, shake

VOCAB, CONTEXT = 13, 10
ROUTERS = {
    "dense": MoEConfig(),
    "top1": MoEConfig(4, 1),
    "top2-bias": MoEConfig(4, 2, shared_experts=1, balance="bias"),
    "top2-capacity": MoEConfig(4, 2, capacity_factor=0.7),
}
EXPERT_CHOICE = MoEConfig(4, router="expert_choice", capacity_factor=1.0, see_later_tokens=True)
every_ffn = pytest.mark.parametrize("ffn", [ffn for ffn in FFNS if ffn != "moa_shuffled_gates"])  # experts refuse it
every_router = pytest.mark.parametrize("router", ROUTERS)


def gpt(ffn: FFNConfig, moe: MoEConfig, kv_heads: int | None = None) -> GPT:
    return GPT(GPTConfig(2, 24, 2, kv_heads), ffn, VOCAB, CONTEXT, 0, moe)


def tokens(batch: int = 2, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def largest_change_before(net: GPT, position: int) -> float:
    """Of outputs before `position` when all tokens from there on change, in both sequences of a batch."""
    first = tokens()
    second = first.clone()
    second[:, position:] = (second[:, position:] + 1) % VOCAB
    with torch.no_grad():
        before, after = net(first), net(second)
    assert (before[:, position:] - after[:, position:]).abs().amax(-1).min() > 1e-4
    return float((before[:, :position] - after[:, :position]).abs().max())


def audit(net: GPT) -> float:
    """The same of the first sequence alone, for the rest of the batch may take places before it, over all positions."""
    first = tokens(1)
    worst = 0.0
    for position in range(1, CONTEXT):
        second = first.clone()
        second[:, position:] = (second[:, position:] + 1) % VOCAB
        with torch.no_grad():
            worst = max(worst, float((net(first) - net(second))[:, :position].abs().max()))
    return worst


@every_router
@every_ffn
def test_no_output_depends_on_a_later_token(ffn: str, router: str) -> None:
    net = shake(gpt(fragment(ffn), ROUTERS[router])).double()
    assert audit(net.train()) < 1e-12
    assert audit(net.eval()) < 1e-12
    assert largest_change_before(net, 6) < 1e-12


@every_router
@pytest.mark.parametrize("place", PLACES)
def test_nor_with_mixes_in_other_places(place: str, router: str) -> None:
    net = shake(gpt(fragment(place), ROUTERS[router])).double()
    size = float(net(tokens(1)).detach().abs().max())  # up to 3e5: a mix in the place of a norm bounds nothing
    assert audit(net.train()) < 1e-12 * size
    assert audit(net.eval()) < 1e-12 * size


@every_ffn
def test_expert_choice_fails_the_audit(ffn: str) -> None:
    net = shake(gpt(fragment(ffn), EXPERT_CHOICE)).double()
    assert audit(net) > 1e-4


def test_expert_choice_is_refused_unless_asked_for_by_name() -> None:
    with pytest.raises(UserError, match=r"moe\.see_later_tokens"):
        gpt(FFNConfig(), MoEConfig(4, router="expert_choice", capacity_factor=1.0))


@pytest.mark.parametrize("kv_heads", [None, 1])
@every_router
@every_ffn
def test_a_cache_changes_no_logit(ffn: str, router: str, kv_heads: int | None) -> None:
    """Read in pieces: several tokens at once, further ones, single ones."""
    net = shake(gpt(fragment(ffn), ROUTERS[router], kv_heads)).double().eval()
    text = tokens()
    with torch.no_grad():
        cache = net.new_cache()
        pieces = [net(piece, cache) for piece in text.split([3, 4, 1, 1, 1], dim=1)]
        assert cache.length == CONTEXT
        assert (torch.cat(pieces, dim=1) - net(text)).abs().max() < 1e-10


def test_experts_that_choose_read_the_whole_text_for_each_further_token() -> None:
    """One token alone would be taken by every expert. When the context is full, its newer half is read again."""
    net = shake(gpt(FFNConfig("moa"), EXPERT_CHOICE)).eval()
    text = tokens(1, 4)
    while text.shape[1] < CONTEXT:
        text = torch.cat([text, net(text).argmax(-1)[:, -1:]], dim=1)
    written = net.generate(tokens(1, 4), CONTEXT - 4, torch.Generator(), Sampling(temperature=0.0))
    assert torch.equal(written, text)
    assert net.generate(text, 3, torch.Generator()).shape == (1, CONTEXT + 3)
    cache = Cache(net.config.depth, CONTEXT)
    net(text[:, :3], cache)
    with pytest.raises(UserError, match="without a cache"):
        net(text[:, 3:4], cache)


def test_a_full_cache_is_refused() -> None:
    net = gpt(FFNConfig(), MoEConfig()).eval()
    cache = net.new_cache()
    net(tokens(), cache)
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        net(tokens(2, 1), cache)


@pytest.mark.parametrize("moe", [*ROUTERS.values(), EXPERT_CHOICE])
@pytest.mark.parametrize("kv_heads", [None, 1])
@every_ffn
def test_parameters_are_those_of_the_closed_form(ffn: str, kv_heads: int | None, moe: MoEConfig) -> None:
    for tied in (False, True):
        with torch.device("meta"):
            net = GPT(GPTConfig(2, 24, 2, kv_heads, tie_embeddings=tied), fragment(ffn), VOCAB, CONTEXT, 0, moe)
        count = sum(p.numel() for p in net.parameters())
        tables = (1 if tied else 2) * VOCAB * 24
        assert net.parameter_count() == count
        assert net.parameter_count(embeddings=False) == count - tables
        idle = 0
        if moe.experts:
            of_one = sum(p.numel() for block in net.blocks for p in block.mlp.experts.parameters()) // moe.experts
            met = moe.top_k if moe.router == "token_choice" else moe.capacity_factor
            idle = (moe.experts - met) * of_one
        assert net.parameter_count(active=True) == count - idle


@pytest.mark.parametrize("ffn", ["gelu", "la", "moa_gated_both"])
def test_flops_are_those_that_torch_counts(ffn: str) -> None:
    """torch counts the whole score matrix, ours half of it. Widths that a grouped product need not pad."""
    options = {"dictionary": ["identity", "gelu", "silu", "relu"], "multiple_of": 4}
    net = gpt(FFNConfig(**fragment(ffn).as_dict() | options), ROUTERS["top1"])
    known = {torch.ops.aten._grouped_mm: lambda a, b, *rest, out_shape=None, **options: 2 * a[0] * a[1] * b[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        net(tokens(1))
    assert net.flops_per_token() * CONTEXT == counter.get_total_flops() - 2 * (2 * 24 * CONTEXT**2)


@every_router
def test_gradient_reaches_every_parameter(router: str) -> None:
    net = shake(gpt(fragment("moa_gated_both"), ROUTERS[router]))
    loss = net(tokens(8)).logsumexp(-1).sum()
    if net.routing is not None:
        assert net.routing.load.shape == (2, 4)
        loss = loss + net.routing.z_loss.sum()
    loss.backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    plain, recomputed = (shake(gpt(fragment("moa"), ROUTERS["top2-bias"])) for _ in range(2))
    checkpoint_blocks(recomputed)
    for net in (plain, recomputed):
        (net(tokens()).logsumexp(-1).sum() + net.routing.z_loss.sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_start_depends_on_seed_and_name() -> None:
    first, second = gpt(fragment("moa"), ROUTERS["top2-bias"]), gpt(fragment("gelu"), ROUTERS["top2-bias"])
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    matrices = first.blocks[0].mlp.experts.up_proj.weight
    assert not torch.equal(matrices[0], matrices[1])
    assert matrices.std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert not first.blocks[0].mlp.experts.down_proj.weight.any()  # a block starts as the identity
    assert not torch.equal(first.blocks[0].mlp.router.weight, first.blocks[1].mlp.router.weight)


@pytest.mark.timeout(600)
def test_a_compiled_block_is_one_graph_and_returns_the_same() -> None:
    torch.compiler.reset()  # others have compiled this code too, and torch counts
    plain, compiled = (shake(gpt(FFNConfig("moa"), ROUTERS["top2-bias"])).blocks[0].mlp for _ in range(2))
    compiled.compile(fullgraph=True)
    x = torch.randn(2, CONTEXT, 24, generator=torch.Generator().manual_seed(0))
    for layer in (plain, compiled):
        y, routing = layer(x)
        (y.square().sum() + routing.z_loss).backward()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
