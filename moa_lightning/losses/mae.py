"""The masked autoencoder's loss: squared error of pixels on the removed patches (He et al., arXiv 2111.06377)."""

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W) -> patches (B, N, p²·C): rows of patches, pixels row by row, channels last."""
    batch, channels, height, width = images.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * columns, p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """The inverse of patchify: (B, rows·columns, p²·C) -> (B, C, rows·p, columns·p)."""
    p = patch_size
    channels = patches.shape[-1] // (p * p)
    grid = patches.reshape(len(patches), rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(len(patches), channels, rows * p, columns * p)


def masked_pixel_loss(predicted: Tensor, target: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """Mean squared error over the removed patches.

    Args:
        predicted, target: (B, N, P) patches.
        mask: (B, N), 1 = removed.
        normalize: standardise each target patch by its own mean and (unbiased) variance first.

    Returns:
        A scalar, in float32 at least.
    """
    predicted, target = _wide(predicted), _wide(target)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (predicted - target).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
