"""Pruned fits in one process and under FSDP2 in two: experts with Muon and AdamW, and a teacher with its student."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .fits import PRUNED, PRUNED_SAVED_AT, SPARSITY, Record, pruned
from .golden import assert_continues
from .group import run_group


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Record]]]:
    """found(kind): what each rank saw."""
    records: dict[str, list[dict[str, Record]]] = {}

    def of(kind: str) -> list[dict[str, Record]]:
        if kind not in records:
            folder: Path = tmp_path_factory.mktemp(kind)
            records[kind] = [pruned("one", folder)] if kind == "one" else run_group(kind, folder, program="pruned")
        return records[kind]

    return of


def smallest(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Where the smallest weights of matrices in trained blocks lie, ranked in NumPy."""
    of_blocks = {
        name: weight.abs().numpy()
        for name, weight in weights.items()
        if ".blocks." in name and ".teacher." not in name and name.endswith("weight") and weight.dim() > 1
    }
    matrices = {name: weight for name, weight in of_blocks.items() if "router" not in name}
    everything = np.concatenate([weight.ravel() for weight in matrices.values()])
    order = np.argsort(everything, kind="stable")
    removed = np.zeros(everything.size, bool)
    removed[order[: round(SPARSITY * everything.size)]] = True
    parts = np.split(removed, np.cumsum([weight.size for weight in matrices.values()])[:-1])
    return {name: part.reshape(matrices[name].shape) for name, part in zip(matrices, parts, strict=True)}


@pytest.mark.parametrize("kind", ["one", "fsdp"])
@pytest.mark.parametrize("name", PRUNED)
def test_the_smallest_weights_of_the_run_before_stay_exactly_zero(found, kind, name):
    for rank in found(kind):
        removed = smallest(rank[f"{name}/dense"].weights)
        assert sum(part.sum() for part in removed.values()) > 1000
        for part in (name, f"{name}/resumed"):
            weights = rank[part].weights
            for key, places in removed.items():
                twins = {key, key.replace(".student.", ".teacher.")} & weights.keys()
                for twin in twins:
                    assert (weights[twin][torch.from_numpy(places)] == 0).all(), twin
                live = weights[key][torch.from_numpy(~places)]
                assert (live != 0).float().mean() > 0.99, key
                assert not torch.equal(live, rank[f"{name}/dense"].weights[key][torch.from_numpy(~places)])


@pytest.mark.parametrize("kind", ["one", "fsdp"])
@pytest.mark.parametrize("name", PRUNED)
def test_a_resumed_pruned_run_is_the_uninterrupted_one(found, kind, name):
    for rank in found(kind):
        assert_continues(rank[f"{name}/resumed"], rank[name], PRUNED_SAVED_AT)


def test_two_processes_train_the_ticket_of_one(found):
    """With Muon rounding errors grow, so of those runs the first step only."""
    expected = found("one")[0]
    for rank in found("fsdp"):
        assert rank["dino-moa"].loss == pytest.approx(expected["dino-moa"].loss, rel=1e-4)
        assert rank["language-moa-muon"].loss[0] == pytest.approx(expected["language-moa-muon"].loss[0], rel=1e-4)
        assert not rank["dino-moa"].plain
