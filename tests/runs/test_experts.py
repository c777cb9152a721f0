"""Experts, Muon, a mixture of sources, fine-tuning and DINO with DINOv2's parts under one process, DDP and FSDP2: the
same run, also stopped and resumed.

The load is counted over all processes, so the balance loss and the biases do not depend on their number. Muon enlarges
rounding errors, so its runs only start alike.
"""

from collections.abc import Callable

import pytest
import torch

from .fits import CHANGED, CLASSIFICATION, EXPERTS, EXPERTS_SAVED_AT, EXPERTS_STEPS, MASKED, SOURCES
from .golden import assert_continues, deviation
from .group import Ranks, by_kind
from .record import Record

KINDS = ("one", "ddp", "fsdp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """found(kind): what each rank saw."""
    return by_kind("experts", tmp_path_factory)


@pytest.mark.parametrize("name", [*EXPERTS, MASKED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(found, kind, name):
    for rank in found(kind):
        whole, resumed = rank[name], rank[f"{name}/resumed"]
        assert_continues(resumed, whole, EXPERTS_SAVED_AT)
        assert len(resumed.loss) == EXPERTS_STEPS - EXPERTS_SAVED_AT
        assert len(whole.validations) == 2
        assert resumed.validations == whole.validations[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_takes_the_options_that_it_is_given(found, kind):
    """(rate, decay) of the groups muon, decay, no_decay and mixing."""
    expected = (1e-3, 0.3, 1e-3, 0.3, 1e-3, 0.0, 2e-3, 0.0)
    for rank in found(kind):
        assert rank[CHANGED].rates == [expected] * (EXPERTS_STEPS - EXPERTS_SAVED_AT)


def losses(record: Record) -> list[float]:
    return [metrics["val/loss"] for metrics in record.validations]


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(found, kind, name):
    expected = found("one")[0][name]
    steps, near = (2, 1e-3) if name.endswith("muon") else (EXPERTS_STEPS, 1e-4)
    for rank in found(kind):
        assert deviation(rank[name].loss[:steps], expected.loss[:steps]) < near / 10
        assert deviation(rank[name].norm[:steps], expected.norm[:steps]) < 10 * near
        if not name.endswith("muon"):
            assert deviation(losses(rank[name]), losses(expected)) < near
            for key, weight in expected.weights.items():
                assert (rank[name].weights[key] - weight).norm() <= 1e-3 * weight.norm(), key


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_masks_and_assignments_are_those_of_one_process(found, kind):
    """Two processes hide different numbers of patches. The keys' biases end anywhere, see test_world_sizes.py."""
    expected = found("one")[0][MASKED]
    for rank in found(kind):
        assert deviation(rank[MASKED].loss, expected.loss) < 1e-5
        assert deviation(rank[MASKED].norm, expected.norm) < 1e-3
        for key, weight in expected.weights.items():
            if not key.endswith("qkv.bias"):
                assert (rank[MASKED].weights[key] - weight).norm() <= 1e-3 * weight.norm(), key
    assert expected.weights["net.mask_token"].abs().max() > 1e-3
    before, after = (expected.weights[f"net.{who}.patch_head.last_layer.weight"] for who in ("teacher", "student"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_two_half_batches_make_the_step_of_a_whole_one(found, kind):
    """With biases; a balance loss is taken over each micro-batch."""
    for rank in found(kind):
        whole, halves = rank["language-moa-bias"], rank["language-moa-bias/accumulated"]
        assert deviation(halves.norm, whole.norm) < 1e-4
        for key in whole.weights:
            if key.endswith("router.bias"):
                assert torch.equal(halves.weights[key], whole.weights[key])


@pytest.mark.parametrize("kind", KINDS)
def test_the_biases_move(found, kind):
    weights = found(kind)[0]["language-moa-bias"].weights
    biases = [value for key, value in weights.items() if key.endswith("router.bias")]
    assert len(biases) == 2
    assert all(bias.abs().max() > 0 for bias in biases)


def test_fsdp_shards_the_experts(found):
    """Half of every parameter and of the optimiser's state lies on each process; a class token does not divide."""
    for rank in found("fsdp"):
        for name in EXPERTS:
            most = 0.54 if name == CLASSIFICATION else 0.52
            assert rank[name].shares["parameters"] < most
            assert rank[name].shares["optimizer"] < most
            assert not rank[name].plain


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_window_of_each_source_and_each_ending_counts_once(found, kind):
    """Of the source code there is one window, so one of two processes has none; of few questions one batch."""
    expected = found("one")[0][SOURCES].validations[-1]
    assert {"val/loss_law", "val/loss_code", "val/worth_6", "val/worth_21", "val/few_acc", "val/many_acc_norm"} < set(
        expected
    )
    for rank in found(kind):
        validation = rank[SOURCES].validations[-1]
        assert validation == pytest.approx(expected, rel=1e-4)
