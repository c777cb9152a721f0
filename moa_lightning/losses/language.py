"""The next-token loss without the logits of a whole batch.

A vocabulary of 50,000 and 16 x 1,024 tokens make 3 GB of float32 logits, and their gradient as much again. Taken in
chunks, each chunk's logits are made again in the backward pass, so only those of one chunk exist at a time; that costs
the output matrix's product once more. The logarithm of the softmax's normaliser is what a z-loss keeps near 0 (PaLM,
arXiv 2204.02311, section 5). On a GPU the package liger_kernel does the same with fused kernels (arXiv 2410.10989).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.triton_mix import interpreted

IGNORED = -100


def chunked_losses(x: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log normaliser of each target.

    Args:
        x: what the output matrix reads, (B, T, d).
        head: maps (n, d) to logits (n, vocab_size).
        targets: int64 (B, T); -100 is not counted.
        chunk: tokens whose logits exist at a time.

    Returns:
        Two float32 (B, T), in nats; 0 where the target does not count.
    """

    def losses(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows).float()
        normalizer = logits.logsumexp(-1).masked_fill(wanted == IGNORED, 0.0)
        return F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED), normalizer

    pieces = [
        checkpoint(losses, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(x.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    ]
    nll, normalizers = (torch.cat(parts).view(targets.shape) for parts in zip(*pieces, strict=True))
    return nll, normalizers


def runs_fused(device: torch.device) -> bool:
    """Whether fused_losses works there: on a GPU, and on the CPU in Triton's interpreter (tests)."""
    return device.type == "cuda" or interpreted()


def fused_losses(x: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and z-loss of each target by the kernels of liger_kernel, which chooses the chunks.

    Args:
        x: what the output matrix reads, (B, T, d).
        weight: the output matrix, (vocab_size, d).
        targets: int64 (B, T); -100 is not counted.
        z_loss_weight: of the squared log normaliser.

    Returns:
        Two float32 (B, T): nats, and z_loss_weight times the squared log normaliser; 0 where the target does not count.
        The gradient is that of their sum, and the first one's carries all of it.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, lse_square_scale=z_loss_weight, reduction="none", return_z_loss=True
    )
    found = loss(weight, x.flatten(0, -2), targets.flatten())
    z_loss = found.z_loss.detach().float().view(targets.shape)
    return found.loss.view(targets.shape) - z_loss, z_loss
