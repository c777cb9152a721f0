"""The learning rate under one tag, train/lr, whatever the optimiser is called, so that runs lie over each other."""

from typing import Any

import lightning as L

from .common import is_logging_step, log_scalars


class LearningRate(L.Callback):
    """Logs train/lr on logging steps: the rate that the step was made with, the largest over parameter groups.

    Where groups differ in their rates, train/lr/<group> follows, with the group's "name" or its number.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if is_logging_step(trainer):
            groups = optimizer.param_groups
            self._rates = {f"train/lr/{group.get('name', i)}": float(group["lr"]) for i, group in enumerate(groups)}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._rates:
            return
        values = {"train/lr": max(self._rates.values())}
        if len(set(self._rates.values())) > 1:
            values |= self._rates
        log_scalars(trainer, values)
        self._rates = {}
