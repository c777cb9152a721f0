"""The dictionary: values and derivatives against the NumPy reference, published figures, extremes, registration."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from moa_lightning import FeedForward, FFNConfig, UserError, activations, register_activation
from moa_lightning.activations import (
    DICTIONARY,
    Activation,
    PolyNorm,
    activation_names,
    is_pointwise,
    module_activation,
    pointwise,
)
from tests import reference
from tests.layers import assert_agrees, randomise
from tests.reference import FUNCTION, SEVEN, SLOPE

POINTS = torch.cat([torch.linspace(-6, 6, 241, dtype=torch.float64), torch.tensor([1e-9, -1e-9, 30.0, -30.0])])
every_pointwise = pytest.mark.parametrize("name", list(FUNCTION))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of one test do not reach the next."""
    monkeypatch.setattr(activations, "_POINTWISE", dict(activations._POINTWISE))


def test_the_dictionary_is_the_papers() -> None:
    assert DICTIONARY == SEVEN
    assert set(activation_names()) == {*FUNCTION, "polynorm", "xielu"}
    assert [name for name in activation_names() if not is_pointwise(name)] == ["polynorm", "xielu"]


@every_pointwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_and_derivatives_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    u = POINTS.to(dtype)
    value, slope = pointwise(name).value_and_derivative(u)
    exact = u.double().numpy()
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(value.double().numpy(), FUNCTION[name](exact), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope.double().numpy(), SLOPE[name](exact), rtol=tolerance, atol=tolerance)


@every_pointwise
def test_stated_derivatives_are_what_autograd_takes(name: str) -> None:
    stated = pointwise(name)
    taken = Activation(name, stated.function, None, stated.cost)
    for ours, theirs in zip(stated.value_and_derivative(POINTS), taken.value_and_derivative(POINTS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert not ours.requires_grad


def test_figures_from_tables() -> None:
    """Φ(1), 1/(1+1/e), tanh(1) to ten digits, and the piecewise ones."""
    figures = {
        ("gelu", 1.0): 0.8413447461,
        ("gelu", -1.0): -0.1586552539,
        ("silu", 1.0): 0.7310585786,
        ("tanh", 1.0): 0.7615941560,
        ("leaky_relu", -3.0): -0.03,
        ("relu2", 3.0): 9.0,
        ("relu2", -3.0): 0.0,
        ("identity", -3.0): -3.0,
    }
    for (name, at), expected in figures.items():
        value = pointwise(name).function(torch.tensor([at], dtype=torch.float64))
        assert value.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", SEVEN)
def test_huge_numbers(name: str) -> None:
    u = torch.tensor([1e30, -1e30, 1e38, -1e38, 90.0, -90.0])
    value, slope = (result.double().numpy() for result in pointwise(name).value_and_derivative(u))
    with np.errstate(over="ignore"):  # cosh
        expected, expected_slope = FUNCTION[name](u.double().numpy()), SLOPE[name](u.double().numpy())
    expected[expected > torch.finfo(torch.float32).max] = np.inf  # of relu2
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-6, atol=1e-30)


def test_leaky_relu_is_a_mix_of_relu_and_identity() -> None:
    """Why single coefficients of a mix are not identifiable."""
    mixed = 0.99 * pointwise("relu").function(POINTS) + 0.01 * POINTS
    torch.testing.assert_close(pointwise("leaky_relu").function(POINTS), mixed)


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("derivative", [None, torch.cos], ids=["autograd", "stated"])
@pytest.mark.parametrize("branches", ["both", "pairs"])
def test_a_users_activation_enters_a_dictionary(branches: str, derivative, monkeypatch: pytest.MonkeyPatch) -> None:
    register_activation("sine", torch.sin, derivative)
    monkeypatch.setitem(reference.FUNCTION, "sine", np.sin)
    monkeypatch.setitem(reference.SLOPE, "sine", np.cos)
    config = FFNConfig("moa", "gated", "sine", dictionary=("identity", "sine", "relu"), branches=branches)
    layer = FeedForward(4, config, hidden_dim=6).double()
    randomise(layer)
    assert_agrees(layer, torch.float64)
    fixed = FeedForward(4, FFNConfig(activation="sine"), hidden_dim=6).double()
    randomise(fixed)
    assert_agrees(fixed, torch.float64)


@pytest.mark.usefixtures("registry")
def test_a_stated_derivative_is_the_one_that_is_used() -> None:
    register_activation("stepped", torch.round, torch.ones_like)
    layer = FeedForward(1, FFNConfig("la", activation="stepped", dictionary=("stepped",)), hidden_dim=1)
    layer.up_proj.weight.data.fill_(1.0)
    layer.down_proj.weight.data.fill_(1.0)
    x = torch.tensor([[0.7]], requires_grad=True)
    layer(x).backward()
    assert x.grad.item() == 1.0


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["gelu", "polynorm", "new"])
def test_a_taken_name_is_refused(name: str) -> None:
    if name == "new":
        register_activation(name, torch.sin)
    before = activation_names()
    with pytest.raises(UserError, match=f"'{name}' is already registered"):
        register_activation(name, torch.cos)
    assert activation_names() == before


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "function",
    [
        lambda u: u.softmax(-1),
        lambda u: u - u.mean(),
        lambda u: u.cumsum(-1),
        lambda u: u.sum(),
        lambda u: u.flip(-1),
        lambda u: u[..., :1],
        lambda u: torch.stack([u, u]),
        lambda u: u.double(),
        lambda u: u.mul_(2),
    ],
    ids=["softmax", "centred", "cumsum", "sum", "flip", "first", "doubled", "widened", "in_place"],
)
def test_a_function_that_couples_numbers_is_refused(function) -> None:
    with pytest.raises(UserError, match="'coupled' must map each number alone"):
        register_activation("coupled", function)
    assert "coupled" not in activation_names()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("cut", torch.Tensor.detach, "'cut' must be differentiable by autograd, or come with its derivative"),
        ("number", 3, "'number' is 3; give a name and a function"),
        ("", torch.sin, "give a name and a function"),
    ],
)
def test_what_is_no_function_or_loses_the_gradient_is_refused(name: str, function, words: str) -> None:
    with pytest.raises(UserError, match=words):
        register_activation(name, function)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("derivative", [3, lambda u: torch.cos(u).double()], ids=["number", "double"])
