"""What the grid does with its pilot, simulated: the number of seeds follows the pilot's spread, and the pilot's seeds
are judged with the later ones. Neither more false claims nor less power than promised may come of that."""

import numpy as np
import pytest
from scipy.stats import t as student

from moa_lightning.experiments.power import Pilot, seeds_after_pilot
from moa_lightning.experiments.statistics import holm_adjusted

VARIANTS, TASKS, PILOT, GRIDS = 7, 3, 3, 4000


def simulate(effect: float, most: int, planted: float) -> tuple[float, float]:
    """Grids of metrics with noise of sd 1: the share of grids with a false claim, and of planted effects found.

    Args:
        effect: that the seeds are planned for.
        most: seeds at which a task stops.
        planted: true difference of the first variant of each task; the others have none.
    """
    rng = np.random.default_rng(round(effect * 100) + most)
    claims = TASKS * (VARIANTS - 1)
    spreads = np.geomspace(0.2, 5, 100)
    planned = [min(most, max(PILOT, seeds_after_pilot(effect, Pilot(sd, 12), comparisons=claims))) for sd in spreads]
    p = np.ones((GRIDS, claims))
    for task in range(TASKS):
        x = rng.standard_normal((GRIDS, VARIANTS, most)) + rng.standard_normal((GRIDS, 1, most))
        x[:, 1] += planted
        pilot = x[:, :, :PILOT]
        rest = pilot - pilot.mean(1, keepdims=True) - pilot.mean(2, keepdims=True) + pilot.mean((1, 2), keepdims=True)
        sd = np.sqrt(2 * np.square(rest).sum((1, 2)) / ((VARIANTS - 1) * (PILOT - 1)))  # of a paired difference
        seeds = np.array(planned)[np.searchsorted(spreads, sd).clip(max=len(spreads) - 1)]
        differences = x[:, 1:] - x[:, :1]
        for n in np.unique(seeds):
            found = differences[seeds == n][:, :, :n]
            t = found.mean(2) / (found.std(2, ddof=1) / np.sqrt(n))
            columns = slice(task * (VARIANTS - 1), (task + 1) * (VARIANTS - 1))
            p[seeds == n, columns] = 2 * student.sf(abs(t), n - 1)
    claimed = holm_adjusted(p) <= 0.05
    first = np.arange(claims) % (VARIANTS - 1) == 0
    false = claimed[:, ~first] if planted else claimed
    return float(false.any(1).mean()), float(claimed[:, first].mean())


@pytest.mark.parametrize(("effect", "most"), [(1.5, 10), (2.0, 40), (3.0, 10)])
def test_null_grids_claim_nothing_in_95_of_100(effect: float, most: int) -> None:
    false, _ = simulate(effect, most, planted=0.0)
    assert false <= 0.06


@pytest.mark.parametrize("effect", [1.5, 2.0])
def test_a_planted_effect_is_found_with_the_promised_power(effect: float) -> None:
    false, found = simulate(effect, most=60, planted=effect)
    assert found >= 0.8
    assert false <= 0.06
