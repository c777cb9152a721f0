"""Mixtures: exact shares, evenly taken turns, each sample once a pass, any world size, exact resume."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import Mixture, TextFiles
from data.mixture import shares, turns
from moa_lightning.errors import UserError

CONTEXT, BATCH = 10, 12
SIZES = {"large": 6000, "small": 700, "middle": 2500}
WEIGHTS = {"large": 5.0, "small": 2.0, "middle": 1.0}


@pytest.fixture
def mixture(tmp_path):
    """A new mixture of three texts, each in letters of its own."""
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / f"{name}.txt").write_bytes(bytes(1 + 80 * number + n % 79 for n in range(size)))

    def build(**options):
        sources = {name: TextFiles(str(tmp_path / f"{name}.txt"), val_fraction=0.1) for name in SIZES}
        values = {"weights": WEIGHTS, "epoch_samples": 485, "context_length": CONTEXT, "batch_size": BATCH, "seed": 4}
        return Mixture(sources, **{**values, **options})

    return build


def ready(module):
    module.setup()
    return module


def test_shares_are_exact_and_turns_even():
    assert shares({"a": 1, "b": 1, "c": 1}, 100) in ({"a": 34, "b": 33, "c": 33}, {"a": 33, "b": 34, "c": 33})
    for weights in ([5, 2, 1], [0.999, 0.001], [1] * 7, [3.3, 0.1, 9.6, 2.0]):
        counts = list(shares({str(n): weight for n, weight in enumerate(weights)}, 1000).values())
        assert sum(counts) == 1000
        assert np.abs(np.array(counts) - 1000 * np.array(weights) / sum(weights)).max() < 1
        source, number = turns(counts)
        for n, count in enumerate(counts):
            assert number[source == n].tolist() == list(range(count))
            share = count / 1000
            off = np.cumsum(source == n) - np.arange(1, 1001) * share
            assert np.abs(off).max() <= (1 + len(counts) * share) / 2 + 1e-9


def test_an_epoch_has_its_length_and_shares_and_each_sample_once_a_pass(mixture):
    module = ready(mixture())
    samples = module.splits["train"]
    assert len(samples) == 480  # 485 in whole batches
    assert module.counts == {"large": 300, "small": 120, "middle": 60}
    assert "small (25.0%, read 2.07 times an epoch)" in module.describe()["source"]  # 58 windows for 120 places
    met = {n: [] for n in range(3)}
    for epoch in range(3):
        for index in range(len(samples)):
            source, own_epoch, own = samples.place(index, epoch)
            met[source].append((own_epoch, own))
            letters = samples[(epoch, index)]["tokens"]
            assert ((letters - 1) // 80 == source).all()
    for source, places in met.items():
        size = len(samples.parts[source])
        assert len(places) == 3 * samples.counts[source]
        assert [epoch for epoch, _ in places] == [n // size for n in range(len(places))]
        assert len(set(places)) == len(places)
        passes = [[own for epoch, own in places if epoch == n] for n in range(2)]
        if len(places) >= 2 * size:
            assert sorted(passes[0]) == sorted(passes[1]) == list(range(size))
            assert passes[0] != passes[1]


def rows(module):
    return [batch["tokens"].tolist() for batch in module.train_dataloader()]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (2, 1)])
def test_ranks_share_each_batch_and_resume_is_the_same_sequence(mixture, as_rank, world, workers):
    whole = []
    for epoch in range(2):
        whole += rows(ready(as_rank(mixture(), done=40 * epoch)))
    assert len(whole) == 80
    for done in (0, 13, 57):
        shared = [rows(ready(as_rank(mixture(num_workers=workers), rank, world, done))) for rank in range(world)]
        joined = [[row for part in parts for row in part] for parts in zip(*shared, strict=True)]
        assert joined == whole[done : done - done % 40 + 40]


def test_every_batch_has_each_source_in_proportion(mixture, as_rank):
    module = ready(as_rank(mixture()))
    for batch in module.train_dataloader():
        counted = Counter(batch["source"].tolist())
        assert abs(counted[0] - 7.5) <= 2
        assert abs(counted[1] - 3) <= 2
    other = ready(as_rank(mixture(seed=5)))
    assert rows(other) != rows(module)


def test_held_out_samples_are_those_of_all_sources_once(mixture, as_rank):
    module = ready(as_rank(mixture()))
    assert module.source_names("val") == {0: "large", 1: "small", 2: "middle"}
    found = Counter()
    for batch in module.val_dataloader():
        for source, targets in zip(batch["source"].tolist(), batch["targets"], strict=True):
            counted = targets[targets >= 0]
            assert ((counted - 1) // 80 == source).all()
            found[source] += len(counted)
    assert found == {n: round(size * 0.1) - 1 for n, size in enumerate(SIZES.values())}
    limited = ready(mixture(max_val_samples=2))
    assert limited.val_samples == 6


def test_mistakes_are_one_sentence(mixture, tmp_path):
    class Other(TextFiles):
        tokenizer = type("Tokenizer", (), {"sha256": "other", "name": "other", "pieces": [b"a"]})()

    for options, told in (
        ({"weights": {"large": 1.0}}, "data.weights names large, and data.sources large, middle, small"),
        ({"weights": {**WEIGHTS, "small": 0.0}}, "data.weights.small is 0.0"),
        ({"weights": {**WEIGHTS, "small": float("nan")}}, "data.weights.small is nan"),
        ({"epoch_samples": 11}, "epoch_samples is 11 but a batch takes 12"),
    ):
        with pytest.raises(UserError, match=told):
            mixture(**options)
    with pytest.raises(UserError, match="sources is empty"):
        Mixture({})
    path = str(tmp_path / "large.txt")
    with pytest.raises(UserError, match="sources 'a' and 'b' have different tokenizers"):
        Mixture({"a": TextFiles(path), "b": Other(path)}, context_length=10).setup()
    with pytest.raises(UserError, match=r"source 'a': .*does not exist"):
        Mixture({"a": TextFiles(str(tmp_path / "absent"))}).setup()


def test_the_batch_has_the_agreed_format(mixture):
    batch = next(iter(ready(mixture()).train_dataloader()))
    assert set(batch) == {"tokens", "targets", "id", "seed", "source"}
    assert {value.dtype for value in batch.values()} == {torch.int64}
