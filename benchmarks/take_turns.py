"""The callback that lets a `moa fit` take turns (turns.py): --import take_turns and `trainer.callbacks`."""

from typing import Any

import lightning as L
from turns import Turn


class TakeTurns(L.Callback):
    """From one batch at hand to the next: the time holds loading, logging and all callbacks."""

    def __init__(self) -> None:
        self._turn = Turn()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self._turn.step()
