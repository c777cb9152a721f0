"""What a net takes over from another run: mixes by name and by place, and weights with another feed-forward layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_lightning import FFNConfig, UserError
from moa_lightning.controls import start_mixes
from moa_lightning.mixing import MixCoefficients
from moa_lightning.models import GPT, GPTConfig, MaskedAutoencoder, SelfDistillation
from moa_lightning.transplants import load_weights

VIT = {"depth": 3, "num_heads": 2, "patch_size": 4}


def gpt(config: FFNConfig, depth: int = 2, dim: int = 16) -> GPT:
    return GPT(GPTConfig(depth=depth, dim=dim, num_heads=2), config, vocab_size=11, context_length=6)


def mae(config: FFNConfig, dim: int = 16) -> MaskedAutoencoder:
    size = {"embed_dim": dim, **VIT}
    return MaskedAutoencoder("vit_tiny_patch16_224", size, config, config, 8, 1, 0.5, 8, 2, 2)


def dino(config: FFNConfig) -> SelfDistillation:
    size = {"embed_dim": 16, **VIT}
    return SelfDistillation("vit_tiny_patch16_224", size, config, 8, 1, 8, 8, 4)


def spread(net: nn.Module) -> nn.Module:
    """The net with every parameter moved, each by numbers of its own."""
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return net


def save(net: nn.Module, config: FFNConfig, path: Path) -> Path:
    """A checkpoint as a run writes it, as far as others read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"ffn": config.as_dict()}, "optimizer_states": []}, path)
    return path


def mixes(net: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in net.named_modules() if isinstance(module, MixCoefficients)}


def test_a_gpt_starts_with_the_mixes_of_a_vit_by_their_place(tmp_path: Path) -> None:
    """Blocks 0, 1, 2 to blocks 0 and 1: the ends meet. The run's folder means its last checkpoint."""
    source = spread(mae(FFNConfig("moa")))
    save(source, FFNConfig("moa"), tmp_path / "checkpoints" / "last.ckpt")
    net = gpt(FFNConfig("moa", start_from=str(tmp_path), base="held", gates="frozen"))
    said = start_mixes(net)
    for block, other in ((0, 0), (1, 2)):
        own, given = net.blocks[block].mlp.up_mix, source.encoder.blocks[other].mlp.up_mix
        assert torch.equal(own.base, given.base)
        assert torch.equal(own.gate_weight, given.gate_weight)
        assert not list(own.parameters())  # frozen in the other domain
    assert said.missing == []
    assert said.said == [f"α and the gates of 2 mixes from {tmp_path}/checkpoints/last.ckpt, by place"]


def test_a_vit_of_another_width_takes_alpha_alone_and_its_decoder_nothing(tmp_path: Path) -> None:
    source = spread(gpt(FFNConfig("moa"), depth=5))
    path = save(source, FFNConfig("moa"), tmp_path / "x.ckpt")
    net = mae(FFNConfig("moa", start_from=str(path)), dim=8)
    (said,) = start_mixes(net).said
    for name, mix in mixes(net).items():
        assert mix.gate_weight.abs().max() == 0
        if name.startswith("decoder"):
            assert mix.base.tolist() == [0, 1, 0, 0, 0, 0, 0]
        else:
            assert torch.equal(mix.base, source.blocks[2 * int(name.split(".")[2])].mlp.up_mix.base)
    assert said == (
        f"α of 3 mixes from {path}, by place, and 2 elsewhere keep their own start; the gates start anew, as their "
        "widths are 16 there and 8 here"
    )


def test_both_nets_of_a_self_distillation_start_alike_and_it_gives_its_teachers_mixes(tmp_path: Path) -> None:
    source = spread(gpt(FFNConfig("moa"), depth=3))
    net = dino(FFNConfig("moa", start_from=str(save(source, FFNConfig("moa"), tmp_path / "gpt.ckpt"))))
    start_mixes(net)
    for twin in (net.student, net.teacher):
        assert torch.equal(twin.backbone.blocks[2].mlp.up_mix.gate_weight, source.blocks[2].mlp.up_mix.gate_weight)
    path = save(spread(net), FFNConfig("moa"), tmp_path / "dino.ckpt")
    back = gpt(FFNConfig("moa", start_from=str(path)), depth=3)
    start_mixes(back)
    assert torch.equal(back.blocks[1].mlp.up_mix.base, net.teacher.backbone.blocks[1].mlp.up_mix.base)


def test_la_takes_alpha_from_a_checkpoint(tmp_path: Path) -> None:
    source = spread(gpt(FFNConfig("la"), dim=8))
    net = gpt(FFNConfig("la", start_from=str(save(source, FFNConfig("la"), tmp_path / "x.ckpt"))))
    start_mixes(net)
    assert torch.equal(net.blocks[1].mlp.up_mix.base, source.blocks[1].mlp.up_mix.base)


