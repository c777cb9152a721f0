"""Counter-based randomness: the published SplitMix64 numbers, the moments of a uniform law, and independence."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from moa_lightning.random import named_seed, sample_seed, uniform

SPLITMIX_1234567 = [  # the generator's published test sequence for seed 1234567
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def splitmix_next(state: int) -> int:
    """First output of SplitMix64 seeded with `state`, in NumPy's unsigned arithmetic."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_uniform_gives_the_published_numbers() -> None:
    drawn = uniform(torch.tensor([1234567]), 5)[0]
    assert drawn.tolist() == [(value >> 40) / 2**24 for value in SPLITMIX_1234567]
    assert splitmix_next(1234567) == SPLITMIX_1234567[0]


def seeds(count: int) -> torch.Tensor:
    return torch.tensor([sample_seed(0, 0, i) for i in range(count)])


def test_uniform_is_uniform() -> None:
    drawn = uniform(seeds(300), 400)
    assert drawn.shape == (300, 400)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert torch.equal(drawn * 2**24, (drawn * 2**24).round())
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    assert drawn.mean().item() == pytest.approx(1 / 2, abs=5 * (1 / 12 / drawn.numel()) ** 0.5)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=5 * (1 / 180 / drawn.numel()) ** 0.5)


@pytest.mark.parametrize("start", [0, 12345678901234567])
def test_neighbouring_seeds_counters_and_streams_are_uncorrelated(start: int) -> None:
    consecutive = torch.arange(start, start + 300)
    first, second = uniform(consecutive, 400), uniform(consecutive, 400, stream=1)
    pairs = {
        "seeds": (first[:-1], first[1:]),
        "counters": (first[:, :-1], first[:, 1:]),
        "streams": (first, second),
    }
    for name, (left, right) in pairs.items():
        correlation = np.corrcoef(left.flatten().numpy(), right.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / left.numel() ** 0.5, name
    assert (first != second).float().mean() > 0.999


def test_a_sample_gets_its_numbers_in_any_batch() -> None:
    several = seeds(7)
    together = uniform(several, 33)
    for order in ([3], [6, 0, 2], [4, 4]):
        assert torch.equal(uniform(several[order], 33), together[order])
    assert torch.equal(uniform(several, 5), together[:, :5])
    assert uniform(several[:0], 5).shape == (0, 5)


def test_numbers_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    uniform(seeds(2), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_seeds_are_distinct_and_as_specified() -> None:
    keys = list(itertools.product(range(8), range(25), range(200)))
    drawn = [sample_seed(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert all(0 <= value < 2**63 for value in drawn)
    assert np.mean(drawn) == pytest.approx(2**62, rel=0.02)
    for seed, epoch, sample in [(0, 0, 0), (3, 14, 159), (2**40, 5, 10**9)]:
        expected = splitmix_next(splitmix_next(splitmix_next(seed) ^ epoch) ^ sample) >> 1
        assert sample_seed(seed, epoch, sample) == expected
    assert sample_seed(-1, 0, 0) != sample_seed(1, 0, 0)


def test_named_seeds_are_distinct_and_stay_what_they_were() -> None:
    names = [f"blocks.{i}.{part}" for i in range(50) for part in ("weight", "bias", "mlp.up_mix.gate_weight")]
    drawn = [named_seed(seed, name) for seed in range(20) for name in names]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= value < 2**63 for value in drawn)
    assert named_seed(0, "blocks.0.weight") == 8501891519594082332  # a changed value would change every run's start
