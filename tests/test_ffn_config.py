"""FFNConfig refuses bad values by name, and the closed-form costs are what torch counts."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moa_lightning import FeedForward, FFNConfig, UserError
from moa_lightning.feedforward import elementwise_per_token, flops_per_token, matched_hidden_dim, parameter_count
from tests.layers import every_combination


@every_combination
def test_parameter_count_is_the_sum_over_the_parameters(config: FFNConfig) -> None:
    layer = FeedForward(6, config, hidden_dim=10)
    assert layer.parameter_count() == sum(p.numel() for p in layer.parameters())
    assert parameter_count(6, 10, config) == layer.parameter_count()


@every_combination
def test_flops_are_what_torch_counts(config: FFNConfig) -> None:
    layer = FeedForward(6, config, hidden_dim=10)
    tokens = 7
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, 6))
    counted = counter.get_total_flops() / tokens
    assert layer.flops_per_token() == counted == flops_per_token(6, 10, config)


def test_elementwise_work_of_known_layers() -> None:
    relu_plain = elementwise_per_token(8, FFNConfig("fixed", activation="relu"))
    assert relu_plain == 8
    assert elementwise_per_token(8, FFNConfig("fixed", "gated", activation="relu")) == 2 * relu_plain
    la = FFNConfig("la", activation="relu", dictionary=("identity", "relu"))
    assert elementwise_per_token(8, la) == 8 * (0 + 1) + 8 * 2 * 2
    both = FFNConfig("la", "gated", activation="relu", dictionary=("identity", "relu"), branches="both")
    assert elementwise_per_token(8, both) == 2 * (8 * 1 + 8 * 2 * 2) + 8
    pairs = FFNConfig("la", "gated", activation="relu", dictionary=("identity", "relu"), branches="pairs")
    assert elementwise_per_token(8, pairs) == 2 * 8 * 1 + 8 * 2 * 4


@every_combination
def test_matched_width_is_the_nearest(config: FFNConfig) -> None:
    """One multiple of hidden width more or less is not closer to the baseline's cost."""
    dim, baseline_hidden = 64, 256
    for by, multiple in itertools.product(("parameters", "flops"), (1, 8)):
        config = FFNConfig(**{**config.as_dict(), "multiple_of": multiple})
        cost = parameter_count if by == "parameters" else flops_per_token
        target = cost(dim, baseline_hidden, FFNConfig(bias=config.bias))
        hidden = matched_hidden_dim(dim, config, baseline_hidden, by)
        assert hidden % multiple == 0
        distance = abs(cost(dim, hidden, config) - target)
        assert distance <= (cost(dim, multiple, config) - cost(dim, 0, config)) / 2
        assert distance <= abs(cost(dim, hidden + multiple, config) - target)
        assert distance <= abs(cost(dim, hidden - multiple, config) - target)


