"""Documents that share a sequence: each gets the logits and gradients that it gets alone, in float64."""

import pytest
import torch
from torch import Tensor

from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.parallel import checkpoint_blocks
from tests.models.nets import fragment, shake

VOCAB, CONTEXT = 13, 12
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 12, list(range(12))], dtype=torch.int32)
MOE = MoEConfig(4, 2, shared_experts=1)


def gpt(ffn: str, moe: MoEConfig = MoEConfig(), kv_heads: int | None = None) -> GPT:  # noqa: B008 - frozen
    net = shake(GPT(GPTConfig(2, 24, 2, kv_heads, rope_theta=50.0), fragment(ffn), VOCAB, CONTEXT, 0, moe)).double()
    turns = torch.arange(CONTEXT)[:, None] * 50.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    net.cos, net.sin = turns.cos(), turns.sin()  # its own table is float32, which tells 5 - 3 from 2 - 0
    return net


def packed() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (3, CONTEXT + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def alone(net: GPT) -> Tensor:
    """Logits of packed tokens, one document after another, each from position 0."""
    tokens, _ = packed()
    rows = []
    for row, numbers in zip(tokens, DOCUMENTS, strict=True):
        pieces = row.split(torch.unique_consecutive(numbers, return_counts=True)[1].tolist())
        rows.append(torch.cat([net(piece[None])[0] for piece in pieces]))
    return torch.stack(rows)


@pytest.mark.parametrize("moe", [MoEConfig(), MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("ffn", ["gelu", "la", "moa_gated_both"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_document_among_others_has_its_own_logits_and_gradients(
    ffn: str, moe: MoEConfig, kv_heads: int | None
) -> None:
    net, (tokens, targets) = gpt(ffn, moe, kv_heads), packed()
    expected = alone(net)
    logits = net(tokens, documents=DOCUMENTS)
    assert (logits - expected).abs().max() < 1e-12
    assert (net(tokens) - expected).abs().max() > 1e-2  # without the mask they are others
    nll = torch.nn.functional.cross_entropy(expected.transpose(1, 2), targets, reduction="none")
    chunked = net.losses(tokens, targets, 5, DOCUMENTS)[0]
    assert (chunked - nll).abs().max() < 1e-6  # the losses are float32
    weights = [parameter for name, parameter in net.named_parameters() if "attn" in name]
    ours, theirs = (torch.autograd.grad(values.square().sum(), weights) for values in (logits, expected))
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient - reference).norm() < 1e-11 * reference.norm()


@pytest.mark.parametrize("moe", [MoEConfig(), MOE], ids=["dense", "experts"])
def test_recomputed_and_traced_blocks_do_the_same(moe: MoEConfig) -> None:
    tokens, _ = packed()
    plain, changed = gpt("moa", moe).float(), gpt("moa", moe).float()
    checkpoint_blocks(changed)
    for block in changed.blocks:
        block.compile(backend="aot_eager")
    for net in (plain, changed):
        net(tokens, documents=DOCUMENTS).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_cache_continues_one_document() -> None:
    net = gpt("gelu")
    with pytest.raises(ValueError, match="one document"):
        net(packed()[0], net.new_cache(), DOCUMENTS)
