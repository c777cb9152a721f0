"""Schedules at their corners, and against the official DINO schedules."""

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from moa_lightning.errors import UserError
from moa_lightning.optim import OptimizerConfig, build_optimizer, check_branch, cosine_schedule, learning_rate_factor
from tests.official import EXACT, needs_official, official

TOTAL, WARMUP = 100, 10


def factors(total: int = TOTAL, **options) -> list[float]:
    """The learning rate of every optimiser step in units of the peak."""
    config = OptimizerConfig(**{"warmup_steps": WARMUP, **options})
    return [learning_rate_factor(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_evenly_to_the_peak_and_wastes_no_step(schedule: str) -> None:
    found = factors(schedule=schedule)
    assert found[:WARMUP] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    assert found[WARMUP] == pytest.approx(1.0)
    assert max(found) == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(found[WARMUP:], found[WARMUP + 1 :], strict=False))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_end_of_the_run_is_the_final_factor(schedule: str, final: float) -> None:
    config = OptimizerConfig(warmup_steps=WARMUP, schedule=schedule, final_lr_factor=final)
    assert learning_rate_factor(TOTAL, TOTAL, config) == pytest.approx(final)
    assert learning_rate_factor(TOTAL + 5, TOTAL, config) == pytest.approx(final)
    assert final < learning_rate_factor(TOTAL - 1, TOTAL, config) < final + 0.06  # the last step still learns


def test_half_way_through_the_decay() -> None:
    middle = WARMUP + (TOTAL - WARMUP) // 2
    assert factors(schedule="cosine", final_lr_factor=0.2)[middle] == pytest.approx(0.6)
    assert factors(schedule="linear", final_lr_factor=0.2)[middle] == pytest.approx(0.6)
    quarter = WARMUP + (TOTAL - WARMUP) / 4
    cosine = learning_rate_factor(quarter, TOTAL, OptimizerConfig(warmup_steps=WARMUP))
    assert cosine == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_wsd_stays_at_the_peak_until_the_last_share() -> None:
    found = factors(schedule="wsd", decay_fraction=0.25)
    assert found[WARMUP:76] == [1.0] * (76 - WARMUP)
    assert found[76:] == pytest.approx([left / 25 for left in range(24, 0, -1)])


def test_wsd_decays_as_one_minus_the_root_of_the_way() -> None:
    found = factors(schedule="wsd", decay_fraction=0.25, decay_shape="1-sqrt", final_lr_factor=0.1)
    assert found[WARMUP:76] == [1.0] * (76 - WARMUP)
    assert found[76:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(way / 25)) for way in range(1, 25)])


def test_before_its_decay_a_run_of_any_length_is_the_constant_one() -> None:
    constant = factors(total=400, schedule="constant")
    for total in (100, 200, 400):
        stable = round(total * 0.75) + 1
        assert factors(total=total, schedule="wsd", decay_fraction=0.25)[:stable] == constant[:stable]


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "decay", "total"), [(50, 0.8, 100), (50, 1.0, 60), (30, 0.5, 40), (50, 0.2, 52)])
def test_a_decay_that_begins_within_the_warm_up_is_no_jump(shape: str, warmup: int, decay: float, total: int) -> None:
    found = factors(total=total, warmup_steps=warmup, schedule="wsd", decay_fraction=decay, decay_shape=shape)
    falling = factors(total=total, warmup_steps=0, schedule="wsd", decay_fraction=decay, decay_shape=shape)
    peak = found.index(max(found))
    assert found[:peak] == [(step + 1) / warmup for step in range(peak)]
    assert found[peak + 1 :] == falling[peak + 1 :]
    assert max(a - b for a, b in pairwise(found)) <= max(a - b for a, b in pairwise(falling))


def test_a_decay_within_the_warm_up_is_no_branch_of_a_constant_run() -> None:
    config = OptimizerConfig(schedule="wsd", decay_fraction=0.8, warmup_steps=50)
    for step, fits in ((30, True), (45, False)):
        schedule = build_optimizer(nn.Linear(2, 2), replace(config, schedule="constant"), 100)["lr_scheduler"]
        with warnings.catch_warnings(action="ignore"):
            for _ in range(step):
                schedule["scheduler"].step()
        with nullcontext() if fits else pytest.raises(UserError, match=f"checkpoint of step {step} has"):
            check_branch(schedule["scheduler"], config, 100)


def test_constant_stays_constant_whatever_the_final_factor() -> None:
    assert factors(schedule="constant", final_lr_factor=0.3)[WARMUP:] == [1.0] * (TOTAL - WARMUP)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert factors(warmup_steps=0)[0] == 1.0


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert factors(total=5, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_optimizer_follows_the_schedule_in_every_group() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    config = OptimizerConfig(lr=0.5, warmup_steps=4, final_lr_factor=0.1)
    built = build_optimizer(net, config, 12)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]
    assert schedule["interval"] == "step"
    for step in range(12):
        expected = 0.5 * learning_rate_factor(step, 12, config)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
        optimizer.step()
        schedule["scheduler"].step()


