"""Coefficients of a mix: shapes, precision, starts, which of them learn, and what a mix stores."""

import numpy as np
import pytest
import torch

from moa_lightning import FeedForward, FFNConfig
from moa_lightning.activations import DICTIONARY
from moa_lightning.kernels import mix
from moa_lightning.mixing import FixedActivation, Mixing, PairMixing, gate_at_zero, gate_function
from tests import reference
from tests.layers import FORMS, bytes_of, every_form, every_gate, random_input, randomise, saved_tensors

K = len(DICTIONARY)
ALL_GATES = pytest.mark.parametrize("gate", [None, "sigmoid", "softmax", "tanh"])
AXES = pytest.mark.parametrize("kind", [Mixing, PairMixing])


def build(kind: type[Mixing] | type[PairMixing], gate, dim: int = 5, **options) -> Mixing | PairMixing:
    start = (1,) if kind is Mixing else (1, 0)
    return kind(dim, DICTIONARY, start, gate, **options)


@every_gate
@pytest.mark.parametrize("axes", [1, 2])
def test_gate_functions_agree_with_the_reference(gate: str, axes: int) -> None:
    logits = random_input(4, *(3,) * axes)
    expected = reference.gate_values(logits.reshape(4, -1).numpy(), gate).reshape(logits.shape)
    np.testing.assert_allclose(gate_function(logits, gate, axes).numpy(), expected, rtol=1e-13)
    at_zero = gate_function(torch.zeros(1, *(3,) * axes, dtype=torch.float64), gate, axes)
    np.testing.assert_allclose(at_zero.numpy(), gate_at_zero(gate, 3**axes), rtol=1e-15)


@ALL_GATES
@AXES
@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)], ids=str)
def test_one_coefficient_an_entry_and_token(kind, gate, tokens: tuple[int, ...]) -> None:
    mixing = build(kind, gate)
    assert mixing.coefficients(torch.randn(*tokens, 5)).shape == (*tokens, *(K,) * mixing.entry_axes)
    assert mixing.entries == DICTIONARY


def test_attributes_and_shapes_within_a_layer() -> None:
    x = torch.randn(2, 3, 8)
    expected = {
        ("plain", "one"): {"up_mix": (2, 3, K)},
        ("gated", "one"): {"gate_mix": (2, 3, K)},
        ("gated", "both"): {"gate_mix": (2, 3, K), "up_mix": (2, 3, K)},
        ("gated", "pairs"): {"pair_mix": (2, 3, K, K)},
    }
    for form, branches in FORMS:
        for mixing in ("la", "moa"):
            mixes = FeedForward(8, FFNConfig(mixing, form, branches=branches)).mixings()
            shapes = {name: tuple(mix.coefficients(x).shape) for name, mix in mixes.items()}
            assert shapes == expected[form, branches]
    fixed = FeedForward(8, FFNConfig("fixed", "gated", "silu"))
    assert isinstance(fixed.gate_mix, FixedActivation)
    assert torch.equal(fixed.gate_mix.coefficients(x), torch.ones(2, 3, 1))
    assert fixed.mixings() == {}


@ALL_GATES
@AXES
def test_coefficients_keep_float32_in_bf16(kind, gate) -> None:
    mixing = build(kind, gate)
    mixing.base.data.fill_(1.003)
    for x in (torch.randn(3, 5), torch.randn(3, 5).bfloat16()):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                c = mixing.coefficients(x)
            assert c.dtype == torch.float32
            torch.testing.assert_close(c, torch.full_like(c, 1.003), rtol=0, atol=1e-6)
    assert mixing.double().coefficients(torch.randn(3, 5).double()).dtype == torch.float64


