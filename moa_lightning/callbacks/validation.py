"""When a run validates and saves: every so many optimiser steps, and always at its last step.

Lightning counts batches, which drift from optimiser steps as soon as gradients accumulate (the last batches of an epoch
make a smaller step), and ends a run wherever max_steps falls. So a callback tells Lightning, batch by batch, whether
the validation is due.
"""

from typing import Any

import lightning as L

from .common import steps_in_this_batch


class ValidationSchedule(L.Callback):
    """Validates after every `every_n_steps` optimiser steps and after the last one.

    Args:
        every_n_steps: None leaves the rhythm to the Trainer's options and only adds the last validation.

    Attributes:
        due: whether a validation is due after the current batch.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = every_n_steps
        self.due = False

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run resumed from a checkpoint of a validation must find it due: Lightning then counts that step as done."""
        self.due = state["due"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_step = trainer.estimated_stepping_batches
        self._tell(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stepped = steps_in_this_batch(trainer)
        last = stepped and trainer.global_step >= self.last_step
        if last:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True  # Lightning validates before it stops
        regular = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        self.due = last or (stepped and regular)
        self._tell(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.due = False  # a checkpoint written from here on has the step counted already

    def _tell(self, trainer: L.Trainer) -> None:
        """Lightning validates where the number of batches done is a multiple of `val_check_batch`."""
        if self.every_n_steps is not None:
            done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            trainer.val_check_batch = done if self.due else done + 2
