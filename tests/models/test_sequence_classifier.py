"""The GPT that judges texts: padding and neighbours change nothing, experts included; its counts, layers and start."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moa_lightning.models import GPT, GPTConfig, SequenceClassifier
from moa_lightning.moe import MoEConfig
from tests.models.nets import assert_same_where_shapes_agree, counted_flops, fragment, shake

VOCAB, CONTEXT, OUTPUTS = 13, 12, 3
SIZE = GPTConfig(2, 24, 2)
ROUTERS = {
    "dense": MoEConfig(),
    "top2": MoEConfig(4, 2, shared_experts=1),
    "top2-capacity": MoEConfig(4, 2, capacity_factor=0.7),
    "experts-choose": MoEConfig(4, router="expert_choice", capacity_factor=1.5),
    "experts-choose-few": MoEConfig(4, router="expert_choice", capacity_factor=0.5),
}
LENGTHS = torch.tensor([3, 12, 7, 1])
# a capacity of token choice is shared by the sequences of a batch, in training: see test_moe.py
MODES = [(router, training) for router in ROUTERS for training in (False, True)]
MODES.remove(("top2-capacity", True))


def net(router: str = "dense", ffn: str = "moa") -> SequenceClassifier:
    return SequenceClassifier(SIZE, fragment(ffn), VOCAB, CONTEXT, OUTPUTS, 0, ROUTERS[router])


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (len(LENGTHS), CONTEXT), generator=torch.Generator().manual_seed(1))


def alone(made: SequenceClassifier, rows: Tensor) -> Tensor:
    """Logits of each sequence by itself, without padding."""
    return torch.cat([made(row[None, :n], torch.tensor([n])) for row, n in zip(rows, LENGTHS.tolist(), strict=True)])


def gradients(made: SequenceClassifier, logits: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("router", "training"), MODES)
def test_logits_depend_neither_on_padding_nor_on_neighbours(router: str, training: bool) -> None:
    made, rows = shake(net(router)).double().train(training), tokens()
    expected = alone(made, rows)
    found = made(rows, LENGTHS)
    assert (found - expected).abs().max() < 1e-10
    assert expected.std(0).min() > 1e-2
    other = torch.where(torch.arange(CONTEXT) < LENGTHS[:, None], rows, (rows + 5) % VOCAB)  # other padding
    assert (made(other, LENGTHS) - expected).abs().max() < 1e-10
    last = LENGTHS - 1
    changed = rows.clone()
    changed[torch.arange(len(rows)), last] = (rows[torch.arange(len(rows)), last] + 1) % VOCAB
    assert ((made(changed, LENGTHS) - expected).abs().amax(1) > 1e-4).all()  # the last real token is read
    theirs = gradients(made, alone(made, rows))
    for name, gradient in gradients(made, made(rows, LENGTHS)).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-10, msg=name)


def test_the_head_reads_the_gpt_behind_its_norm() -> None:
    made, gpt = shake(net()).double(), GPT(SIZE, fragment("moa"), VOCAB, CONTEXT).double()
    gpt.load_state_dict({name: value for name, value in made.state_dict().items() if "head" not in name}, strict=False)
    gpt.head = torch.nn.Identity()
    seen = gpt(tokens())[:, -1]
    full = torch.full((len(LENGTHS),), CONTEXT)
    assert torch.allclose(made(tokens(), full), seen @ made.head.weight.T + made.head.bias, rtol=0, atol=1e-12)


def test_it_starts_as_the_language_model_does_with_a_head_near_zero() -> None:
    made = net(ffn="gelu")
    assert_same_where_shapes_agree(made, GPT(SIZE, fragment("gelu"), VOCAB, CONTEXT), {"embed.weight", "norm.weight"})
    assert 0 < made.head.weight.abs().max() < 1e-3
    assert not made.head.bias.any()
    other = SequenceClassifier(SIZE, fragment("gelu"), VOCAB, CONTEXT, OUTPUTS, seed=1)
    assert not torch.equal(made.head.weight, other.head.weight)


@pytest.mark.parametrize("router", ["dense", "top2", "experts-choose"])
def test_parameters_and_flops_are_counted(router: str) -> None:
    made = net(router, "gelu")
    assert made.parameter_count() == sum(p.numel() for p in made.parameters())
    assert made.parameter_count(embeddings=False) == made.parameter_count() - VOCAB * 24
    if router == "dense":
        counted = counted_flops(lambda: made(tokens(), torch.full((4,), CONTEXT)))
        attention = 2 * 2 * 24 * CONTEXT * CONTEXT * SIZE.depth  # the counter sees the whole square
        ours = made.flops_per_token() * CONTEXT + attention // 2 + 2 * made.head.weight.numel()
        assert counted == 4 * ours


def test_each_layer_learns_at_a_share_of_the_rate_above() -> None:
    made = net("top2")
    rates = made.layer_rates(0.5)
    expected = {
        "head.bias": 1,
        "norm.weight": 0.5,
        "blocks.1.mlp.router.weight": 0.5,
        "blocks.0.attn.qkv.weight": 0.25,
        "embed.weight": 0.125,
    }
    assert {name: rates[name] for name in expected} == expected
    assert rates.keys() == dict(made.named_parameters()).keys()
    everywhere = replace(fragment("moa"), attention_gate="fixed", pointwise_norm="fixed")
    made = SequenceClassifier(SIZE, everywhere, VOCAB, CONTEXT, OUTPUTS)
    rates = made.layer_rates(0.5)
    assert rates["embed_scale.weight"] == rates["embed.weight"] == 0.125
    assert made.parameter_count() == sum(p.numel() for p in made.parameters())
