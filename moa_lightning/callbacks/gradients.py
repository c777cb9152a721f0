"""The norm of the gradient before clipping: the first place where a run shows that it is about to diverge.

Lightning calls on_before_optimizer_step after the last backward pass of an optimiser step (accumulated gradients are
complete, a loss scale is taken out) and before configure_gradient_clipping, so the norm there is the unclipped one.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from .common import is_logging_step, log_scalars


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients as one vector, a plain 0-d tensor; 0 without any.

    Sharded gradients count in full: their norm is reduced over the processes, so all of them must call this. Plain
    tensors beside sharded ones are taken to be the same on every process.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = [get_total_norm(group) for group in groups.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


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
