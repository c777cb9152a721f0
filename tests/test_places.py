"""Gates on attention's output and point-wise norms: formulas in float64, nesting, timm's nets, what else sees them."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from moa_lightning import FFNConfig, UserError, inject
from moa_lightning.callbacks.mixing import projections_of_mixes, short_names
from moa_lightning.controls import hold_mixes
from moa_lightning.exchange.hub_export import stock_architecture
from moa_lightning.exchange.timm_export import timm_state
from moa_lightning.mixing import MixCoefficients
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.places import OutputGate, PointwiseNorm, entries
from moa_lightning.transplants import GivenMix, matched, start_gated
from tests.injection.nets import image, swin, vit
from tests.models.nets import shake

KINDS = ("fixed", "la", "moa")
SIZE = GPTConfig(depth=2, dim=24, num_heads=2)
CURVES = {
    "identity": lambda u: u,
    "gelu": lambda u: u * (1 + torch.erf(u / 2**0.5)) / 2,
    "silu": lambda u: u / (1 + torch.exp(-u)),
    "relu": lambda u: u.clamp(min=0),
    "leaky_relu": lambda u: torch.maximum(u, 0.01 * u),
    "relu2": lambda u: u.clamp(min=0) ** 2,
    "tanh": lambda u: 1 - 2 / (torch.exp(2 * u) + 1),
    "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
}


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """timm draws as it comes, and nets without norms may grow until their gates saturate."""
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def both(kind: str) -> FFNConfig:
    return FFNConfig(attention_gate=kind, pointwise_norm=kind)


def gpt(ffn: FFNConfig, dtype: torch.dtype = torch.float64) -> GPT:
    return GPT(SIZE, ffn, 13, 10).to(dtype)


def ids() -> Tensor:
    return torch.randint(0, 13, (2, 10), generator=torch.Generator().manual_seed(3))


def curve(layer: Any, u: Tensor, x: Tensor) -> Tensor:
    """The layer's function of u, written with its parameters and nothing else of ours."""
    mix, start = layer.mix, layer.config.activation
    if layer.config.mixing == "fixed":
        return CURVES[start](u)
    c = mix.base
    if layer.config.mixing == "moa":
        c = c + 1 / (1 + torch.exp(-x @ mix.gate_weight.T)) - 0.5
    return sum(c[..., k, None] * CURVES[name](u) for k, name in enumerate(mix.entries))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [OutputGate, PointwiseNorm])
def test_values_and_gradients_are_those_of_the_formula(place: type, kind: str) -> None:
    layer = shake(place(6, 10, both(kind)) if place is OutputGate else place(6, both(kind), 0.8)).double()
    x, attended = random(3, 5, 6).requires_grad_(), random(3, 5, 10, seed=1).requires_grad_()
    if place is OutputGate:
        y, expected = layer(x, attended), curve(layer, x @ layer.gate_proj.weight.T, x) * attended
    else:
        y, expected = layer(x), layer.weight * curve(layer, layer.scale.weight * x, x) + layer.bias
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *layer.parameters(), *([attended] if place is OutputGate else [])]
    g = random(*y.shape, seed=2)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
        assert ours.any()


@pytest.mark.parametrize("place", ["attention_gate", "pointwise_norm"])
def test_each_member_starts_as_the_one_that_it_contains(place: str) -> None:
    outputs = []
    for kind in KINDS:
        net = gpt(FFNConfig(**{place: kind}))
        common = {n: p for n, p in net.named_parameters() if ".mix." not in n}
        with torch.no_grad():
            for index, parameter in enumerate(common.values()):
                parameter.add_(0.3 * random(*parameter.shape, seed=index))
        outputs.append(net(ids()))
    assert torch.allclose(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(outputs[2], outputs[0], rtol=1e-12, atol=1e-12)
    assert (outputs[0] - shake(gpt(FFNConfig()))(ids())).abs().max() > 0.1


def test_without_places_a_net_is_what_it_was() -> None:
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in gpt(FFNConfig("moa")).named_parameters()}
    norms, rest = {"norm1", "norm2", "norm", "q_norm", "k_norm"}, {"embed", "head", "qkv", "proj"}
    assert leaves == norms | rest | {"up_proj", "down_proj", "up_mix"}
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=2)
    before = {name: type(module) for name, module in model.named_modules() if ".mlp" not in name}
    inject(model, FFNConfig("moa"))
    assert {name: type(module) for name, module in model.named_modules() if ".mlp" not in name} == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_a_gpt_in_closed_form(kind: str, bias: bool) -> None:
    ffn = FFNConfig(attention_gate=kind, pointwise_norm=kind, gate_bias=bias)
    assert gpt(ffn).parameter_count() == sum(p.numel() for p in gpt(ffn).parameters())


