"""Pictures of what a vision transformer has learned: where heads look, patches as colours, nearest neighbours.

Everything is drawn from tensors on the CPU into one picture (3, H, W) in [0, 1], of cells that are neither too small to
see nor larger than needed, with white between them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

SMALLEST, LARGEST = 84, 112  # side of a cell, pixels
GAP = 2
TAILS = 0.02  # share of patches whose colour is cut off at either end
NEAREST = 5
SAME, OTHER, UNKNOWN = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0), (1.0, 1.0, 1.0)  # frames: Okabe and Ito's green, orange
FRAME = 3


def cells(rows: Sequence[Tensor]) -> Tensor:
    """Rows of equally many pictures (n, 3, H, W) as one (3, height, width)."""
    scaled = [resized(row.detach().float().cpu()) for row in rows]
    return make_grid(torch.cat(scaled), nrow=len(scaled[0]), padding=GAP, pad_value=1.0)


def resized(images: Tensor) -> Tensor:
    """Small pictures enlarged by a whole factor, so that pixels stay squares, and large ones made smaller."""
    size = images.shape[-1]
    if size < SMALLEST:
        return images.repeat_interleave(-(-SMALLEST // size), -1).repeat_interleave(-(-SMALLEST // size), -2)
    if size > LARGEST:
        height = round(images.shape[-2] * LARGEST / size)
        return F.interpolate(images, (height, LARGEST), mode="area")
    return images


def attention_rows(attention: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """A row a head of maps (B, heads, rows, columns), each from its least, black, to its most, white: (B, 3, *size)."""
    rows = []
    for head in attention.float().cpu().unbind(1):
        least, most = head.amin((1, 2), keepdim=True), head.amax((1, 2), keepdim=True)
        scaled = (head - least) / (most - least).clamp_min(1e-12)
        rows.append(F.interpolate(scaled[:, None], size=size, mode="nearest").expand(-1, 3, -1, -1))
    return rows


def patch_colours(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """The first three principal components of all patches as red, green and blue, as DINOv2 shows them: like colours
    are like features, across images too.

    Args:
        patches: (B, rows, columns, D), standardised here patch by patch, as a last norm does.
        size: of the pictures, pixels.

    Returns:
        (B, 3, *size) in [0, 1].
    """
    grid = patches.shape[:3]
    x = F.layer_norm(patches.float().cpu().flatten(0, 2), patches.shape[-1:])
    x = x - x.mean(0)
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()  # SVD leaves the sign open
    colours = x @ axes.T  # (patches, up to 3)
    low, high = colours.quantile(TAILS, dim=0), colours.quantile(1 - TAILS, dim=0)
    colours = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    return F.interpolate(colours.unflatten(0, grid).permute(0, 3, 1, 2), size=size, mode="nearest")


def nearest(queries: Tensor, bank: Tensor, count: int = NEAREST) -> Tensor:
    """Positions (n, count) in a bank (m, D) of the most similar to queries (n, D) by cosine, the nearest first."""
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    return similarity.topk(min(count, len(bank)), dim=1).indices


def framed(images: Tensor, same: Tensor | None) -> Tensor:
    """Pictures (n, 3, H, W) in their cells with a coloured edge: green where `same` (n,) is true, orange where not,
    white without it."""
    images = resized(images.detach().float().cpu()).clone()
    for number, image in enumerate(images):
        colour = UNKNOWN if same is None else SAME if same[number] else OTHER
        edge = torch.ones(image.shape[-2:], dtype=torch.bool)
        edge[FRAME:-FRAME, FRAME:-FRAME] = False
        image[:, edge] = torch.tensor(colour)[:, None]
    return images
