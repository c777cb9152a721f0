"""Data that adds up, over drawn cases.

Each sample once an epoch for any number of shards, ranks and workers; equal steps on every rank; validation without a
sample twice; another world size after each stop; shards read in few regions at a time.
"""

import os
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from data import ImageShards, TextShards
from data.sampling import EvalBatches, TrainBatches
from tests.data.test_shards import png, write_tar

CASES = range(60)
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "seed": 2}


@pytest.mark.parametrize("case", CASES)
def test_any_epoch_over_any_world(case):
    """The samplers alone, for sizes, blocks and worlds as they come."""
    draw = random.Random(case)
    world = draw.randint(1, 9)
    batch = world * draw.randint(1, 12)
    size = draw.randint(batch, 20 * batch)
    options = {"seed": draw.randint(0, 9), "world_size": world, "block": draw.choice([0, 1, 3, 7, 64])}
    epochs = []
    for epoch in range(2):
        shares = []
        for rank in range(world):
            sampler = TrainBatches(size, batch, rank=rank, **options)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
        assert {len(share) for share in shares} == {size // batch}  # equal steps
        assert {len(keys) for share in shares for keys in share} == {batch // world}
        met = Counter(index for share in shares for keys in share for _, index in keys)
        assert set(met.values()) == {1}
        assert len(met) == size // batch * batch
        assert set(met) <= set(range(size))
        epochs.append(shares)
    held_out = [list(EvalBatches(size, batch, rank, world)) for rank in range(world)]
    assert {len(share) for share in held_out} == {-(-size // batch)}
    counted = Counter(index for share in held_out for keys in share for _, index in keys if index >= 0)
    assert counted == Counter(range(size))


@pytest.mark.parametrize("case", range(20))
def test_any_change_of_the_world_on_the_way(case):
    """Two epochs in pieces, each continued from the number of batches done, by 1 -> 2 -> 4 -> 3 devices and others."""
    draw = random.Random(case)
    size, batch, block = draw.randint(24, 200), 12, draw.choice([0, 5])
    steps = size // batch
    whole = []
    for epoch in range(2):
        sampler = TrainBatches(size, batch, seed=case, block=block)
        sampler.set_epoch(epoch)
        whole += [sorted(keys) for keys in sampler]
    worlds = [1, 2, 4, 3] if case % 2 else draw.choices([1, 2, 3, 4, 6, 12], k=4)
    stops = [0, *sorted(draw.randint(0, 2 * steps) for _ in range(3)), 2 * steps]
    seen = []
    for world, start, stop in zip(worlds, stops[:-1], stops[1:], strict=True):
        done = start
        while done < stop:
            epoch, first = divmod(done, steps)
            count = min(stop - done, steps - first)
            shares = []
            for rank in range(world):
                sampler = TrainBatches(size, batch, case, rank, world, block, position=lambda _, at=(epoch, first): at)
                shares.append(list(sampler)[:count])
            seen += [sorted(key for keys in parts for key in keys) for parts in zip(*shares, strict=True)]
            done += count
    assert seen == whole


def shard_set(folder, counts):
    number, paths = 0, []
    for shard, count in enumerate(counts):
        members = [(f"{number + n:04d}.png", png(number + n, 8)) for n in range(count)]
        paths.append(write_tar(folder / f"s-{shard}.tar", members))
        number += count
    return paths


@pytest.mark.parametrize(
    ("counts", "world", "workers"),
    [
        ([24], 1, 3),  # fewer shards than workers
        ([5, 1, 30, 2], 2, 0),
        ([7, 9], 4, 1),
        ([3, 3, 3, 3, 3, 3, 3, 3], 3, 2),
        ([1] * 13, 1, 0),
    ],
)
def test_shards_ranks_and_workers(tmp_path, as_rank, counts, world, workers):
    """The loaders, with the pixels: whatever reads it, sample i is picture i."""
    paths = shard_set(tmp_path, counts)
    batch, total = 12 if sum(counts) >= 12 * world else 4 * world, sum(counts)
    steps, trained, held_out = set(), [], []
    for rank in range(world):
        module = ImageShards(
            paths, paths, image_size=8, batch_size=batch, num_workers=workers, shuffle_block=3, **PLAIN
        )
        as_rank(module, rank, world)
        module.setup()
        train, query = list(module.train_dataloader()), list(module.val_dataloader()[1])
        steps.add((len(train), len(query)))
        trained += [i for part in train for i in part["id"].tolist()]
        for part in query:
            for i, image in zip(part["id"].tolist(), part["image"], strict=True):
                if i >= 0:
                    held_out.append(i)
                    assert torch.equal((image * 255).round(), module.read()["val"].images[i].float())
    assert steps == {(total // batch, -(-total // batch))}
    assert len(trained) == len(set(trained)) == total // batch * batch
    assert sorted(held_out) == list(range(total))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_world_may_change_in_the_middle_of_an_epoch(tmp_path, as_rank, workers):
    """1 -> 2 -> 4 -> 3 devices through the data module, each asked to go on after the batches done so far."""
    paths = shard_set(tmp_path, [50, 3, 67])
    options = {"image_size": 8, "batch_size": 12, "shuffle_block": 4, "seed": 2, "num_workers": workers}
    seen = []
    for world, done, stop in ((1, 0, 3), (2, 3, 4), (4, 4, 8), (3, 8, 10)):
        shares = []
        for rank in range(world):
            module = as_rank(ImageShards(paths, **options), rank, world, done=done)
            module.setup()
            shares.append([batch["id"].tolist() for batch in module.train_dataloader()][: stop - done])
        seen += [i for parts in zip(*shares, strict=True) for part in parts for i in part]
    assert sorted(seen) == list(range(120))


def regions(offsets: list[int], gap: int) -> int:
    """Runs of neighbours in a list of places."""
    places = sorted(offsets)
    return 1 + sum(later - earlier > gap for earlier, later in pairwise(places))


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_window_of_reading_touches_few_regions_of_a_file(tmp_path, monkeypatch, kind):
    """While the 16 blocks that are mixed are read, the reads lie in about 16 runs of neighbours."""
    if kind == "images":
        path = shard_set(tmp_path, [1200])[0]
        module = ImageShards(path, image_size=8, batch_size=16, shuffle_block=10, seed=0)
        gap = 1536
    else:
        path = write_tar(
            tmp_path / "s.tar", [(f"{n:04d}.txt", b"some text, again and again " * 50) for n in range(400)]
        )
        module = TextShards(path, context_length=450, batch_size=16, shuffle_block=10, seed=0)
        gap = 2048
    module.setup()
    offsets: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: offsets.append(offset) or pread(fd, n, offset))
    batches = list(module.train_dataloader())
    per_sample = len(offsets) / (16 * len(batches))
    window = round(160 * per_sample)
    blocked = [regions(offsets[start : start + window], gap) for start in range(0, len(offsets) - window, window)]
    # blocks lie at random, so two may touch; text windows do not begin where members do, which adds an edge or two
    assert len(blocked) >= 5
    assert max(blocked) <= 18
    free = [regions(random.Random(0).sample(offsets, window), gap) for _ in blocked]
    assert min(free) >= 60  # what a free shuffle would touch
