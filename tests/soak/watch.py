"""Callbacks that runs of the soak import: which samples a run has seen, and misbehaviour on demand."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch


class IdLog(L.Callback):
    """Appends each batch's sample ids to <run_dir>/ids-rank<r>.txt, one line a batch: number of the batch, ids."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path = Path(str(trainer.log_dir)) / f"ids-rank{trainer.global_rank}.txt"

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        with self.path.open("a") as file:
            file.write(f"{done} {' '.join(map(str, batch['id'].tolist()))}\n")


class Poison(L.Callback):
    """Makes the images of some batches NaN, as a broken decoder would."""

    def __init__(self, first: int = 3, last: int = 3) -> None:
        self.steps = range(first, last + 1)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step in self.steps:
            for view in batch["views"]:
                view.fill_(torch.nan)


class Stall(L.Callback):
    """One rank stops for ever in the middle of a step, to which the others come `late` seconds later."""

    def __init__(self, rank: int, step: int, late: float = 0.0) -> None:
        self.rank, self.step, self.late = rank, step, late

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            time.sleep(1e6)
        if trainer.global_step == self.step:
            time.sleep(self.late)


class Signal(L.Callback):
    """One rank gets a signal at a step."""

    def __init__(self, rank: int, step: int, number: int = int(signal.SIGUSR1)) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)
