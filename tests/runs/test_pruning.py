"""Pruned fits in one process, and under DDP and FSDP2 in two: experts with Muon, AdamW and an average of the weights,
and a teacher with its student."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from .fits import PRUNED, PRUNED_SAVED_AT, SPARSITY
from .golden import assert_continues
from .group import Ranks, by_kind


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """found(kind): what each rank saw."""
    return by_kind("pruned", tmp_path_factory)


def smallest(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the smallest weights of each matrix and gate in trained blocks lie, ranked in NumPy."""
    removed = {}
    for name, weight in weights.items():
        prunable = name.startswith("net.") and ".blocks." in name and ".teacher." not in name and "router" not in name
        if prunable and name.endswith("weight") and weight.dim() > 1:
            order = np.argsort(weight.abs().numpy().ravel(), kind="stable")
            places = np.zeros(order.size, bool)
            places[order[: round(SPARSITY * order.size)]] = True
            removed[name] = torch.from_numpy(places.reshape(weight.shape))
    return removed


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("name", PRUNED)
def test_the_smallest_weights_of_the_run_before_stay_exactly_zero(found, kind, name):
    for rank in found(kind):
        removed = smallest(rank[f"{name}/dense"].weights)
        assert len(removed) > 8
        assert any("gate_weight" in key for key in removed)
        for part in (name, f"{name}/resumed"):
            weights = rank[part].weights
            for key, places in removed.items():
                twins = {key.replace(".student.", ".teacher."), key.replace("net.", "average.", 1)} & weights.keys()
                assert len(twins | {key}) == 2
                for twin in (key, *twins):
                    assert (weights[twin][places] == 0).all(), twin
                assert not torch.equal(weights[key][~places], rank[f"{name}/dense"].weights[key][~places]), key


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("name", PRUNED)
def test_a_resumed_pruned_run_is_the_uninterrupted_one(found, kind, name):
    for rank in found(kind):
        assert_continues(rank[f"{name}/resumed"], rank[name], PRUNED_SAVED_AT)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_the_ticket_of_one(found, kind):
    """With Muon rounding errors grow, so of those runs the first step only."""
    expected = found("one")[0]
    for rank in found(kind):
        assert rank["dino-moa"].loss == pytest.approx(expected["dino-moa"].loss, rel=1e-4)
        assert rank["language-moa-averaged"].loss[0] == pytest.approx(
            expected["language-moa-averaged"].loss[0], rel=1e-4
        )
        assert bool(rank["dino-moa"].plain) == (kind == "ddp")
