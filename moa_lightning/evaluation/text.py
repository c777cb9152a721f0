"""Loss, perplexity and bits per byte of a language model on held-out text.

Bits per byte = total negative log-likelihood / (ln 2 · total bytes) compares models with any tokenizer, because the
bytes of a text do not depend on how it was cut. The token between two documents is predicted like any other and counts
as one byte, as the NUL does that stands there in a text of bytes. Sums are kept in float64 and added over processes
before the division, so ranks with different numbers of tokens, or none, are weighted rightly.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TextMetrics(Metric):
    """Sums of negative log-likelihood, tokens and bytes; `compute` gives loss, perplexity and bits_per_byte."""

    nll: Tensor
    tokens: Tensor
    bytes: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: Tensor, token_bytes: Tensor) -> None:
        """Args:
        nll: negative log-likelihood per target in nats, any shape; ignored where the target is negative.
        targets: int64 token ids of that shape.
        token_bytes: int64 (vocab,), bytes that each token counts.
        """
        counted = targets >= 0
        self.nll += nll[counted].double().sum()
        self.tokens += counted.sum()
        self.bytes += token_bytes.to(targets.device)[targets[counted]].sum()

    def compute(self) -> dict[str, Tensor]:
        """loss in nats per token, perplexity = exp(loss), bits_per_byte."""
        loss = (self.nll / self.tokens).float()
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": (self.nll / (math.log(2) * self.bytes)).float(),
        }
