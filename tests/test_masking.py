"""Masks of blocks against the algorithm on an array, and what a mask depends on."""

import math
import random

import numpy as np
import pytest

from moa_lightning.errors import UserError
from moa_lightning.masking import IBOTConfig, block_mask, draw_masks


def blocks_on_an_array(rows: int, columns: int, wanted: int, draw) -> np.ndarray:
    """DINOv2's masks, with its numbers: area from 4 to what is missing (half of the grid at most), ratio log-uniform
    in [0.3, 1/0.3], smaller than the grid, ten attempts at one that covers something new and not too much."""
    mask = np.zeros((rows, columns), dtype=bool)
    while mask.sum() < wanted:
        most = min(wanted - mask.sum(), 0.5 * rows * columns)
        for _ in range(10):
            area = 4 + (most - 4) * draw()
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draw())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = math.floor(draw() * (rows - height + 1)), math.floor(draw() * (columns - width + 1))
            place = (slice(top, top + height), slice(left, left + width))
            if 0 < height * width - mask[place].sum() <= most:
                mask[place] = True
                break
        else:
            break
    return mask


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (7, 7), (4, 9), (2, 2)])
def test_blocks_are_those_of_the_algorithm_on_an_array(rows: int, columns: int) -> None:
    covered = 0
    for seed in range(150):
        wanted = int(rows * columns * random.Random(-seed).uniform(0.1, 0.5))
        bits = block_mask(rows, columns, wanted, random.Random(seed).random)
        found = np.array([bits >> n & 1 for n in range(rows * columns)], dtype=bool).reshape(rows, columns)
        expected = blocks_on_an_array(rows, columns, wanted, random.Random(seed).random)
        assert np.array_equal(found, expected), seed
        assert bits >> rows * columns == 0
        assert found.sum() <= wanted
        covered += found.sum() == wanted
    assert covered > (100 if rows == 14 else 0)


def test_a_mask_depends_on_the_samples_seed_alone() -> None:
    seeds = [5, 2**62 + 1, 7, 8, 9]
    together = draw_masks(seeds, 7, 9, IBOTConfig()).reshape(2, 5, 63)
    for index, seed in enumerate(seeds):
        assert np.array_equal(draw_masks([seed], 7, 9, IBOTConfig()), together[:, index])
    assert len({mask.tobytes() for mask in together.any(0)}) == 5


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.8, 1.0])
def test_the_share_of_masked_crops_and_patches(probability: float) -> None:
    config, images = IBOTConfig(mask_probability=probability), 1500
    masks = draw_masks(list(range(images)), 14, 14, config).reshape(2, images, 196)
    hidden = masks.any(2)
    counts = hidden.sum(0)
    assert (counts.min(), counts.max()) == (math.floor(2 * probability), math.ceil(2 * probability))
    for crop in hidden:
        assert crop.mean() == pytest.approx(probability, abs=0.05)
    shares = masks[hidden].mean(1)
    assert shares.max() <= 0.5
    assert shares.mean() == pytest.approx(0.285, abs=0.01)  # 0.3, less what a whole number of patches leaves out
    assert masks.mean() == pytest.approx(config.masked_share, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.0},
        {"weight": math.nan},
        {"mask_probability": 0.0},
        {"mask_probability": 1.5},
        {"mask_ratio": (0.5, 0.1)},
        {"mask_ratio": (0.0, 0.0)},
        {"mask_ratio": (0.5, 1.0)},
        {"out_dim": 1},
        {"bottleneck_dim": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(options) -> None:
    with pytest.raises(UserError, match=f"ibot.{next(iter(options))}"):
        IBOTConfig(**options)
