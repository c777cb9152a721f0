"""The GPT: what a token may depend on, attention by its formula, costs, starts and samples."""

import numpy as np
import pytest
import torch

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.models.trunk import Attention, rotary_table, rotate
from moa_lightning.sampling import Sampling
from tests.models.nets import FFNS, PLACES, assert_same_where_shapes_agree, counted_flops, fragment, shake, start

SIZE = GPTConfig(depth=2, dim=24, num_heads=2)
VOCAB, CONTEXT = 13, 10
every_ffn = pytest.mark.parametrize("ffn", [*FFNS, *PLACES])


def gpt(ffn: FFNConfig = FFNConfig(), size: GPTConfig = SIZE, seed: int = 0, context: int = CONTEXT) -> GPT:  # noqa: B008
    return GPT(size, ffn, VOCAB, context, seed)


def tokens(batch: int = 2, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@every_ffn
def test_no_output_depends_on_a_later_token(ffn: str) -> None:
    net, first = shake(gpt(fragment(ffn))), tokens()
    second = first.clone()
    second[:, 6:] = (second[:, 6:] + 1) % VOCAB
    with torch.no_grad():
        before, after = net(first), net(second)
    assert torch.allclose(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3  # and every later one does see a change


@pytest.mark.parametrize("shape", [(0, CONTEXT), (2, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    assert gpt(FFNConfig("moa"))(torch.zeros(shape, dtype=torch.long)).shape == (*shape, VOCAB)


def test_every_output_depends_on_every_earlier_token() -> None:
    net = shake(gpt(FFNConfig("moa"))).double()
    embedded = torch.zeros(1, CONTEXT, SIZE.dim, dtype=torch.float64, requires_grad=True)
    net.embed.register_forward_hook(lambda module, inputs, output: output + embedded)
    for position, logits in enumerate(net(tokens(1))[0]):
        (gradient,) = torch.autograd.grad(logits.square().sum(), embedded, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert reached.tolist() == [other <= position for other in range(CONTEXT)]


@every_ffn
def test_gradient_reaches_every_parameter(ffn: str) -> None:
    net = shake(gpt(fragment(ffn)))
    net(tokens()).logsumexp(-1).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def rotated_pairs(x: np.ndarray, theta: float) -> np.ndarray:
    """(T, head_dim) with each pair (n, n + head_dim/2) of row t as a complex number, turned by t·theta^(-2n/d)."""
    half = x.shape[1] // 2
    angles = np.outer(np.arange(len(x)), theta ** (-2 * np.arange(half) / x.shape[1]))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float64).eps) * weight


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_the_formula(kv_heads: int, qk_norm: bool) -> None:
    """One head, one row of scores at a time, in NumPy and float64."""
    config = GPTConfig(dim=24, num_heads=4, num_kv_heads=kv_heads, qk_norm=qk_norm, rope_theta=100.0)
    attention = shake(Attention(config)).double()
    x = torch.randn(CONTEXT, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = {name: value.numpy() for name, value in attention.state_dict().items()}
    q, k, v = np.split(x.numpy() @ weights["qkv.weight"].T, [24, 24 + 6 * kv_heads], axis=1)
    heads = []
    for head in range(4):
        group = head * kv_heads // 4
        query, key, value = (a[:, i * 6 : i * 6 + 6] for a, i in ((q, head), (k, group), (v, group)))
        if qk_norm:
            query, key = rms(query, weights["q_norm.weight"]), rms(key, weights["k_norm.weight"])
        query, key = rotated_pairs(query, 100.0), rotated_pairs(key, 100.0)
        out = np.zeros((CONTEXT, 6))
        for t in range(CONTEXT):
            scores = np.exp(key[: t + 1] @ query[t] / np.sqrt(6))
            out[t] = scores @ value[: t + 1] / scores.sum()
        heads.append(out)
    expected = np.concatenate(heads, axis=1) @ weights["proj.weight"].T
    cos, sin = rotary_table(CONTEXT, 6, 100.0)
    ours = attention(x[None], cos, sin)[0].detach().numpy()
    assert np.linalg.norm(ours - expected) < 1e-6 * np.linalg.norm(expected)  # the table of angles is float32


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = (table.double() for table in rotary_table(200, 16, 10_000.0))

    def score(i: int, j: int) -> float:
        return float((rotate(q, cos[i], sin[i]) * rotate(k, cos[j], sin[j])).sum())

    for i, j in ((5, 2), (90, 87), (199, 196)):
        assert score(i, j) == pytest.approx(score(3, 0), abs=1e-5)
        assert abs(score(i, j) - score(j, i)) > 1e-3  # order matters
    assert score(0, 0) == pytest.approx(float((q * k).sum()))
    assert torch.allclose(rotate(q, cos[7], sin[7]).norm(), q.norm())


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped = shake(Attention(GPTConfig(dim=24, num_heads=4, num_kv_heads=2))).double()
    full = Attention(GPTConfig(dim=24, num_heads=4)).double()
    q, k, v = grouped.qkv.weight.split([24, 12, 12])
    k, v = (part.unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
    full.load_state_dict({**grouped.state_dict(), "qkv.weight": torch.cat([q, k, v])})
    x = torch.randn(2, CONTEXT, 24, dtype=torch.float64)
    table = rotary_table(CONTEXT, 6, 10_000.0)
    assert torch.allclose(grouped(x, *table), full(x, *table), rtol=1e-12, atol=1e-12)


def test_tied_embeddings_are_one_parameter() -> None:
    tied = gpt(size=GPTConfig(depth=1, dim=24, num_heads=2, tie_embeddings=True))
    free = gpt(size=GPTConfig(depth=1, dim=24, num_heads=2))
    assert tied.head.weight is tied.embed.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == VOCAB * 24
    other = gpt(size=tied.config, seed=5)
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(tokens()), tied(tokens()))


def test_a_new_gpt_predicts_almost_uniformly() -> None:
    probabilities = gpt()(tokens()).softmax(-1)
    assert (probabilities - 1 / VOCAB).abs().max() < 0.5 / VOCAB


@every_ffn
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_flops_are_those_that_torch_counts(ffn: str, kv_heads: int | None) -> None:
    """torch counts the whole score matrix; ours takes causal attention by half."""
    net = gpt(fragment(ffn), GPTConfig(depth=2, dim=24, num_heads=2, num_kv_heads=kv_heads))
    upper_half = 2 * (2 * 24 * CONTEXT**2)  # blocks x (scores and values)
    counted = counted_flops(lambda: net(tokens(batch=1)))
    assert net.flops_per_token() * CONTEXT == counted - upper_half


@every_ffn
def test_variants_start_from_the_same_numbers(ffn: str) -> None:
    trunk = {"embed.weight", "head.weight", "blocks.1.attn.qkv.weight", "blocks.0.norm2.weight"}
    assert_same_where_shapes_agree(gpt(fragment("gelu")), gpt(fragment(ffn)), trunk)
    if fragment(ffn).form == "plain" and not fragment(ffn).hidden_extra:
        assert_same_where_shapes_agree(gpt(fragment("gelu")), gpt(fragment(ffn)), {"blocks.1.mlp.up_proj.weight"})


def test_the_start_depends_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = start(gpt(FFNConfig("moa", init="paper")))
    torch.manual_seed(2)
    second, other = start(gpt(FFNConfig("moa", init="paper"))), start(gpt(FFNConfig("moa", init="paper"), seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("embed.weight", "head.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.up_mix.gate_weight"):
        assert not torch.equal(first[name], other[name]), name


def test_no_two_matrices_start_alike() -> None:
    net = gpt()
    assert not torch.equal(net.blocks[0].attn.qkv.weight, net.blocks[1].attn.qkv.weight)
    assert net.blocks[0].attn.qkv.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert net.embed.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_each_block_starts_as_the_identity() -> None:
    net = gpt()
    assert torch.equal(net(tokens()), net.head(net.norm(net.embed(tokens()))))


def test_samples_depend_on_the_generator_alone() -> None:
    net = shake(gpt(), scale=0.2)

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed + 77)  # the global generator has no say
        return net.generate(tokens(1, 3), 20, torch.Generator().manual_seed(seed))[0].tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert sample(0)[:3] == tokens(1, 3)[0].tolist()
    assert len(sample(0)) == 23  # longer than the context


def test_a_cold_sample_is_the_likeliest_continuation() -> None:
    net, text = shake(gpt()), tokens(1, 3)
    assert torch.allclose(net(text, last=2), net(text)[:, -2:])
    drawn = net.generate(text, 5, torch.Generator().manual_seed(0), Sampling(1e-4))
    for _ in range(5):
        text = torch.cat([text, net(text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(drawn, text)


def test_tables_of_angles_are_not_saved() -> None:
    """So a checkpoint does not depend on the context length."""
    short, long = shake(gpt(context=CONTEXT)), gpt(context=2 * CONTEXT)
    long.load_state_dict(short.state_dict())
    assert torch.allclose(short(tokens()), long(tokens()))


def test_an_input_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        gpt()(tokens(1, CONTEXT + 1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 30, "num_heads": 4}, "gpt.dim 30"),
        ({"dim": 20, "num_heads": 4}, "gpt.dim 20"),  # heads of width 5 have no pairs to rotate
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3"),
        ({"num_kv_heads": 0}, "gpt.num_kv_heads is 0"),
        ({"num_kv_heads": -1}, "gpt.num_kv_heads is -1"),
        ({"num_kv_heads": -2}, "gpt.num_kv_heads is -2"),
        ({"rope_theta": 0.0}, "gpt.rope_theta is 0.0"),
        ({"rope_theta": -1.0}, "gpt.rope_theta is -1.0"),
        ({"rope_theta": float("inf")}, "gpt.rope_theta is inf"),
        ({"rope_theta": float("nan")}, "gpt.rope_theta is nan"),
        ({"num_heads": 0}, "gpt.num_heads is 0"),
        ({"depth": 0}, "gpt.depth is 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        GPTConfig(**options)
