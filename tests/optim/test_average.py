"""The average of the weights: its recursion, what is averaged, and the exchange with the weights."""

import pytest
import torch
from torch import nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.optim import OptimizerConfig, WeightAverage, net_weights


def gpt(seed: int = 0) -> GPT:
    net = GPT(GPTConfig(1, 16, 2, tie_embeddings=True), FFNConfig("moa"), 11, 8, seed)
    net.blocks[0].attn.qkv.weight.requires_grad_(False)
    return net


@torch.no_grad()
def move(net: nn.Module, step: int) -> None:
    for number, parameter in enumerate(net.parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number)))


def test_it_is_the_mean_that_forgets() -> None:
    net, decay, steps = gpt(), 0.8, 60
    average = WeightAverage(net, decay)
    expected = {name: weight.detach().double() for name, weight in net.named_parameters() if weight.requires_grad}
    assert dict(average.named_parameters()).keys() == expected.keys()
    for step in range(steps):
        move(net, step)
        average.follow(net, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, weight in net.named_parameters():
            if weight.requires_grad:
                expected[name] = d * expected[name] + (1 - d) * weight.detach().double()
    for name, value in average.named_parameters():
        assert (value - expected[name]).norm() < 1e-5 * expected[name].norm(), name
        assert not value.requires_grad
    assert decay == 36 / 45  # the factor has reached its bound within the test


def test_the_exchange_gives_the_net_the_averages_and_nothing_is_lost() -> None:
    net = gpt()
    average = WeightAverage(net, 0.9)
    move(net, 0)
    places = [parameter.data_ptr() for parameter in net.parameters()]
    weights, averages = ({k: v.clone() for k, v in part.state_dict().items()} for part in (net, average))
    average.exchange(net)
    checkpoint = {f"net.{name}": value for name, value in weights.items()}
    checkpoint |= {f"average.{name}": value for name, value in averages.items()}
    for name, value in net_weights({"state_dict": checkpoint}).items():
        assert torch.equal(net.state_dict()[name], value), name  # tied: both names; and the one that is not trained
    assert places == [parameter.data_ptr() for parameter in net.parameters()]
    average.exchange(net)
    for part, before in ((net, weights), (average, averages)):
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert not torch.equal(averages["embed.weight"], weights["embed.weight"])


def test_which_weights_a_checkpoint_gives() -> None:
    state = {"net.a": torch.zeros(1), "net.b": torch.zeros(1), "average.a": torch.ones(1), "loss.center": torch.ones(1)}
    whole = {"state_dict": state}
    assert net_weights(whole) == net_weights(whole, "average") == {"a": 1.0, "b": 0.0}
    last = {**whole, "hyper_parameters": {"optimizer": {"evaluate": "last"}}}
    assert net_weights(last) == net_weights(whole, "last") == {"a": 0.0, "b": 0.0}
    with pytest.raises(UserError, match="kept no average"):
        net_weights({"state_dict": {"net.a": torch.zeros(1)}}, "average")


@pytest.mark.parametrize("options", [{"average_decay": 1.0}, {"average_decay": -0.1}, {"evaluate": "both"}])
def test_impossible_averages_are_refused_by_name(options: dict) -> None:
    with pytest.raises(UserError, match=f"optimizer.{next(iter(options))}"):
        OptimizerConfig(**options)
