"""Pictures of features: sizes of cells, maps of heads, patches as colours, neighbours and their frames."""

import pytest
import torch
from torch import Tensor

from moa_lightning.evaluation.pictures import (
    LARGEST,
    OTHER,
    SAME,
    attention_rows,
    cells,
    framed,
    nearest,
    patch_colours,
    resized,
)


@pytest.mark.parametrize(("size", "shown"), [(28, 84), (32, 96), (20, 100), (84, 84), (112, 112), (224, LARGEST)])
def test_cells_are_neither_tiny_nor_huge(size: int, shown: int) -> None:
    pictures = torch.rand(2, 3, size, size)
    assert resized(pictures).shape == (2, 3, shown, shown)
    if size < shown:
        assert torch.equal(resized(pictures)[:, :, :: shown // size, :: shown // size], pictures), "pixels stay squares"
    grid = cells([pictures, pictures])
    assert grid.shape == (3, 2 * shown + 6, 2 * shown + 6)
    assert (grid[:, :2] == 1).all(), "white between"


def test_each_map_goes_from_black_to_white() -> None:
    maps = torch.rand(2, 3, 4, 4) * torch.tensor([1e-6, 1.0, 100.0])[:, None, None]
    rows = attention_rows(maps, (8, 8))
    assert [row.shape for row in rows] == [(2, 3, 8, 8)] * 3
    for head, row in enumerate(rows):
        assert (row.amin((1, 2, 3)).tolist(), row.amax((1, 2, 3)).tolist()) == ([0, 0], [1, 1])
        assert torch.equal(row[0, 0].flatten().argmax() // 16, maps[0, head].flatten().argmax() // 4)


def features(objects: Tensor, noise: float) -> Tensor:
    """Patches (B, rows, columns, 16) of numbered objects, each with a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    directions = 3 * torch.randn(4, 16, generator=generator)
    return directions[objects] + noise * torch.randn(*objects.shape, 16, generator=generator)


def test_like_patches_have_like_colours_in_all_images() -> None:
    objects = torch.randint(0, 4, (5, 6, 6), generator=torch.Generator().manual_seed(1))
    colours = patch_colours(features(objects, noise=0.1), (6, 6))  # (B, 3, rows, columns)
    assert (colours.min(), colours.max()) == (0, 1)
    means = torch.stack([colours.permute(0, 2, 3, 1)[objects == number].mean(0) for number in range(4)])
    within = max(colours.permute(0, 2, 3, 1)[objects == number].std(0).max() for number in range(4))
    assert torch.pdist(means).min() > 5 * within
    large = patch_colours(features(objects, noise=0.1), (12, 12))
    assert torch.equal(large[:, :, ::2, ::2], colours)


def test_features_of_few_dimensions_have_colours_too() -> None:
    assert torch.isfinite(patch_colours(torch.randn(1, 1, 2, 8), (4, 8))).all()
    assert torch.isfinite(patch_colours(torch.ones(1, 2, 2, 8), (4, 4))).all()


def test_neighbours_are_nearest_by_angle() -> None:
    bank = torch.tensor([[9.0, 0.0], [0.1, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.2], [-1.0, 0.1]]), bank, 3).tolist() == [[0, 1, 2], [3, 2, 1]]
    assert nearest(torch.ones(1, 2), bank).shape == (1, 4), "no more than there are"


def test_frames_tell_the_class() -> None:
    framed_ones = framed(torch.full((2, 3, 100, 100), 0.5), torch.tensor([True, False]))
    for image, colour in zip(framed_ones, (SAME, OTHER), strict=True):
        assert image[:, 0, 0].tolist() == pytest.approx(colour)
        assert image[:, 30, 30].tolist() == [0.5] * 3
