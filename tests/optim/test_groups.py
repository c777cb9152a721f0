"""Which parameters decay: trunk matrices do, coefficients of mixes and everything that is no matrix do not."""

import pytest
import torch
from torch import nn

from moa_lightning import FFNConfig
from moa_lightning.models import GPT, GPTConfig, MaskedAutoencoder, SelfDistillation
from moa_lightning.optim import OptimizerConfig, build_optimizer, parameter_groups

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
FFNS = {
    "gelu": FFNConfig(),
    "polynorm": FFNConfig(activation="polynorm"),
    "xielu": FFNConfig(activation="xielu"),
    "la": FFNConfig("la"),
    "moa": FFNConfig("moa", gate_bias=True),
    "moa_paper": FFNConfig("moa", init="paper", base="held"),
    "moa_both": FFNConfig("moa", "gated", branches="both", gate_bias=True),
    "moa_pairs": FFNConfig("moa", "gated", branches="pairs", gate_bias=True),
    "places": FFNConfig(gate_bias=True, attention_gate="moa", pointwise_norm="la"),
}


def gpt(ffn: FFNConfig, **size) -> GPT:
    return GPT(GPTConfig(depth=2, dim=16, num_heads=2, **size), ffn, vocab_size=11, context_length=8)


def mae(ffn: FFNConfig) -> MaskedAutoencoder:
    name = "vit_medium_patch16_reg4_gap_256"
    return MaskedAutoencoder(name, SMALL, ffn, ffn, 16, 1, decoder_dim=8, decoder_depth=1, decoder_heads=2)


def dino(ffn: FFNConfig) -> SelfDistillation:
    head = {"out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "norm_last_layer": False}
    return SelfDistillation("vit_small_patch14_reg4_dinov2", SMALL, ffn, 16, 1, **head)


def grouped(net: nn.Module, mixing_factor: float = 1.0) -> dict[str, set[str]]:
    """Names of the parameters in each group; each is in one group only."""
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, 1e-3, 0.1, mixing_factor)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("build", [gpt, mae, dino])
@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS.keys())
def test_every_trainable_parameter_is_in_one_group(build, ffn: FFNConfig) -> None:
    net = build(ffn)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    groups = grouped(net)
    assert set().union(*groups.values()) == trainable
    assert sum(map(len, groups.values())) == len(trainable)


@pytest.mark.parametrize("build", [gpt, mae, dino])
@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS.keys())
def test_coefficients_of_mixes_are_a_group_without_decay(build, ffn: FFNConfig) -> None:
    net = build(ffn)
    coefficients = {
        name
        for name, p in net.named_parameters()
        if p.requires_grad and name.endswith(("mix.base", "mix.gate_weight", "mix.gate_bias"))
    }
    assert bool(coefficients) == bool(ffn.learned)
    assert grouped(net).get("mixing", set()) == coefficients
    decay = {group["name"]: group["weight_decay"] for group in parameter_groups(net, 1e-3, 0.1, 1.0)}
    assert decay.pop("decay") == 0.1
    assert set(decay.values()) == {0.0}


def test_matrices_and_the_embedding_decay_norms_do_not() -> None:
    groups = grouped(gpt(FFNConfig("moa", bias=True)))
    block = "blocks.0."
    matrices = {"attn.qkv.weight", "attn.proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    others = {"norm1.weight", "norm2.weight", "attn.q_norm.weight", "mlp.up_proj.bias", "mlp.down_proj.bias"}
    assert {block + name for name in matrices} | {"embed.weight", "head.weight"} <= groups["decay"]
    assert {block + name for name in others} | {"norm.weight"} <= groups["no_decay"]
    assert groups["mixing"] == {f"blocks.{i}.mlp.up_mix.{name}" for i in (0, 1) for name in ("base", "gate_weight")}


def test_the_matrix_of_a_gate_on_attention_is_one_of_the_trunk() -> None:
    patterns = ["*.attn.qkv.weight", "*.attn.proj.weight", "*_proj.weight"]  # those of configs/optimizer/muon.yaml
    for build, gate in ((gpt, "blocks.1.attn.output_gate"), (mae, "encoder.blocks.1.attn.proj.output_gate")):
        net = build(FFNS["places"])
        names = {id(p): name for name, p in net.named_parameters()}
        groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(net, 1, 1, 1, patterns)}
        assert f"{gate}.gate_proj.weight" in groups["muon"]
        path = gate.partition("blocks.")[0]
        norms = {f"{path}{norm}{leaf}" for norm in ("blocks.0.norm1.", "norm.") for leaf in ("bias", "scale.weight")}
        assert norms | ({"embed_scale.weight"} if build is gpt else set()) <= groups["no_decay"]


