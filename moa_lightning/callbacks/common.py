"""What the callbacks share: what they ask of a task, when to log, where to write, and the training clock.

Everything of Lightning's that is not public stands here and nowhere else. Steps in TensorBoard follow Lightning's own
axis, on which the n-th optimiser step is n - 1; files count steps as `trainer.global_step` does, from 1.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..evaluation.token_classes import TokenClasses


class WatchedTask(Protocol):
    """What a LightningModule offers to be watched by these callbacks."""

    def samples_per_batch(self, batch: Any) -> int:
        """Samples that this process trains on in one batch."""

    def tokens_per_batch(self, batch: Any) -> int | None:
        """Tokens of the same, None where the task does not count tokens."""

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of forward and backward for one sample."""

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Pictures (3, H, W) in [0, 1] by name for one validation batch."""

    def texts(self) -> dict[str, str]:
        """Texts by name."""

    def token_classes(self, batch: Any) -> TokenClasses | None:
        """Classes of the tokens of a validation batch; None where they have none."""


def watched(module: L.LightningModule) -> WatchedTask:
    """The module, typed as what the callbacks use of it."""
    return cast(WatchedTask, module)


def domain_of(batch: Any) -> str:
    """Whether an evaluation batch is of vision or of language; a joint task validates on both."""
    return "language" if "tokens" in batch else "vision"


def parts_at_work(module: L.LightningModule, batch: Any) -> dict[str, L.LightningModule]:
    """The tasks of a joint one that a training batch has samples for, by domain; none of any other task."""
    parts: dict[str, L.LightningModule] = getattr(module, "parts", {})
    return {domain: part for domain, part in parts.items() if batch.get(domain) is not None}


def steps_in_this_batch(trainer: L.Trainer) -> bool:
    """Whether the optimiser steps at the end of the current training batch (it does not while gradients accumulate)."""
    return not trainer.fit_loop._should_accumulate()


def is_logging_step(trainer: L.Trainer) -> bool:
    """Whether Lightning itself logs at the end of the current training batch."""
    return trainer._logger_connector.should_update_logs and steps_in_this_batch(trainer)


def tensorboard_step(trainer: L.Trainer) -> int:
    """The step that Lightning writes beside the metrics that a task logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def data_replicas(trainer: L.Trainer) -> int:
    """Number of processes that train on different samples: the world size, less tensor-parallel copies."""
    kwargs = trainer.distributed_sampler_kwargs
    return kwargs["num_replicas"] if kwargs else 1


def synchronize(trainer: L.Trainer) -> None:
    """Wait for the device, so that the clock shows when the work is done and not when it was asked for."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of the run; None for a trial run with `fast_dev_run`. To be called on all processes: it broadcasts."""
    log_dir = trainer.log_dir
    trial = trainer.fast_dev_run  # type: ignore[attr-defined]
    return None if trial or not log_dir else Path(log_dir)


def tensorboard_writer(trainer: L.Trainer) -> SummaryWriter | None:
    """The writer of the run's TensorBoard logger; None on other processes than the first, and without such a logger."""
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def write_scalars(writer: SummaryWriter, values: Mapping[str, float], step: int) -> None:
    """Write many scalars as one event: a tenth of the cost of one `add_scalar` each."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    writer._get_file_writer().add_summary(summary, step)


def log_scalars(trainer: L.Trainer, values: Mapping[str, float]) -> None:
    """Give scalars to all loggers and to `trainer.callback_metrics`, on a logging step only.

    `self.log` would do the same, but has Lightning handle each value again in every later batch.
    """
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=tensorboard_step(trainer))


class TrainingClock:
    """Seconds of training: runs from batch to batch, waiting for data included; stands still during validation."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Run on; nothing changes where it runs already."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stand still; nothing changes where it stands already."""
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)
