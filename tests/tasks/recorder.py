"""A callback that keeps the training losses and says what was called with which batch."""

from typing import Any

import lightning as L
from torch import Tensor


class Recorder(L.Callback):
    """`losses`: one float a training batch. `batch`: the last query batch of a validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batch: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.batch = batch