def test_what_is_no_derivative_is_refused(derivative) -> None:
    with pytest.raises(UserError, match="the derivative of activation 'sine'"):
        register_activation("sine", torch.sin, derivative)


@pytest.mark.usefixtures("registry")
def test_a_derivative_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"derivative of activation 'scaled'.*shape"):
        register_activation("scaled", lambda u: 2 * u, lambda u: torch.tensor(2.0))


@pytest.mark.parametrize("name", ["polynorm", "xielu"])
def test_activations_with_parameters_do_not_enter_a_mix(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*only serves the fixed form.*known: identity"):
        pointwise(name)


def test_an_unknown_module_is_named_with_the_known() -> None:
    with pytest.raises(UserError, match=r"'glue'; known: identity.*xielu"):
        module_activation("glue")


# --- PolyNorm and xIELU (their agreement with the reference as layers is in test_feedforward) -------------------------


def test_polynorm_starts_as_the_mean_of_three_normalised_powers() -> None:
    u = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    powers = [u**p / (u ** (2 * p)).mean(-1, keepdim=True).sqrt() for p in (1, 2, 3)]
    torch.testing.assert_close(PolyNorm().double()(u), sum(powers) / 3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(PolyNorm().double()(u), PolyNorm().double()(100 * u), rtol=1e-5, atol=1e-5)


def test_xielu_starts_at_the_published_curve() -> None:
    """α_p = α_n = 0.8, β = 0.5: 0.8 u² + 0.5 u above 0, 0.8 (e^u − 1 − u) + 0.5 u below; slope 0.5 at 0."""
    curve = module_activation("xielu").double()
    u = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = curve(u)
    expected = [0.8 * 4 + 1.0, 0.8 * (math.exp(-2) - 1 + 2) - 1.0, 0.0]
    assert value.tolist() == pytest.approx(expected, abs=1e-6)
    value.sum().backward()
    assert u.grad[2].item() == 0.5
    assert curve(torch.tensor([-1e4, 1e4], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", ["polynorm", "xielu"])
def test_modules_compute_in_float32_and_return_the_inputs_dtype(name: str) -> None:
    module: nn.Module = module_activation(name)
    u = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = module(u)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, module(u.float()).bfloat16())
