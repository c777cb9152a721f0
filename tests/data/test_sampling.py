"""Batches are the same sets for every world size, cover the data, and resume at any batch."""

from itertools import chain

import pytest
import torch

from data.sampling import EvalBatches, TrainBatches, epoch_order
from moa_lightning.errors import UserError


@pytest.mark.parametrize("block", [0, 4])
def test_order_is_a_permutation_that_changes_with_epoch_and_seed(block):
    orders = [epoch_order(103, seed, epoch, block) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.sort().values.tolist() == list(range(103))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], epoch_order(103, 0, 0, block))


def test_block_order_stays_within_a_window_of_blocks():
    order = epoch_order(6400, seed=0, epoch=0, block=10, window=4)
    for window in order.split(40):
        blocks = (window // 10).unique()
        assert len(blocks) == 4  # 40 samples come from 4 blocks of 10 neighbours
        assert window.tolist() != window.sort().values.tolist()
    starts = (order[::40] // 10).tolist()
    assert starts != sorted(starts)  # and the blocks themselves are permuted


@pytest.mark.parametrize("block", [0, 8])
def test_global_batches_do_not_depend_on_the_world_size(block):
    whole = list(TrainBatches(100, 12, seed=3, block=block))
    assert len(whole) == 8
    shares = [list(TrainBatches(100, 12, seed=3, rank=rank, world_size=4, block=block)) for rank in range(4)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole
    assert {len(batch) for share in shares for batch in share} == {3}
    assert len({index for batch in whole for _, index in batch}) == 96  # no sample twice, the last 4 are dropped


def test_start_skips_batches_and_keeps_the_length():
    batches = TrainBatches(100, 10, seed=0)
    batches.set_epoch(2)
    whole = list(batches)
    batches.set_epoch(2, start=7)
    assert list(batches) == whole[7:]
    assert len(batches) == 10
    assert {epoch for batch in whole for epoch, _ in batch} == {2}


def test_position_is_asked_at_every_pass():
    answers = iter([(0, 9), (1, 0)])
    batches = TrainBatches(100, 10, seed=0, position=lambda length: next(answers))
    assert len(list(batches)) == 1
    assert len(list(batches)) == 10


@pytest.mark.parametrize(("size", "world_size"), [(16, 1), (17, 2), (19, 4), (3, 4), (20, 3)])
def test_evaluation_counts_every_sample_once_and_ranks_keep_step(size, world_size):
    shares = [list(EvalBatches(size, 8, rank, world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(EvalBatches(size, 8))}
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(index for _, index in keys if index >= 0) == list(range(size))
    assert all(0 <= ~index < size for _, index in keys if index < 0)
    assert all(batch for share in shares for batch in share)


def test_bad_batch_sizes_name_the_numbers():
    with pytest.raises(UserError, match="batch_size is 11 but the training data has only 10"):
        TrainBatches(10, 11, seed=0)
    with pytest.raises(UserError, match="does not divide among 3 devices"):
        TrainBatches(10, 4, seed=0, world_size=3)