def test_matching_against_a_named_baseline_and_hidden_ratio() -> None:
    swiglu = FFNConfig("fixed", "gated", "silu", bias=False)
    gelu = FFNConfig(bias=False)
    assert matched_hidden_dim(96, swiglu, 384, "flops") == 256  # two thirds: three projections instead of two
    assert matched_hidden_dim(96, gelu, 256, "parameters", baseline=swiglu) == 384
    assert matched_hidden_dim(96, swiglu, 384, "width") == 384
    assert FeedForward(8, FFNConfig(hidden_ratio=2.5)).hidden_dim == 20
    assert FeedForward(96, FFNConfig("fixed", "gated", "silu", bias=False, match="parameters")).hidden_dim == 256
    assert FeedForward(8, FFNConfig(hidden_ratio=2.5), hidden_dim=3).hidden_dim == 3


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mixing": "mao"}, ("ffn.mixing", "mao", "fixed", "la", "moa")),
        ({"form": "glu"}, ("ffn.form", "glu", "plain", "gated")),
        ({"form": "gated", "branches": "two"}, ("ffn.branches", "two", "one", "both", "pairs")),
        ({"gate": "relu"}, ("ffn.gate", "relu", "sigmoid", "softmax", "tanh")),
        ({"init": "zero"}, ("ffn.init", "zero", "identity", "paper")),
        ({"base": "frozen"}, ("ffn.base", "frozen", "trained", "held")),
        ({"match": "params"}, ("ffn.match", "params", "width", "parameters", "flops")),
        ({"activation": "glue"}, ("ffn.activation", "glue", "gelu", "polynorm")),
        ({"mixing": "la", "init": "paper", "activation": "glue"}, ("ffn.activation", "glue", "gelu")),
        ({"mixing": "la", "dictionary": ("gelu", "glue")}, ("ffn.dictionary", "glue", "gelu", "tanh")),
        ({"mixing": "la", "dictionary": ("gelu", "polynorm")}, ("ffn.dictionary", "polynorm", "gelu", "tanh")),
        ({"mixing": "la", "dictionary": ("gelu", "xielu")}, ("ffn.dictionary", "xielu", "gelu", "tanh")),
        ({"mixing": "la", "dictionary": ()}, ("ffn.dictionary",)),
        ({"mixing": "la", "dictionary": "gelu"}, ("ffn.dictionary", "'gelu'", "list")),
        ({"mixing": "moa", "dictionary": ("gelu", "relu", "gelu")}, ("ffn.dictionary", "gelu", "twice")),
        ({"mixing": "moa", "activation": "silu", "dictionary": ("gelu", "relu")}, ("silu", "ffn.dictionary", "paper")),
        ({"branches": "both"}, ("ffn.branches", "both", "gated")),
        ({"hidden_ratio": 0.0}, ("ffn.hidden_ratio", "0.0")),
        ({"hidden_ratio": float("nan")}, ("ffn.hidden_ratio", "nan")),
        ({"multiple_of": 0}, ("ffn.multiple_of", "0")),
        ({"mixing": "moa", "gates": "random"}, ("ffn.gates", "random", "trained", "frozen", "shuffled")),
        ({"mixing": "la", "gates": "frozen"}, ("ffn.gates", "frozen", "moa", "la")),
        ({"start_from": "runs/x"}, ("ffn.start_from", "LA", "fixed")),
        ({"gate_std": 0.0}, ("ffn.gate_std", "0.0")),
        ({"hidden_extra": -1}, ("ffn.hidden_extra", "-1")),
        ({"bias": "no"}, ("ffn.bias", "no", "true or false")),
        ({"gate_bias": "no"}, ("ffn.gate_bias", "no", "true or false")),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_its_field_and_the_choices(given: dict, expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        FFNConfig(**given)
    message = str(caught.value)
    assert [word for word in expected if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("branches", ["both", "pairs"])
def test_two_sided_identity_start_needs_identity(branches: str) -> None:
    given = {"form": "gated", "branches": branches, "dictionary": ("gelu", "relu")}
    with pytest.raises(UserError, match=r"'identity'.*ffn\.dictionary"):
        FFNConfig("moa", **given)
    FFNConfig("moa", init="paper", **given)
    FFNConfig("moa", **{**given, "branches": "one"})


def test_config_survives_plain_values() -> None:
    config = FFNConfig("moa", "gated", dictionary=["gelu", "identity"], branches="both", gate="tanh")
    assert config == FFNConfig(**config.as_dict())
    assert hash(config) == hash(FFNConfig(**config.as_dict()))
    assert config.as_dict()["dictionary"] == ["gelu", "identity"]


def test_a_width_below_one_unit_is_refused() -> None:
    with pytest.raises(UserError, match="hidden"):
        FeedForward(8, FFNConfig(hidden_ratio=0.01))


def test_a_given_width_below_one_is_named_as_it_was_given() -> None:
    with pytest.raises(UserError, match=r"^hidden_dim is -3; give"):
        FeedForward(4, FFNConfig(), hidden_dim=-3)
