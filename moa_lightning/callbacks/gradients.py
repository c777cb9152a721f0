"""The norm of the gradient before clipping: the first place where a run shows that it is about to diverge.

Lightning calls on_before_optimizer_step after the last backward pass of an optimiser step (accumulated gradients are
complete, a loss scale is taken out) and before configure_gradient_clipping, so the norm there is the unclipped one.
"""

from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from ..optim import total_norm
from .common import is_logging_step, log_scalars


class GradientNorm(L.Callback):
    """Logs train/grad_norm, the norm over all of the optimiser's parameters before clipping, on logging steps."""

    def __init__(self) -> None:
        self._norm: Tensor | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if is_logging_step(trainer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._norm = total_norm(p.grad for p in parameters if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._norm is not None:
            log_scalars(trainer, {"train/grad_norm": float(self._norm)})
            self._norm = None
