"""Models that hold FeedForwards already, those of transformers, and activations told by their values."""

import sys
from typing import Any

import pytest
import torch
from timm.layers import GELU, GELUTanh, QuickGELU
from timm.layers.activations_me import SwishMe
from torch import nn

from moa_lightning import FFNConfig, UserError
from moa_lightning.injection import inject
from moa_lightning.injection_adapters import activation_name
from moa_lightning.models import GPT, GPTConfig
from tests.injection.nets import BLOCKS, GATED_MOA, MOA, difference, gpt, ids, randomize, vit


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FFNConfig(), FFNConfig(mixing="la")),
        (FFNConfig(activation="relu2", bias=False), FFNConfig(mixing="moa", gate="tanh")),
        (FFNConfig(form="gated", activation="silu"), FFNConfig(form="gated", mixing="moa", branches="pairs")),
        (FFNConfig(mixing="la"), FFNConfig(mixing="moa", gate="softmax", gate_bias=True, base="held")),
        (FFNConfig(mixing="la", init="paper", activation="quick_gelu"), FFNConfig(mixing="moa")),
        (FFNConfig(mixing="la", form="gated", branches="both"), FFNConfig(mixing="moa", form="gated", branches="both")),
        (FFNConfig(mixing="moa"), FFNConfig(mixing="moa", gate_bias=True)),
    ],
)
def test_our_gpt_takes_a_larger_member_and_keeps_its_function(old: FFNConfig, new: FFNConfig) -> None:
    net = gpt(old)
    before = net(ids)
    report = inject(net, new)
    assert report.replaced == BLOCKS
    assert report.reinitialized == []
    assert net.blocks[0].mlp.config.mixing == new.mixing
    assert difference(net(ids), before) <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FFNConfig(mixing="moa"), FFNConfig(mixing="la")),
        (FFNConfig(mixing="moa"), FFNConfig(mixing="moa", gate="tanh")),
        (FFNConfig(mixing="moa", gate_bias=True), FFNConfig(mixing="moa")),
        (FFNConfig(mixing="la"), FFNConfig(mixing="la", dictionary=("identity", "gelu"))),
        (FFNConfig(activation="polynorm"), FFNConfig(mixing="la")),
    ],
)
def test_a_function_that_the_new_layer_cannot_start_from_is_an_error(old: FFNConfig, new: FFNConfig) -> None:
    net = gpt(old)
    with pytest.raises(UserError, match=r"layer 'blocks\.0\.mlp'"):
        inject(net, new)
    assert net.blocks[0].mlp.config == old


def test_a_fixed_activation_with_parameters_can_be_injected() -> None:
    net = gpt(FFNConfig())
    inject(net, FFNConfig(activation="polynorm"))
    reference = GPT(GPTConfig(depth=2, dim=16, num_heads=2), FFNConfig(activation="polynorm"), 11, 8).eval()
    missing, unexpected = reference.load_state_dict(net.state_dict())
    assert not missing
    assert not unexpected
    assert torch.equal(net(ids), reference(ids))
    weight = net.blocks[0].mlp.up_mix.activation.weight
    assert torch.allclose(weight, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (GELU(), "gelu"),
        (GELUTanh(), "gelu_tanh"),
        (QuickGELU(), "quick_gelu"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (SwishMe(), "silu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2), None),
        (nn.Tanh(), "tanh"),
        (nn.Identity(), "identity"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.ReLU6(), None),
        (nn.RReLU(), None),
        (nn.PReLU(init=0.01), None),
        (nn.Softmax(-1), None),
        (nn.GLU(), None),
        ("silu", "silu"),
        ("xielu", None),
    ],
)
def test_activations_are_named_by_their_values(module: Any, name: str | None) -> None:
    state = torch.get_rng_state()
    assert activation_name(module) == name
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "relu2", "linear"])
def test_activations_of_transformers(kind: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    expected = {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "linear": "identity",
    }
    assert activation_name(activations.ACT2FN[kind]) == expected.get(kind, kind)
    assert activation_name(activations.ACT2FN["gelu_10"]) is None


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


def test_gpt2_of_transformers() -> None:
    model = gpt2()
    before = model(ids).logits
    with pytest.raises(UserError, match=r"'gelu_tanh', the activation of layer 'transformer\.h\.0\.mlp'"):
        inject(model, FFNConfig(mixing="moa"))
    report = inject(model, MOA)
    assert report.replaced == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert report.reinitialized == []
    assert model.transformer.h[0].mlp.up_proj.weight.shape == (128, 32)
    assert difference(model(ids).logits, before) <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_llama_of_transformers(bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=11, mlp_bias=bias)
    model = randomize(transformers.LlamaForCausalLM(config)).eval()
    before = model(ids).logits
    report = inject(model, GATED_MOA)
    assert report.replaced == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (model.model.layers[1].mlp.up_proj.bias is not None) == bias
    assert difference(model(ids).logits, before) <= 1e-6


def test_timm_models_need_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails now
    assert inject(vit(), MOA).replaced == BLOCKS
