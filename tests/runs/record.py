"""What one process saw in a fit, and the callback that writes it down."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass
class Record:
    """What one process saw in a fit, by optimiser step or batch."""

    loss: list[float] = field(default_factory=list)
    """train/loss, over all processes"""
    norm: list[float] = field(default_factory=list)
    """of the gradient before clipping"""
    clipped: list[float] = field(default_factory=list)
    """of the gradient after clipping (and after the task took gradients away)"""
    ids: list[list[int]] = field(default_factory=list)
    """sample ids of this process's batches"""
    rates: list[tuple[float, ...]] = field(default_factory=list)
    """learning rate and weight decay of each parameter group"""
    validations: list[dict[str, float]] = field(default_factory=list)
    """val/ metrics of each validation"""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """the task's state at the end, in full"""
    shares: dict[str, float] = field(default_factory=dict)
    """numbers held by this process over numbers in all: parameters, optimiser state, coefficients of mixes"""
    plain: list[str] = field(default_factory=list)
    """parameters that are not sharded"""
    result: dict[str, Any] = field(default_factory=dict)
    """result.json of a watched fit"""
    files: list[str] = field(default_factory=list)
    """the other files in its folder"""


class Recorder(L.Callback):
    """Fills a Record."""

    def __init__(self, stop_at: int | None) -> None:
        self.record, self.stop_at = Record(), stop_at
        self._rates: list[float] = []  # of the step under way; the schedule moves them before the batch has ended

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, index: int) -> None:
        self.record.ids.append(batch["id"].tolist())

    def on_before_optimizer_step(self, trainer: L.Trainer, task: L.LightningModule, optimizer: Any) -> None:
        self.record.norm.append(gradient_norm(task))
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.record.loss.append(float(trainer.callback_metrics["train/loss"]))
        self.record.clipped.append(gradient_norm(task))
        if self._rates:  # the batch was the last one of a step, whose decays the task has set since
            decays = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
            self.record.rates.append(tuple(itertools.chain(*zip(self._rates, decays, strict=True))))
            self._rates = []
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.record.validations.append({name: float(metrics[name]) for name in metrics if name.startswith("val/")})

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.record.weights = {name: full(value).clone() for name, value in task.state_dict().items()}
        parameters = dict(task.named_parameters())
        mixing = {n: p for n, p in parameters.items() if ".base" in n or ".gate_weight" in n}
        moments = [v for state in trainer.optimizers[0].state.values() for v in state.values() if v.dim()]
        groups = {"parameters": parameters.values(), "optimizer": moments, "mixing": mixing.values()}
        self.record.shares = {name: share(list(values)) for name, values in groups.items() if values}
        self.record.plain = [n for n, p in parameters.items() if not isinstance(p, DTensor)]


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def share(values: list[Tensor]) -> float:
    local = sum((v.to_local() if isinstance(v, DTensor) else v).numel() for v in values)
    return local / sum(v.numel() for v in values)


def gradient_norm(task: L.LightningModule) -> float:
    """Of all gradients as one vector, in float64: each process adds its shards, then the sums are added; of copies only
    one counts."""
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.stack([g.double().square().sum() for g in local]).sum()
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    if meshes:
        dist.all_reduce(total)
        total /= max(mesh.size(0) if mesh.ndim == 2 else 1 for mesh in meshes)
    return float(total.sqrt())
