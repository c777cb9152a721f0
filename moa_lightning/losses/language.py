"""The next-token loss without the logits of a whole batch.

A vocabulary of 50,000 and 16 x 1,024 tokens make 3 GB of float32 logits, and their gradient as much again. Taken in
chunks, each chunk's logits are made again in the backward pass, so only those of one chunk exist at a time; that costs
the output matrix's product once more. The logarithm of the softmax's normaliser is what a z-loss keeps near 0 (PaLM,
arXiv 2204.02311, section 5).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