def test_a_cache_gives_the_logits_that_the_whole_text_gives() -> None:
    net, text = shake(gpt(both("moa"))), ids()
    cache, parts = net.new_cache(), []
    for part in text.split([4, 1, 1, 3, 1], dim=1):
        parts.append(net(part, cache))
    assert torch.allclose(torch.cat(parts, dim=1), net(text), rtol=1e-6, atol=1e-6)  # the angles are float32


VITS = {
    "vit": (vit, 32),
    "eva02": (lambda: vit("eva02_base_patch14_224"), 28),
    "dinov3": (lambda: vit("vit_small_patch16_dinov3"), 32),
    "rotary": (lambda: vit("vit_small_patch16_rope_mixed_224"), 32),
    "beit": (lambda: vit("beit_base_patch16_224"), 32),
    "relative": (lambda: vit("vit_relpos_small_patch16_224"), 32),
    "swin": (lambda: swin("swin_tiny_patch4_window7_224", 56), 56),
    "swin2": (lambda: swin("swinv2_tiny_window8_256", 64), 64),
    "swin2_cr": (lambda: swin("swinv2_cr_tiny_224", 64), 64),
}
LAYERS = {"eva02": {"form": "gated", "activation": "silu"}}


@pytest.mark.parametrize("family", VITS)
@torch.no_grad()
def test_the_gate_of_a_timm_attention_stands_before_its_projection(family: str) -> None:
    build, size = VITS[family]
    model, x = build(), image(size)
    swapped = copy.deepcopy(model)
    inject(swapped, FFNConfig(attention_gate="moa", **LAYERS.get(family, {})))
    name = next(n for n, m in swapped.named_modules() if isinstance(m, OutputGate)).removesuffix(".proj.output_gate")
    shake(swapped.get_submodule(name).proj.output_gate)
    for mlp in [n for n, m in swapped.named_modules() if n.endswith("mlp")]:
        swapped.set_submodule(mlp, model.get_submodule(mlp))
    seen: dict[str, Tensor] = {}
    attention, ours = model.get_submodule(name), swapped.get_submodule(name)
    attention.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    attention.proj.register_forward_pre_hook(lambda module, inputs: seen.update(attended=inputs[0]))
    ours.proj.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    model(x)
    copy.deepcopy(swapped)(x)  # hooks and all
    gate, u = ours.proj.output_gate, seen["x"] @ ours.proj.output_gate.gate_proj.weight.T
    expected = attention.proj(seen["attended"] * curve(gate, u, seen["x"]))
    assert torch.allclose(seen["y"], expected, rtol=1e-4, atol=1e-5)
    gates = [n for n, m in swapped.named_modules() if isinstance(m, OutputGate)]
    assert len(gates) == len([n for n, m in model.named_modules() if n.endswith("attn")])
    assert all(n in swapped.state_dict() for n in model.state_dict())


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_point_wise_norms_take_the_place_of_all_norms_of_the_stream(family: str) -> None:
    build, size = VITS[family]
    model = build()
    inject(model, FFNConfig(pointwise_norm="moa", **LAYERS.get(family, {})))
    found = [n for n, m in model.named_modules() if isinstance(m, PointwiseNorm)]
    last = "norm" if family == "vit" else "fc_norm"
    assert found == [*(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)), last]
    left = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert left == ([] if family == "vit" else ["blocks.0.mlp.norm", "blocks.1.mlp.norm"])
    shake(model)
    seen: dict[str, Tensor] = {}
    norm = model.get_submodule("blocks.1.norm2")
    norm.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    model(image(size)).sum().backward()
    expected = norm.weight * curve(norm, norm.scale.weight * seen["x"], seen["x"]) + norm.bias
    assert torch.allclose(seen["y"], expected, rtol=1e-4, atol=1e-4)
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_a_block_with_both_places_compiles_to_one_graph() -> None:
    torch.compiler.reset()  # others have compiled this code too, and torch counts
    model = vit()
    inject(model, both("moa"))
    shake(model)
    block, x = model.blocks[0], torch.randn(2, 5, 48)
    expected = block(x)
    assert torch.allclose(torch.compile(block, backend="eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.blocks[0].attn.proj.source is None


REFUSED = {
    "a GPT of ours": (lambda: gpt(FFNConfig()), "attention_gate", r"blocks.0.attn', a .*trunk.Attention"),
    "a gate already": (lambda: gated(), "attention_gate", r"blocks.1.attn' has a gate"),
    "batch norm": (lambda: vit(norm_layer=nn.BatchNorm1d), "pointwise_norm", r"'blocks.0.norm1', a BatchNorm1d"),
}


def gated() -> nn.Module:
    model = vit()
    model.blocks[1].attn.gate = nn.Linear(48, 48)  # timm's own option
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_swapped_is_refused_by_name_and_left_as_it_was(what: str) -> None:
    build, place, message = REFUSED[what]
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match=message):
        inject(model, FFNConfig("moa", **{place: "fixed"}))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_dictionary_of_a_place_has_what_it_starts_as() -> None:
    ffn = FFNConfig("moa", dictionary=("gelu", "relu"), attention_gate="la", pointwise_norm="moa")
    net = gpt(ffn)
    assert net.blocks[0].attn.output_gate.mix.entries == ("sigmoid", "gelu", "relu")
    assert net.blocks[0].norm1.mix.entries == net.norm.mix.entries == ("tanh", "gelu", "relu")
    assert entries(("tanh", "sigmoid"), "sigmoid") == ("tanh", "sigmoid")
    with pytest.raises(UserError, match=r"ffn\.dictionary.*glue"):
        FFNConfig(attention_gate="la", dictionary=("glue",))
    with pytest.raises(UserError, match=r"ffn\.attention_gate is 'yes'"):
        FFNConfig(attention_gate="yes")


def test_callbacks_tell_all_mixes_apart_and_know_what_they_are_applied_to() -> None:
    net = gpt(FFNConfig("moa", attention_gate="moa", pointwise_norm="moa"))
    mixes = {name: module for name, module in net.named_modules() if isinstance(module, MixCoefficients)}
    short = [short_names(list(mixes))[name] for name in mixes]
    block = ["norm1", "output_gate", "norm2", "up"]
    assert short == [*(f"block0{i}/{place}" for i in (0, 1) for place in block), "norm"]
    assert set(projections_of_mixes(net)) == set(mixes.values())


def test_mixes_go_over_to_another_net_by_their_place() -> None:
    """From a GPT to a deeper ViT of that width: gates to gates, norms to norms."""
    ffn = FFNConfig("moa", attention_gate="moa", pointwise_norm="moa")
    source = shake(gpt(ffn))
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=3, embed_dim=24, num_heads=2)
    inject(model, ffn)
    known = {n: GivenMix(m.base, m.gate_weight, None, m.entries, m.gate) for n, m in mixes_of(source).items()}
    wanted = mixes_of(model)
    given = matched(list(wanted), known, "there")
    assert sorted(set(wanted) - set(given)) == ["norm.mix"]  # it stands in no block
    assert [start_gated(wanted[name], mix, name, "there") for name, mix in given.items()] == [""] * len(given)
    theirs, last = model.blocks[2], source.blocks[1]
    assert torch.equal(theirs.norm2.mix.gate_weight, last.norm2.mix.gate_weight.float())
    assert torch.equal(theirs.attn.proj.output_gate.mix.base, last.attn.output_gate.mix.base.float())


