"""Numbers that the official implementations of MAE and DINO gave, where a copy of them lies beside the checkout
(../shared/data/reference/mae_dino.npz; its README there says how they were made). Tests that need it skip without it.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "reference" / "mae_dino.npz"
EXACT = 1e-10  # float64
SINGLE = 1e-6  # float32

needs_official = pytest.mark.skipif(not FILE.is_file(), reason=f"no official numbers at {FILE}")


@cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as archive:
        return dict(archive)


def official(name: str) -> Tensor:
    """A copy of one array of the file."""
    return torch.as_tensor(_arrays()[name]).clone()


def close(ours: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is at most `tolerance` times the norm of what is expected."""
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} instead of {tuple(expected.shape)}"
    expected = expected.double()
    return bool((ours.double() - expected).norm() <= tolerance * expected.norm())