def test_the_optimizer_is_adamw_as_configured() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig(betas=[0.8, 0.9], eps=1e-7), 10)["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-7)


@pytest.mark.parametrize("samples", [256, 512, 4096])
def test_a_rate_for_a_reference_batch_grows_with_the_batch(samples: int) -> None:
    config = OptimizerConfig(lr=1.5e-4, reference_batch=256, warmup_fraction=0.05)
    found = config.of_run(samples, 800)
    assert (found.lr, found.warmup_steps) == (pytest.approx(1.5e-4 * samples / 256), 40)
    assert found.of_run(samples, 800) == found, "once is enough"
    assert OptimizerConfig(warmup_steps=7).of_run(None, 800) == OptimizerConfig(warmup_steps=7)
    with pytest.raises(UserError, match="reference_batch needs data"):
        config.of_run(None, 800)


@needs_official
def test_learning_rates_are_the_official_ones_after_the_warm_up() -> None:
    """Base 5e-4, final 1e-6, 10 epochs of 7 steps, 2 epochs of warm-up.

    Ours warms up from lr / warmup at the first step, the official schedule from 0 (its first step learns nothing):
    by design. So ours with one warm-up step less is the official sequence without that first step, exactly.
    """
    rates = official("dino_lr_schedule_base5e-4_final1e-6_epochs10_iters7_warmup2").tolist()
    same = factors(total=70, warmup_steps=14, final_lr_factor=1e-6 / 5e-4)
    assert [5e-4 * f for f in same[14:]] == pytest.approx(rates[14:], rel=EXACT, abs=0)
    shifted = factors(total=69, warmup_steps=13, final_lr_factor=1e-6 / 5e-4)
    assert rates[0] == 0.0
    assert [5e-4 * f for f in shifted] == pytest.approx(rates[1:], rel=EXACT, abs=0)


@needs_official
@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("dino_wd_schedule_0.04_0.4_epochs10_iters7", 0.04, 0.4),
        ("dino_momentum_schedule_0.996_1_epochs10_iters7", 0.996, 1.0),
    ],
)
def test_weight_decay_and_momentum_are_the_official_ones(name: str, start: float, end: float) -> None:
    ours = [cosine_schedule(start, end, step / 70) for step in range(70)]
    assert ours == pytest.approx(official(name).tolist(), rel=EXACT, abs=0)


def test_a_cosine_stays_at_its_ends_outside_the_run() -> None:
    assert cosine_schedule(0.3, 0.7, -1) == pytest.approx(0.3)
    assert cosine_schedule(0.3, 0.7, 2) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.0}, "optimizer.lr is 0.0"),
        ({"lr": float("nan")}, "optimizer.lr is nan"),
        ({"lr": float("inf")}, "optimizer.lr is inf"),
        ({"weight_decay": float("inf")}, "optimizer.weight_decay is inf"),
        ({"eps": 0.0}, "optimizer.eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"mixing_lr_factor": -1.0}, "mixing_lr_factor"),
        ({"gate_lr_factor": -1.0}, "gate_lr_factor"),
        ({"final_lr_factor": -0.1}, "final_lr_factor"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
        ({"reference_batch": 0}, "reference_batch"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"schedule": "cosinus"}, "cosinus.*wsd"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("before", "steps", "total", "fits"),
    [
        ("constant", 4, 8, True),  # the decay begins at step 4
        ("constant", 6, 8, False),
        ("wsd", 6, 8, True),  # the same run goes on
        ("wsd", 6, 12, False),  # its rate has fallen and would rise again
        ("constant", 1, 1, True),  # within the warm-up
    ],
)
def test_a_decay_starts_from_a_checkpoint_before_it(before: str, steps: int, total: int, fits: bool) -> None:
    config = OptimizerConfig(schedule="wsd", decay_fraction=0.5, warmup_steps=2)
    saved = build_optimizer(nn.Linear(2, 2), replace(config, schedule=before, lr=1.0), 8)["lr_scheduler"]["scheduler"]
    with warnings.catch_warnings(action="ignore"):  # no step was taken in between
        for _ in range(steps):
            saved.step()
    schedule = build_optimizer(nn.Linear(2, 2), config, total)["lr_scheduler"]["scheduler"]
    schedule.load_state_dict(saved.state_dict())
    with nullcontext() if fits else pytest.raises(UserError, match=f"checkpoint of step {steps} has"):
        check_branch(schedule, config, total)