def mixes_of(net: nn.Module) -> dict[str, MixCoefficients]:
    return {name: module for name, module in net.named_modules() if isinstance(module, MixCoefficients)}


def test_mixes_in_all_places_can_be_held_at_constants() -> None:
    net = shake(gpt(both("moa")))
    means = {name: 0 * mix.base.detach() + 0.5 for name, mix in mixes_of(net).items()}
    assert sorted(hold_mixes(net, means)) == sorted(means)
    assert {net.blocks[0].norm1.config.mixing, net.blocks[1].attn.output_gate.config.mixing} == {"la"}
    layer, x = net.blocks[0].norm1, random(2, 3, 24)
    expected = 0.5 * sum(CURVES[name](layer.scale.weight * x) for name in layer.mix.entries)
    assert torch.allclose(layer(x), layer.weight * expected + layer.bias)


@pytest.mark.parametrize("place", ["attention_gate", "pointwise_norm"])
def test_no_export_takes_a_net_with_such_a_place_for_a_stock_one(place: str) -> None:
    swiglu = {"form": "gated", "activation": "silu", "bias": False}
    assert not isinstance(stock_architecture(gpt(FFNConfig(**swiglu))), str)
    assert place in stock_architecture(gpt(FFNConfig(**swiglu, **{place: "fixed"})))
    model, stock = vit(), vit()
    inject(model, FFNConfig(**{place: "fixed"}))
    assert timm_state(model, stock) is None
