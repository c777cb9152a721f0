"""What a run does when the machine is taken away: it saves and leaves with an exit code that asks to be started again.

Batch systems announce the end of a job by SIGTERM, or earlier by a signal of the user's choice, here SIGUSR1. Any
process may get it, and not all do, so the processes agree after every optimiser step by a tiny reduction that runs
beside the step: its result is read one step later, and all of them stop at the same step.
"""

import os
import signal
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .checkpoint import RunCheckpoint
from .common import steps_in_this_batch
from .validation import ValidationSchedule

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = os.EX_TEMPFAIL  # 75 in sysexits.h: a failure that passes, try again


class Preemption(L.Callback):
    """Ends a run after SIGTERM or SIGUSR1 with a checkpoint of the step under way.

    A validation that is due or under way is finished first, so that the resumed run has the same curves as one that was
    never stopped.

    Raises:
        SIGTERMException: in all processes, when the checkpoint is on the disk.
    """

    def __init__(self) -> None:
        self._asked = False
        self._agreed = False
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = self._agreed = False
        self._vote = None
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        for number in SIGNALS:  # the Trainer puts back what was there before it, at its end
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not steps_in_this_batch(trainer):
            return
        self._agreed = self._agreed or self._decision()
        schedule = _find(trainer, ValidationSchedule)
        if self._agreed and not (schedule is not None and schedule.due and any(trainer.num_val_batches)):
            self._leave(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._agreed:  # the validation of the last step has been waited for, and has saved
            self._leave(trainer)

    def _decision(self) -> bool:
        """Whether any process was asked to stop; with several, before the step that is now done."""
        if self._group is None:
            return self._asked
        before, flag = self._vote, torch.tensor([float(self._asked)])
        self._vote = (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())

    def _leave(self, trainer: L.Trainer) -> None:
        checkpoint = _find(trainer, RunCheckpoint)
        if checkpoint is not None:
            checkpoint.save(trainer)
            trainer.strategy.checkpoint_io.teardown()
        raise SIGTERMException


def _find(trainer: L.Trainer, kind: type) -> Any:
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
