"""A run that is stopped and resumed in the middle of an epoch ends as the one that was never stopped, to the bit.

Every fit goes on from the checkpoint of step 40 with everything new: task, data, optimiser, Trainer. Compared are the
sample ids, losses, gradient norms, rates, validations and, at the end, all weights, the teacher's and the centre among
them, all without tolerance: on a CPU the same operations in the same order give the same bits.
"""

import pytest
import torch

from .fits import BATCH, FITS, SAVED_AT, STEPS, STRATEGIES, splits
from .golden import assert_continues


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_resumed_run_is_the_uninterrupted_one(records, kind, name):
    for rank in records(kind):
        whole, resumed = rank[name], rank[f"{name}/resumed"]
        assert_continues(resumed, whole, SAVED_AT)
        assert len(resumed.loss) == STEPS - SAVED_AT
        assert resumed.validations == whole.validations[1:]


@pytest.mark.parametrize("task", ["language", "mae", "dino"])
def test_the_checkpoint_lies_inside_an_epoch_and_an_epoch_ends_before_the_run(task):
    batches = len(splits(task)["train"]) // BATCH
    assert SAVED_AT % batches
    assert batches < STEPS


@pytest.mark.parametrize("kind", STRATEGIES)
def test_teacher_and_centre_move_after_the_checkpoint(records, kind):
    resumed, short = (records(kind)[0][f"dino-moa{run}"].weights for run in ("/resumed", "/accumulated"))
    assert resumed["loss.center"].abs().max() > 0.01
    for key in resumed:
        if key.startswith("net.teacher") and key.endswith("weight"):
            assert not torch.equal(resumed[key], resumed[key.replace("teacher", "student")]), key
            assert not torch.equal(resumed[key], short[key]), key
