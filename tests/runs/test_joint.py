"""The joint task in two processes, DDP and FSDP2: it is the run of one process, goes on to the bit, and what is tied
stays one tensor."""

from typing import NamedTuple

import pytest
import torch

from .fits import BATCH
from .golden import deviation
from .group import run_group
from .joint_fits import FITS, SAVED_AT, STEPS
from .record import Record

WHOLE = {  # under FSDP2 each process holds half of the numbers, and a little more: rows do not divide, mixes stay whole
    "mixes": 0.53,
    "ffn": 0.52,
}


class Fits(NamedTuple):
    one: dict[str, Record]
    ranks: list[dict[str, Record]]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    one = run_group("one", tmp_path_factory.mktemp("one"), program="joint")[0]
    return Fits(one, run_group("two", tmp_path_factory.mktemp("two"), program="joint"))


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(fits: Fits, kind: str, name: str) -> None:
    expected, ranks = fits.one[f"one/{name}"], [rank[f"{kind}/{name}"] for rank in fits.ranks]
    assert len(expected.loss) == STEPS
    for rank in ranks:
        assert deviation(rank.loss, expected.loss) < 3e-6
        for key, weight in expected.weights.items():
            if not key.endswith("qkv.bias"):  # rounding noise, see test_world_sizes
                assert (rank.weights[key] - weight).norm() <= 1e-4 * weight.norm(), key
            assert torch.equal(rank.weights[key], ranks[0].weights[key]), key
    for whole, *parts in zip(expected.ids, *(rank.ids for rank in ranks), strict=True):
        assert sorted(whole) == sorted(index for part in parts for index in part)
        assert len(whole) in (BATCH, 2 * BATCH)
        assert len(set(whole)) == len(whole)


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_resumed_run_is_the_uninterrupted_one(fits: Fits, kind: str, name: str) -> None:
    for rank in [fits.one] if kind == "one" else fits.ranks:
        whole, resumed = rank[f"{kind}/{name}"], rank[f"{kind}/{name}/resumed"]
        assert resumed.loss == whole.loss[SAVED_AT:]
        assert resumed.ids == whole.ids[SAVED_AT:]
        assert resumed.validations == whole.validations
        assert all(torch.equal(resumed.weights[key], weight) for key, weight in whole.weights.items())


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_what_is_tied_is_one_tensor_with_two_names(fits: Fits, kind: str) -> None:
    rank = fits.one if kind == "one" else fits.ranks[0]
    for name, vision, tied in (
        ("mixes", "net.vision.student.backbone", ("up_mix.base", "up_mix.gate_weight")),
        ("ffn", "net.vision.encoder", ("up_proj.weight", "down_proj.weight", "up_mix.base", "up_mix.gate_weight")),
    ):
        for run in (name, f"{name}/resumed"):
            weights = rank[f"{kind}/{run}"].weights
            for leaf in (f"blocks.{block}.mlp.{leaf}" for block in range(2) for leaf in tied):
                assert torch.equal(weights[f"{vision}.{leaf}"], weights[f"net.language.{leaf}"]), leaf
            mix = weights[f"{vision}.blocks.0.mlp.up_mix.gate_weight"]
            assert mix.abs().max() > 1e-3  # it has learned
            own = weights[f"{vision}.blocks.0.attn.qkv.weight"]
            assert own.shape != weights["net.language.blocks.0.attn.qkv.weight"].shape or not torch.equal(
                own, weights["net.language.blocks.0.attn.qkv.weight"]
            )


def test_a_sharded_net_is_shared_out_but_for_tied_mixes(fits: Fits) -> None:
    for rank in fits.ranks:
        for name, most in WHOLE.items():
            assert rank[f"fsdp/{name}"].shares["parameters"] < most


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_fixed_net_goes_on_as_moa_from_one_file_and_from_shards(fits: Fits, kind: str) -> None:
    for rank in [fits.one] if kind == "one" else fits.ranks:
        fixed, moa = (rank[f"{kind}/upgrade-{ffn}"].loss for ffn in ("gelu", "moa"))
        assert moa[0] == pytest.approx(fixed[0], rel=1e-6)
        assert moa[-1] != fixed[-1]
        assert fixed[0] < 5.4  # ln 256 is 5.55: these are trained weights