def test_gate_logits_are_computed_in_float32_under_autocast() -> None:
    mixing = build(Mixing, "tanh", dim=200)
    randomise(mixing)
    x = random_input(6, 200, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = mixing.coefficients(x)
    torch.testing.assert_close(under_autocast, mixing.coefficients(x), rtol=0, atol=1e-6)


def test_an_exported_gate_is_computed_in_float32_under_autocast() -> None:
    mixing = build(Mixing, "tanh", dim=200)
    randomise(mixing)
    x = random_input(6, 200, dtype=torch.float32)
    exported = torch.export.export(mixing, (x,)).module()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = exported(x)
    torch.testing.assert_close(under_autocast, mixing(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", [None, "sigmoid"])
def test_a_small_difference_of_coefficients_reaches_a_bf16_output(gate) -> None:
    """1.003 u − u is 0.003 u; with coefficients rounded to bf16 it would be 0."""
    mixing = Mixing(1, ("identity", "leaky_relu"), (0,), gate)
    mixing.base.data.copy_(torch.tensor([1.003, -1.0]))
    u = torch.full((1, 4), 8.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = mix(u, mixing(torch.zeros(1, 1, dtype=torch.bfloat16)), mixing.entries)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.full((1, 4), 0.024), rtol=0.01, atol=0)


# --- starts -----------------------------------------------------------------------------------------------------------


@ALL_GATES
@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("entries", range(1, K + 1))
def test_identity_start_is_exactly_one_hot(kind, gate, dtype: torch.dtype, entries: int) -> None:
    start = (entries - 1,) if kind is Mixing else (entries - 1, 0)
    mixing = kind(5, DICTIONARY[:entries], start, gate, gate_bias=gate is not None).to(dtype)
    c = mixing.coefficients(torch.randn(4, 5, dtype=dtype))
    expected = torch.zeros_like(c)
    expected[(slice(None), *start)] = 1
    assert torch.equal(c, expected)


@every_gate
@AXES
def test_paper_start_with_held_base_is_the_bare_gate(kind, gate: str) -> None:
    mixing = build(kind, gate, dim=64, init="paper", train_base=False).double()
    mixing.reset_parameters(torch.Generator().manual_seed(0))
    assert mixing.gate_weight.std().item() == pytest.approx(0.02, rel=0.2)
    mixing.gate_weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = random_input(6, 64)
    bare = reference.gate_values((x @ mixing.gate_weight.detach().T).numpy(), gate)
    np.testing.assert_allclose(mixing.coefficients(x).detach().numpy().reshape(6, -1), bare, rtol=0, atol=1e-15)
    assert mixing.gate_bias is None


@AXES
def test_paper_start_of_la_is_the_mean(kind) -> None:
    c = build(kind, None, init="paper").coefficients(torch.randn(2, 5))
    torch.testing.assert_close(c, torch.full_like(c, 1 / K ** c[0].dim()))


def test_starts_are_drawn_from_the_generator() -> None:
    first, second = build(Mixing, "sigmoid", init="paper"), build(Mixing, "sigmoid", init="paper")
    assert not torch.equal(first.gate_weight, second.gate_weight)
    for mixing in (first, second):
        mixing.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(first.gate_weight, second.gate_weight)


# --- what learns ------------------------------------------------------------------------------------------------------


@every_gate
@every_form
def test_every_gate_row_learns_from_the_identity_start(form: str, branches: str, gate: str) -> None:
    layer = FeedForward(8, FFNConfig("moa", form, branches=branches, gate=gate, gate_bias=True), hidden_dim=16)
    layer(torch.randn(10, 8)).square().sum().backward()
    for name, mixing in layer.mixings().items():
        assert (mixing.gate_weight.grad.norm(dim=-1) > 0).all(), name
        assert (mixing.gate_bias.grad != 0).all(), name
        assert (mixing.base.grad != 0).all(), name


@every_gate
def test_a_gate_at_the_end_of_its_range_gets_no_gradient_of_the_wrong_sign(gate: str) -> None:
    mixing = build(Mixing, gate, dim=1, gate_bias=True)
    with torch.no_grad():
        mixing.base.copy_(torch.linspace(-1.7, 1.9, K))
        mixing.gate_bias.copy_(torch.tensor([-25.0, 25, -17, 17, -20, 20, 0]))
    c = mixing.coefficients(torch.zeros(1, 1))
    if gate == "softmax":  # the gradient of one entry: its own slope is positive, those of the others negative
        c[0, 1].backward()
        assert mixing.gate_bias.grad[1] >= 0
        assert (mixing.gate_bias.grad[[0, 2, 3, 4, 5, 6]] <= 0).all()
    else:
        c.sum().backward()
        assert (mixing.gate_bias.grad >= 0).all()
        exact = mixing.gate_bias.detach().double().requires_grad_()
        gate_function(exact, gate, 1).sum().backward()
        torch.testing.assert_close(mixing.gate_bias.grad.double(), exact.grad, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("mixing", ["la", "moa"])
@every_form
def test_held_base_does_not_learn_and_is_kept(form: str, branches: str, mixing: str) -> None:
    layer = FeedForward(8, FFNConfig(mixing, form, branches=branches, base="held"), hidden_dim=16)
    names = [f"{name}.base" for name in layer.mixings()]
    assert not set(names) & {name for name, _ in layer.named_parameters()}
    assert set(names) <= set(layer.state_dict())
    before = {name: layer.state_dict()[name].clone() for name in names}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(10, 8)).square().sum().backward()
    optimizer.step()
    for name in names:
        assert torch.equal(layer.state_dict()[name], before[name])
        assert not layer.state_dict()[name].requires_grad
    trained = FeedForward(8, FFNConfig(mixing, form, branches=branches), hidden_dim=16)
    assert set(names) <= {name for name, _ in trained.named_parameters()}


@every_gate
@every_form
def test_a_token_is_mixed_by_itself_alone(form: str, branches: str, gate: str) -> None:
    """What keeps a causal language model causal."""
    layer = FeedForward(5, FFNConfig("moa", form, branches=branches, gate=gate), hidden_dim=7).double()
    randomise(layer)
    x = random_input(1, 6, 5)
    changed = x.clone()
    changed[0, 3] += 1
    before, after = layer(x), layer(changed)
    assert not torch.allclose(before[0, 3], after[0, 3])
    others = [0, 1, 2, 4, 5]
    torch.testing.assert_close(before[0, others], after[0, others], rtol=1e-13, atol=1e-13)


# --- memory -----------------------------------------------------------------------------------------------------------


WIDE = {("plain", "one"): 2, ("gated", "one"): 3, ("gated", "both"): 3, ("gated", "pairs"): 3}


@pytest.mark.parametrize("mixing", ["la", "moa"])
@every_form
def test_hidden_sized_tensors_that_a_layer_stores(form: str, branches: str, mixing: str) -> None:
    """The pre-activations and the input of the down projection; else a few numbers a token: x, and per mix the
    coefficients."""
    tokens, hidden = 50, 512
    layer = FeedForward(4, FFNConfig(mixing, form, branches=branches), hidden_dim=hidden)
    with saved_tensors() as saved:
        layer(torch.randn(tokens, 4, requires_grad=True))
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    stored = {tensor.data_ptr(): tensor for tensor in saved if tensor.data_ptr() not in weights}.values()
    wide = [tensor for tensor in stored if tensor.shape[-1] == hidden]
    assert bytes_of(*wide) == WIDE[form, branches] * 4 * tokens * hidden
    entries = layer.config.entries * layer.config.mixed_branches
    assert bytes_of(*stored) - bytes_of(*wide) <= 4 * tokens * (4 + entries)