SWIGLU = FFNConfig("moa", "gated", activation="silu")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (FFNConfig("moa"), {"gates": "frozen"}, "cannot be frozen.*widths are 16 there and 8 here"),
        (FFNConfig("la"), {"gates": "frozen"}, "cannot be frozen.*the other run has none"),
        (FFNConfig("moa", dictionary=("gelu", "relu")), {}, "match ffn.dictionary"),
        (FFNConfig(), {}, "holds no mixes"),
        (SWIGLU, {}, "has no up_mix"),
    ],
)
def test_mixes_that_cannot_be_carried_are_refused(tmp_path: Path, source: FFNConfig, target: Any, message: str) -> None:
    path = save(gpt(source), source, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        start_mixes(mae(FFNConfig("moa", start_from=str(path), **target), dim=8))


def run(net: Any) -> Tensor:
    return net(torch.arange(6).view(1, 6)).detach()


UPGRADES = {
    "fixed to moa": (FFNConfig(), FFNConfig("moa")),
    "fixed to la": (FFNConfig(activation="relu2"), FFNConfig("la", activation="relu2")),
    "la to moa": (FFNConfig("la"), FFNConfig("moa")),
    "moa to moa": (FFNConfig("moa", gate="tanh"), FFNConfig("moa", gate="tanh")),
    "gated to both": (
        FFNConfig("fixed", "gated", activation="silu"),
        FFNConfig("moa", "gated", activation="silu", branches="both"),
    ),
    "gated to pairs": (
        FFNConfig("fixed", "gated", activation="silu"),
        FFNConfig("moa", "gated", activation="silu", branches="pairs"),
    ),
    "places to moa": (
        FFNConfig(attention_gate="la", pointwise_norm="fixed"),
        FFNConfig("la", attention_gate="moa", pointwise_norm="moa"),
    ),
}


@pytest.mark.parametrize("name", UPGRADES)
def test_an_upgraded_net_computes_what_it_computed(tmp_path: Path, name: str) -> None:
    before, after = UPGRADES[name]
    source = spread(gpt(before)).double()
    net = gpt(after).double()
    assert not torch.allclose(run(net), run(source))
    assert load_weights(net, str(save(source, before, tmp_path / "checkpoints" / "last.ckpt").parents[1])) is None
    torch.testing.assert_close(run(net), run(source), rtol=1e-12, atol=1e-12)
    run(net)
    net(torch.arange(6).view(1, 6)).square().sum().backward()
    assert all(mix.base.grad.abs().max() > 0 for mix in mixes(net).values())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FFNConfig(), FFNConfig("moa", init="paper"), "ffn.init"),
        (FFNConfig(), FFNConfig("moa", gates="frozen"), "ffn.gates"),
        (FFNConfig(), FFNConfig("la", activation="relu"), "ffn.activation to gelu"),
        (FFNConfig(activation="relu2"), FFNConfig(), "compute relu2, and here gelu: match ffn.activation"),
        (FFNConfig("moa"), FFNConfig("la"), "which this net lacks"),
        (FFNConfig("moa"), FFNConfig("moa", gate="tanh"), "match ffn.gate"),
        (FFNConfig(hidden_ratio=2.0), FFNConfig("moa"), r"in the shape \(32, 16\)"),
        (FFNConfig("la", dictionary=("gelu", "relu")), FFNConfig("moa", dictionary=("relu", "gelu")), "dictionary"),
        (FFNConfig(bias=False), FFNConfig("moa"), "not at all"),
        (FFNConfig(), FFNConfig(attention_gate="fixed"), "output_gate.gate_proj.weight .* not at all"),
        (FFNConfig(), FFNConfig(pointwise_norm="fixed"), "embed_scale.weight .* not at all"),
    ],
)
def test_weights_that_would_not_go_on_are_refused(tmp_path: Path, before: Any, after: Any, message: str) -> None:
    path = save(gpt(before), before, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        load_weights(gpt(after), str(path))


def test_an_embedding_and_a_head_that_were_apart_do_not_become_one(tmp_path: Path) -> None:
    config, size = FFNConfig(), {"depth": 1, "dim": 16, "num_heads": 2}
    tied, untied = (spread(GPT(GPTConfig(**size, tie_embeddings=tie), config, 11, 6)) for tie in (True, False))
    with pytest.raises(UserError, match=r"embed.weight and head.weight apart, .*gpt.tie_embeddings"):
        load_weights(tied, str(save(untied, config, tmp_path / "untied.ckpt")))
    load_weights(untied, str(save(tied, config, tmp_path / "tied.ckpt")))  # the same numbers twice are no harm
    assert torch.equal(run(untied), run(tied))


def test_mixes_from_one_run_and_weights_from_another(tmp_path: Path) -> None:
    mixed, fixed = spread(mae(FFNConfig("moa"))), spread(gpt(FFNConfig()))
    start = save(mixed, FFNConfig("moa"), tmp_path / "mae.ckpt")
    net = gpt(FFNConfig("moa", start_from=str(start)))
    start_mixes(net)
    load_weights(net, str(save(fixed, FFNConfig(), tmp_path / "gpt.ckpt")))
    assert torch.equal(net.blocks[0].mlp.up_mix.base, mixed.encoder.blocks[0].mlp.up_mix.base)
    assert torch.equal(net.blocks[0].mlp.up_proj.weight, fixed.blocks[0].mlp.up_proj.weight)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert load_weights(gpt(FFNConfig()), str(tmp_path / "none")) == tmp_path / "none"
    assert start_mixes(gpt(FFNConfig("moa", start_from="none"))).missing == [Path("none/checkpoints/last.ckpt")]
