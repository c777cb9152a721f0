"""A run that goes on with another number of processes and another strategy, in the middle of epochs, four times.

Every leg starts from the checkpoint of the one before: a file after one process and DDP, a folder of shards after
FSDP2, alone or hybrid. So this reads files into shards, shards into other numbers of shards, and shards into whole
tensors. No sample may be lost or repeated; the rest may differ from one process as it does between world sizes
(test_world_sizes.py).
"""

import pytest

from .fits import ACCUMULATED, HYBRID, LEG, LEG_BATCH, STEPS, fit
from .golden import deviation
from .group import run_group
from .record import Record
from .test_world_sizes import LOSS, NORM, WEIGHTS

LEGS = (("one", 1), ("ddp", 2), (HYBRID, 4), ("fsdp", 3), ("one", 1))


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Record]]]:
    """The records of each rank, leg by leg."""
    folder = tmp_path_factory.mktemp("legs")
    return [run_group(kind, folder / f"leg{number}", size, "leg") for number, (kind, size) in enumerate(LEGS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: fit("one", name, folder / name, batch_size=LEG_BATCH) for name in ACCUMULATED}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_no_sample_is_lost_or_repeated(legs, whole, name):
    seen = []
    for ranks in legs:
        batches = zip(*(rank[name].ids for rank in ranks), strict=True)
        seen += [[i for share in batch for i in share] for batch in batches]
    assert len(seen) == STEPS == LEG * len(LEGS)
    assert seen == whole[name].ids


@pytest.mark.parametrize("name", ACCUMULATED)
def test_the_run_is_that_of_one_process(legs, whole, name):
    task = name.partition("-")[0]
    for curve, tolerance in (("loss", LOSS[task]), ("norm", NORM[task])):
        found = [value for ranks in legs for value in getattr(ranks[0][name], curve)]
        assert deviation(found, getattr(whole[name], curve)) < tolerance, curve
    for key, weight in whole[name].weights.items():
        if not key.endswith("qkv.bias"):
            found = legs[-1][0][name].weights[key]
            assert (found - weight).norm() / weight.norm() < WEIGHTS[task], key
