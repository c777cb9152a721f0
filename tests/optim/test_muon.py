"""MuonAdamW: orthogonalised updates for the matrices that patterns name, torch's AdamW for the rest, steps skipped
where a gradient is not finite."""

import copy

import pytest
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

from moa_lightning import FFNConfig, UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import MuonAdamW, OptimizerConfig, build_optimizer, parameter_groups
from moa_lightning.optim.muon import orthogonalized
from tests.models.nets import shake

MUON = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1, warmup_steps=0, schedule="constant")


def gpt(moe: MoEConfig = MoEConfig(), ffn: FFNConfig = FFNConfig("moa", bias=True)) -> GPT:  # noqa: B008
    return GPT(GPTConfig(depth=2, dim=16, num_heads=2), ffn, vocab_size=11, context_length=8, moe=moe)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix_optimizer(weight: Tensor, **options: float) -> MuonAdamW:
    return MuonAdamW([{"params": [weight], "momentum": 0.9, "weight_decay": 0.1, "lr": 0.02, **options}])


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (3, 12, 5)])
def test_newton_schulz_is_timms(shape: tuple[int, ...]) -> None:
    g = random(*shape)
    theirs = zeropower_via_newtonschulz(g, 5, [(3.4445, -4.7750, 2.0315)]).float()
    assert (
        orthogonalized(g).float() - theirs
    ).norm() < 0.06 * theirs.norm()  # bfloat16: timm's is 0.02 from float64, ours 0.03
    values = torch.linalg.svdvals(orthogonalized(g).float())
    assert values.min() > 0.5
    assert values.max() < 1.35


def test_a_step_is_the_formula() -> None:
    weight, first, second = random(6, 10), random(6, 10, seed=1), random(6, 10, seed=2)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = matrix_optimizer(parameter)
    momentum = torch.zeros(6, 10)
    for gradient in (first, second):
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalized(0.1 * gradient + 0.9 * momentum).float()
        weight = (1 - 0.02 * 0.1) * weight - 0.02 * 0.2 * 10**0.5 * update
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-3, atol=1e-4)
    size = 0.2 * 10**0.5 * update.square().mean().sqrt()
    assert 0.15 < size < 0.25  # an AdamW update's


def test_stacked_matrices_are_treated_each_for_itself() -> None:
    stacked = torch.nn.Parameter(random(12, 6, 10))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    stacked.grad = random(12, 6, 10, seed=1) * torch.tensor([1.0, 100.0, 0.01] * 4)[:, None, None]
    for parameter, gradient in zip(single, stacked.grad, strict=True):
        parameter.grad = gradient.clone()
    matrix_optimizer(stacked).step()
    for index, parameter in enumerate(single):
        matrix_optimizer(parameter).step()
        torch.testing.assert_close(stacked[index].detach(), parameter.detach(), rtol=0, atol=1e-4)


def test_all_other_parameters_move_as_under_adamw() -> None:
    net, other = shake(gpt()), shake(gpt())
    muon = build_optimizer(net, MUON, 10)["optimizer"]
    adamw = build_optimizer(other, OptimizerConfig(lr=0.02, warmup_steps=0, schedule="constant"), 10)["optimizer"]
    tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    net(tokens).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    muon.step(), adamw.step()
    matrices = {"attn.qkv.weight", "attn.proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    theirs = dict(other.named_parameters())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, theirs[name])}
    assert moved == {f"blocks.{i}.{name}" for i in (0, 1) for name in matrices}


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = gpt()
    optimizer = build_optimizer(net, MUON, 10)["optimizer"]
    for step, bad in enumerate((False, True, False)):
        for index, parameter in enumerate(net.parameters()):
            parameter.grad = random(*parameter.shape, seed=index + step)
        if bad:
            net.blocks[0].attn.qkv.weight.grad[0, 0] = torch.nan
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        after = (net.state_dict(), optimizer.state_dict()["state"])
        same = [torch.equal(before[0][name], after[0][name]) for name in after[0]]
        assert all(same) if bad else not any(same)
        if bad:
            for number, state in before[1].items():
                assert all(torch.equal(value, after[1][number][name]) for name, value in state.items())


def test_experts_are_in_the_groups_of_what_each_one_has() -> None:
    net = gpt(MoEConfig(4, 2, shared_experts=1))
    patterns = OptimizerConfig().muon_parameters
    names = {id(p): name for name, p in net.named_parameters()}
    groups = {
        group["name"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(net, 1e-3, 0.1, 1.0, patterns)
    }
    mlp = "blocks.0.mlp."
    assert {
        mlp + f"{part}.{name}.weight" for part in ("experts", "shared") for name in ("up_proj", "down_proj")
    } <= groups["muon"]
    assert mlp + "experts.up_proj.bias" in groups["no_decay"]  # (E, h): a vector of each expert
    assert {mlp + "router.weight", "embed.weight", "head.weight"} <= groups["decay"]
    assert {mlp + "experts.up_mix.base", mlp + "experts.up_mix.gate_weight"} <= groups["mixing"]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("*.attention.weight", "'\\*.attention.weight' matches no parameter"),
        ("*norm*", "matches blocks.0.norm1.weight of shape"),
        ("*", "is no matrix that a block multiplies with"),
        ("embed.weight", "matches embed.weight"),
        ("head.weight", "matches head.weight"),
        ("*router.weight", "matches blocks.0.mlp.router.weight"),
        ("*gate_weight", "up_mix.gate_weight"),
    ],
)
def test_patterns_that_match_nothing_or_too_much_are_refused(pattern: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_optimizer(
            gpt(MoEConfig(4, 2)), OptimizerConfig(name="muon", muon_parameters=("*.qkv.weight", pattern)), 10
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "lion"}, "optimizer.name is 'lion'"),
        ({"name": "muon", "muon_parameters": ()}, "optimizer.muon_parameters is empty"),
        ({"momentum": 1.0}, "optimizer.momentum is 1.0"),
        ({"decay_shape": "exp"}, "optimizer.decay_shape is 'exp'"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        OptimizerConfig(**options)