def test_tied_embeddings_are_grouped_once() -> None:
    assert "head.weight" not in grouped(gpt(FFNConfig(), tie_embeddings=True))["decay"]
    assert "embed.weight" in grouped(gpt(FFNConfig(), tie_embeddings=True))["decay"]


def test_tokens_biases_and_layer_scales_of_vision_nets_do_not_decay() -> None:
    groups = grouped(dino(FFNConfig("la")))
    backbone = "student.backbone."
    free = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.ls1.gamma", "norm.weight"}
    assert {backbone + name for name in free} <= groups["no_decay"]
    matrices = {"patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.up_proj.weight"}
    prototypes = {f"student.head.last_layer.{name}" for name in ("weight", "norm")}  # as in the official code
    assert {backbone + name for name in matrices} | prototypes <= groups["decay"]
    assert not any(name.startswith("teacher") for names in groups.values() for name in names)
    groups = grouped(mae(FFNConfig("la")))
    assert {"decoder.mask_token", "encoder.reg_token", "decoder.pred.bias"} <= groups["no_decay"]
    assert {"decoder.embed.weight", "decoder.pred.weight"} <= groups["decay"]


def test_parameters_of_activations_do_not_decay() -> None:
    for name in ("polynorm", "xielu"):
        inside = {n for n, _ in gpt(FFNS[name]).named_parameters() if ".up_mix.activation." in n}
        assert inside
        assert inside <= grouped(gpt(FFNS[name]))["no_decay"]


def test_mixes_have_a_learning_rate_of_their_own() -> None:
    rates = {group["name"]: group["lr"] for group in parameter_groups(gpt(FFNConfig("moa")), 1e-3, 0.1, 4.0)}
    assert rates == {"decay": 1e-3, "no_decay": 1e-3, "mixing": pytest.approx(4e-3)}


def test_gates_have_a_learning_rate_of_their_own_where_one_is_given() -> None:
    net = gpt(FFNConfig("moa", gate_bias=True))
    groups = {group["name"]: group for group in parameter_groups(net, 1e-3, 0.1, 4.0, (), 0.5)}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx({"decay": 1e-3, "no_decay": 1e-3, "mixing": 4e-3, "gates": 5e-4})
    assert groups["gates"]["weight_decay"] == 0.0
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in net.named_parameters()}
    found = {name: {names[id(p)] for p in groups[name]["params"]} for name in ("mixing", "gates")}
    assert found == {"mixing": {"base"}, "gates": {"gate_weight", "gate_bias"}}
    plain = {group["name"]: group["lr"] for group in parameter_groups(gpt(FFNConfig("la")), 1e-3, 0.1, 4.0, (), 0.5)}
    assert plain == pytest.approx({"decay": 1e-3, "no_decay": 1e-3, "mixing": 4e-3})


def test_without_a_gradient_only_what_decays_shrinks() -> None:
    """AdamW on zero gradients multiplies by 1 - lr · decay; a second witness that coefficients do not decay."""
    net = gpt(FFNConfig("moa"))
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    optimizer = build_optimizer(net, config, 10)["optimizer"]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = grouped(net)["decay"]
    for name, p in net.named_parameters():
        assert torch.allclose(p, torch.full_like(p, 0.95 if name in decayed else 1.0)), name
