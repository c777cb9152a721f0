"""FeedForward against the NumPy float64 reference for every combination, its nesting, its theory, its surroundings."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from moa_lightning import FeedForward, FFNConfig, inject
from moa_lightning.activations import activation_names
from moa_lightning.moe import MoE, MoEConfig
from tests.layers import (
    FORMS,
    GATES,
    assert_agrees,
    every_combination,
    every_form,
    every_gate,
    layer_name,
    random_input,
    randomise,
    reference_values,
    relative,
    spec_of,
)
from tests.reference import FUNCTION, SEVEN, feedforward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_combination
def test_values_and_gradients_agree_with_the_reference(config: FFNConfig, dtype: torch.dtype) -> None:
    layer = FeedForward(5, config, hidden_dim=11).to(dtype)
    randomise(layer)
    assert_agrees(layer, dtype)


@every_form
@pytest.mark.parametrize("mixing", ["la", "moa"])
@pytest.mark.parametrize("dictionary", [("tanh",), ("quick_gelu", "gelu_tanh", "relu")], ids=["one", "three"])
def test_any_dictionary_agrees_with_the_reference(
    mixing: str, form: str, branches: str, dictionary: tuple[str, ...]
) -> None:
    config = FFNConfig(mixing, form, branches=branches, dictionary=dictionary, gate="softmax", init="paper")
    layer = FeedForward(4, config, hidden_dim=6).double()
    randomise(layer)
    if len(dictionary) == 1 and mixing == "moa":  # a softmax over one entry is 1: its gradient is 0, not comparable
        assert layer(random_input(3, 4)).shape == (3, 4)
        c = next(iter(layer.mixings().values()))
        torch.testing.assert_close(c.coefficients(random_input(3, 4)), c.base.expand(3, *c.base.shape))
    else:
        assert_agrees(layer, torch.float64)


@pytest.mark.parametrize("tokens", [(), (1,), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("branches", ["both", "pairs"])
def test_any_number_of_token_axes(branches: str, tokens: tuple[int, ...]) -> None:
    layer = FeedForward(4, FFNConfig("moa", "gated", branches=branches), hidden_dim=6).double()
    randomise(layer)
    x = random_input(*tokens, 4)
    flat = x.reshape(-1, 4).numpy()
    expected, _ = feedforward(reference_values(layer), flat, spec_of(layer.config), np.zeros_like(flat))
    assert relative(layer(x).reshape(-1, 4), expected) < 1e-10


@pytest.mark.parametrize(
    "config",
    [
        *(FFNConfig("moa", form, branches=branches, gate=gate, gate_bias=True)
          for (form, branches) in FORMS for gate in GATES),
        *(FFNConfig("fixed", "gated", activation=name) for name in activation_names()),
    ],
    ids=layer_name,
)  # fmt: skip
def test_the_references_gradients_equal_central_differences(config: FFNConfig) -> None:
    layer = FeedForward(3, config, hidden_dim=4).double()
    randomise(layer)
    p, x, dy = reference_values(layer), random_input(2, 3).numpy(), random_input(2, 3, seed=2).numpy()
    _, gradients = feedforward(p, x, spec_of(config), dy)
    for name in gradients:
        numeric = np.zeros_like(gradients[name])
        for index in np.ndindex(numeric.shape):
            for step in (1e-5, -1e-5):
                moved = {**p, "x": x}
                moved[name] = moved[name].copy()
                moved[name][index] += step
                y, _ = feedforward(moved, moved["x"], spec_of(config), dy)
                numeric[index] += (dy * y).sum() / (2 * step)
        assert np.linalg.norm(gradients[name] - numeric) < 1e-8 * np.linalg.norm(numeric) + 1e-9, name


# --- nesting: fixed in LA in MoA --------------------------------------------------------------------------------------


def same_trunk(config: FFNConfig, source: FeedForward) -> FeedForward:
    """A layer at its start with the projections of `source`."""
    layer = FeedForward(source.dim, config, source.hidden_dim).double()
    for name in ("up_proj", "gate_proj", "down_proj"):
        if getattr(source, name) is not None:
            getattr(layer, name).load_state_dict(getattr(source, name).state_dict())
    return layer


def trunk(config: FFNConfig) -> FeedForward:
    layer = FeedForward(5, config, hidden_dim=11).double()
    randomise(layer)
    return layer


@pytest.mark.parametrize("activation", SEVEN)
@pytest.mark.parametrize("mixing", ["la", "moa"])
@every_form
def test_identity_start_is_exactly_the_fixed_layer(mixing: str, form: str, branches: str, activation: str) -> None:
    fixed = trunk(FFNConfig("fixed", form, activation))
    x = random_input(6, 5)
    for gate in GATES if mixing == "moa" else ("sigmoid",):
        swapped = same_trunk(FFNConfig(mixing, form, activation, branches=branches, gate=gate, gate_bias=True), fixed)
        assert torch.equal(swapped(x), fixed(x))


@every_form
def test_fixed_written_as_la(form: str, branches: str) -> None:
    fixed = trunk(FFNConfig("fixed", form, "silu"))
    la = same_trunk(FFNConfig("la", form, branches=branches, init="paper"), fixed)
    x = random_input(6, 5)
    assert not torch.allclose(la(x), fixed(x))
    with torch.no_grad():
        for name, mixing in la.mixings().items():
            start = {"gate_mix": ("silu",), "pair_mix": ("silu", "identity")}.get(name, ("identity",))
            start = ("silu",) if form == "plain" else start
            mixing.base.zero_()[tuple(SEVEN.index(entry) for entry in start)] = 1.0
    assert torch.equal(la(x), fixed(x))


@every_gate
@every_form
def test_la_written_as_moa(form: str, branches: str, gate: str) -> None:
    la = trunk(FFNConfig("la", form, branches=branches))
    moa = same_trunk(FFNConfig("moa", form, branches=branches, gate=gate, gate_bias=True), la)
    for name, mixing in moa.mixings().items():
        mixing.base.data.copy_(la.mixings()[name].base)
        mixing.gate_weight.data.zero_()
        mixing.gate_bias.data.zero_()
    x = random_input(6, 5)
    torch.testing.assert_close(moa(x), la(x), rtol=1e-13, atol=1e-14)


def test_la_of_both_branches_lies_inside_pairs() -> None:
    both = trunk(FFNConfig("la", "gated", branches="both"))
    pairs = same_trunk(FFNConfig("la", "gated", branches="pairs"), both)
    pairs.pair_mix.base.data.copy_(torch.outer(both.gate_mix.base, both.up_mix.base))
    x = random_input(6, 5)
    torch.testing.assert_close(pairs(x), both(x), rtol=1e-12, atol=1e-13)


# --- what the theory says that one hidden unit can do -----------------------------------------------------------------


@torch.no_grad()
def one_hidden_unit(mixing: str, gate: str = "sigmoid") -> FeedForward:
    """d = 2, h = 1, the unit reads x_2 and writes to y_1; every coefficient 0."""
    layer = FeedForward(2, FFNConfig(mixing, gate=gate, init="paper"), hidden_dim=1).double()
    for value in layer.state_dict().values():
        value.zero_()
    layer.up_proj.weight[0, 1] = 1.0
    layer.down_proj.weight[0, 0] = 1.0
    return layer


def test_one_hidden_unit_of_la_gives_relu_plus_relu_squared() -> None:
    layer = one_hidden_unit("la")
    layer.up_mix.base.data[[SEVEN.index("relu"), SEVEN.index("relu2")]] = 1.0
    x = 3 * random_input(200, 2)
    positive = x[:, 1].clamp(min=0)
    torch.testing.assert_close(layer(x)[:, 0], positive + positive**2, rtol=1e-12, atol=1e-12)


def test_one_hidden_unit_of_moa_gives_a_ridge_of_changing_amplitude() -> None:
    layer = one_hidden_unit("moa", gate="tanh")
    layer.up_mix.gate_weight.data[SEVEN.index("relu"), 0] = 1.7
    x = 3 * random_input(200, 2)
    torch.testing.assert_close(layer(x)[:, 0], torch.tanh(1.7 * x[:, 0]) * x[:, 1].clamp(min=0), rtol=1e-12, atol=1e-12)


# --- starts and surroundings ------------------------------------------------------------------------------------------


def test_trunk_start() -> None:
    layer = FeedForward(64, FFNConfig("moa", "gated", branches="both"), hidden_dim=256)
    for projection in layer.projections():
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not projection.bias.any()


@pytest.mark.parametrize("activation", ["gelu", "polynorm", "xielu"])
def test_a_layer_built_on_meta_gets_its_start_back(activation: str) -> None:
    """What configure_model does with large nets: shape first, memory and values later."""
    config = FFNConfig("fixed", activation=activation) if activation != "gelu" else FFNConfig("moa", base="held")
    with torch.device("meta"):
        layer = FeedForward(4, config)
    layer.to_empty(device="cpu")
    for value in layer.state_dict().values():
        value.fill_(float("nan"))
    layer.reset_parameters(torch.Generator().manual_seed(3))
    expected = FeedForward(4, config)
    expected.reset_parameters(torch.Generator().manual_seed(3))
    for name, value in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@every_form
def test_copy_and_state_dict_round_trip(form: str, branches: str) -> None:
    layer = FeedForward(5, FFNConfig("moa", form, branches=branches, base="held", gate_bias=True), hidden_dim=7)
    randomise(layer)
    x = random_input(4, 5, dtype=torch.float32)
    other = FeedForward(5, layer.config, hidden_dim=7)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_form
def test_functional_call_uses_the_parameters_it_is_given(form: str, branches: str) -> None:
    layer = FeedForward(5, FFNConfig("moa", form, branches=branches), hidden_dim=7).double()
    before = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    randomise(layer, seed=4)
    given = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    x = random_input(4, 5)
    expected = layer(x)
    layer.load_state_dict(before)
    assert torch.equal(torch.func.functional_call(layer, given, (x,)), expected)
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "config",
    [
        FFNConfig("moa", "gated", branches="both", gate="softmax"),
        FFNConfig("moa", "gated", branches="pairs", dictionary=("identity", "gelu", "relu2")),
        FFNConfig("la", dictionary=("identity", "gelu", "quick_gelu")),
    ],
    ids=layer_name,
)
def test_compiles_whole(config: FFNConfig) -> None:
    torch.compiler.reset()  # others have compiled this code too, and torch counts
    layer = FeedForward(4, config, hidden_dim=6).double()
    randomise(layer)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = random_input(3, 4)
    expected, y = layer(x), compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    expected.square().sum().backward()
    y.square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_norm_stands_before_the_down_projection() -> None:
    norm = nn.LayerNorm(7).double()
    layer = FeedForward(5, FFNConfig("fixed", "gated", "silu"), hidden_dim=7, norm=norm).double()
    randomise(layer)
    x = random_input(4, 5)
    hidden = FUNCTION["silu"](layer.gate_proj(x).detach().numpy()) * layer.up_proj(x).detach().numpy()
    centred = hidden - hidden.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    normed = normed * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    expected = normed @ layer.down_proj.weight.detach().numpy().T + layer.down_proj.bias.detach().numpy()
    assert relative(layer(x), expected) < 1e-10


def test_dropout_acts_on_hidden_and_output_while_training_only() -> None:
    torch.manual_seed(0)
    layer = FeedForward(16, FFNConfig("moa"), hidden_dim=64, dropout=0.5)
    randomise(layer)
    x = random_input(500, 16, dtype=torch.float32)
    y = layer(x)
    assert 0.45 < (y == 0).float().mean().item() < 0.55  # the output's own mask
    kept = y[y != 0]
    plain = FeedForward(16, layer.config, hidden_dim=64)
    plain.load_state_dict(layer.state_dict())
    doubled = 2 * plain(x)[y != 0]
    assert not torch.allclose(kept, doubled)  # the hidden mask is there too
    assert torch.equal(layer.eval()(x), plain(x))


def test_bf16_autocast_keeps_the_output_near_float32() -> None:
    layer = FeedForward(32, FFNConfig("moa", "gated", branches="both"), hidden_dim=64)
    randomise(layer)
    x = random_input(10, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = layer(x)
    assert ((y - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize(
    "config",
    [
        FFNConfig(),
        FFNConfig("la"),
        FFNConfig("moa", "gated", branches="both"),
        FFNConfig("moa", "gated", branches="pairs"),
        FFNConfig("moa", attention_gate="moa", pointwise_norm="moa"),
    ],
)
def test_shapes_are_computed_on_meta(config: FFNConfig) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        moe = MoE(16, FFNConfig(config.mixing), MoEConfig(experts=4))
    inject(vit, config)
    logits = vit(torch.empty(2, 3, 32, 32, device="meta"))
    logits.sum().backward()
    assert (logits.shape, logits.device.type) == ((2, 1000), "meta")
    assert moe(torch.empty(2, 8, 16, device="meta"))[0].shape == (2, 8, 16)
