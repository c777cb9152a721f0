"""Which patches of its global crops a student does not see in DINOv2's masked-patch loss, and the options of that loss.

Blocks as in BEiT (Bao et al., arXiv 2106.08254) with the numbers of DINOv2 (Oquab et al., arXiv 2304.07193, and its
code): rectangles of random area and ratio are laid on the grid, also over each other, until the wanted number of
patches is covered or ten in a row do not fit. There a fixed number of a batch's crops is masked, their shares of masked
patches spread evenly. Here masks follow from a sample's seed alone, so they are the same whatever the batch and the
number of processes: each image has as many masked crops as the probability says (one of two at the official 1/2), each
of them a share of its own. [O]

A mask is one whole number while it is drawn, a bit for each patch, so that a block is a few operations.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .random import named_seed

CROPS = 2  # global ones
SMALLEST_BLOCK = 4  # patches
LARGEST_BLOCK = 0.5  # of the grid
LOG_ASPECT = math.log(1 / 0.3)  # of the most extreme ratio of a block's sides
ATTEMPTS = 10  # at a block that covers something new


@dataclass(frozen=True)
class IBOTConfig:
    """The masked-patch loss of iBOT as in DINOv2, beside DINO's."""

    weight: float = 1.0
    """of the loss"""
    mask_probability: float = 0.5
    """share of the global crops in which patches are masked"""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """least and largest share of masked patches in such a crop"""
    out_dim: int | None = None
    """prototypes of a head of its own; none: patches pass the head of the crops"""
    hidden_dim: int = 2048
    """width inside a head of its own"""
    bottleneck_dim: int = 256
    """width before the prototypes of a head of its own"""

    def __post_init__(self) -> None:
        low, high = self.mask_ratio
        if not 0 < self.weight < math.inf or not 0 < self.mask_probability <= 1:
            raise UserError(
                f"ibot.weight is {self.weight} and ibot.mask_probability {self.mask_probability}; give a finite number "
                "above 0, and a share in (0, 1]"
            )
        if not 0 <= low <= high < 1 or high == 0:
            raise UserError(f"ibot.mask_ratio is {(low, high)}; give shares in [0, 1), the smaller first, one above 0")
        if (self.out_dim is not None and self.out_dim < 2) or min(self.hidden_dim, self.bottleneck_dim) < 1:
            raise UserError(
                "ibot.out_dim must be at least 2 or null, ibot.hidden_dim and ibot.bottleneck_dim at least 1"
            )

    @property
    def masked_share(self) -> float:
        """Share of all patches of the global crops that are masked, where the blocks cover what is wanted."""
        return self.mask_probability * sum(self.mask_ratio) / 2


def check_grid(grid: tuple[int, int], config: IBOTConfig) -> None:
    """UserError where no block fits into a grid (rows, columns) of patches, or none is wanted."""
    rows, columns = grid
    if min(rows, columns) < 2 or rows * columns * config.mask_ratio[1] < 1:
        raise UserError(
            f"ibot.mask_ratio {tuple(config.mask_ratio)} hides nothing of {rows} x {columns} patches: take larger "
            "images, smaller patches or a larger share"
        )


def draw_masks(seeds: list[int], rows: int, columns: int, config: IBOTConfig) -> NDArray[np.bool_]:
    """Masks of both global crops of each sample, from the samples' seeds.

    Returns:
        (2·B, rows·columns), True where a patch is masked: the first crops of all samples, then the second ones.
    """
    size = rows * columns
    masks = [crop_masks(seed, rows, columns, config) for seed in seeds]
    octets = b"".join(mask.to_bytes(-(-size // 8), "little") for crop in zip(*masks, strict=True) for mask in crop)
    bits = np.unpackbits(np.frombuffer(octets, np.uint8).reshape(CROPS * len(seeds), -1), axis=1, bitorder="little")
    return bits[:, :size].astype(bool)


def crop_masks(seed: int, rows: int, columns: int, config: IBOTConfig) -> list[int]:
    """The masks of one sample's global crops, a bit for each patch, row by row."""
    draw = random.Random(named_seed(seed, "masked patches")).random
    low, high = config.mask_ratio
    start, masks = draw(), []
    for crop in range(CROPS):
        # as many crops as whole numbers lie between the first of these and the last: each with that probability
        before, after = (math.floor(start + n * config.mask_probability) for n in (crop, crop + 1))
        wanted = int(rows * columns * (low + (high - low) * draw())) if after > before else 0
        masks.append(block_mask(rows, columns, wanted, draw))
    return masks


def block_mask(rows: int, columns: int, wanted: int, draw: Callable[[], float]) -> int:
    """A mask of blocks over at most `wanted` patches of a grid, a bit for each patch, row by row.

    Args:
        draw: returns numbers in [0, 1).
    """
    mask, missing = 0, wanted
    while missing:
        largest = min(missing, LARGEST_BLOCK * rows * columns)
        for _ in range(ATTEMPTS):
            block = _block(rows, columns, largest, draw) & ~mask
            if 0 < block.bit_count() <= largest:
                break
        else:
            return mask
        mask |= block
        missing -= block.bit_count()
    return mask


def _block(rows: int, columns: int, largest: float, draw: Callable[[], float]) -> int:
    """A random rectangle of about 4 to `largest` patches; 0 where it is as high or as wide as the grid."""
    area = SMALLEST_BLOCK + (largest - SMALLEST_BLOCK) * draw()
    root = math.exp((draw() - 0.5) * LOG_ASPECT)  # of the ratio, which is log-uniform
    height, width = round(math.sqrt(area) * root), round(math.sqrt(area) / root)
    if height >= rows or width >= columns:
        return 0
    top, left = int(draw() * (rows - height + 1)), int(draw() * (columns - width + 1))
    return (((1 << width) - 1) * _column(columns, height)) << (top * columns + left)


@cache
def _column(columns: int, height: int) -> int:
    """The first patch of each of `height` rows."""
    return sum(1 << row * columns for row in range(height))
