"""Ends a run that hangs, and says which process it waits for.

A process that never comes back from its data, or that died, leaves the others waiting in a collective call, all with
the same silence. So every process notes where it is at each hook of the loop, a thread publishes that in a small store
beside the run, and the thread whose process has not moved for too long compares the notes: who is furthest behind is
who the others wait for. The waiting threads cannot be interrupted, so the process ends at once.

Time is counted in looks of the thread, which stand still where the process does: a cluster that suspends a job and
lets it go on later has not made it hang.
"""

import os
import sys
import threading
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from ..errors import UserError

LOOKS = 10  # in a timeout
EXIT_CODE = os.EX_SOFTWARE  # 70 in sysexits.h


class Watchdog(L.Callback):
    """Watches that training and validation move.

    Args:
        timeout: seconds without a step, a batch or a checkpoint after which the run ends; compilation counts as
            standing still.
    """

    def __init__(self, timeout: float = 1200.0) -> None:
        if timeout <= 0:
            raise UserError(f"watchdog.timeout is {timeout}; give seconds, more than 0")
        self.timeout = timeout
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._note = (0, "the start")  # order, where

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING and trainer.world_size > 1 and self._store is None:
            self._store = _store(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self._moved("before the first batch")
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _moved(self, where: str) -> None:
        self._note = (self._note[0] + 1, where)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._moved(f"in the forward pass of step {trainer.global_step + 1}")

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._moved(f"in the backward pass of step {trainer.global_step + 1}")

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._moved(f"in the optimiser of step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._moved(f"waiting for data after step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int, *_: Any) -> None:
        self._moved(f"in validation batch {index} after step {trainer.global_step}")

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        self._moved(f"waiting for data after validation batch {index}, step {trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._moved(f"after the validation of step {trainer.global_step}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop.set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop.set()

    def _watch(self) -> None:
        # The first process speaks first, as its exit code counts; where another ends before it, it sees only that.
        patience = LOOKS + 2 * (self.rank > 0)
        seen, quiet = 0, 0
        while not self._stop.wait(self.timeout / LOOKS):
            order, where = self._note
            seen, quiet = order, quiet + 1 if order == seen else 0
            self._publish(f"{order} {where}")
            if quiet >= patience:
                print(f"moa: {self._diagnosis(where)}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _publish(self, note: str) -> None:
        try:
            if self._store is not None:
                self._store.set(str(self.rank), note)
        except RuntimeError:  # the first process, which holds the store, is gone
            self._store = None

    def _read(self, rank: int) -> tuple[int, str]:
        if not self._store.check([str(rank)]):
            return 0, "at the start"
        order, _, where = self._store.get(str(rank)).decode().partition(" ")
        return int(order), where

    def _diagnosis(self, where: str) -> str:
        silence = f"nothing has moved for {self.timeout:g} s"
        if self._store is None:
            return f"{silence}: the process stands {where}"
        try:
            notes = {rank: self._read(rank) for rank in range(self.world_size)}
        except RuntimeError:
            return f"{silence} on rank {self.rank}, which stands {where}; the first rank is gone"
        least = min(order for order, _ in notes.values())
        behind = [f"rank {rank} stands {place}" for rank, (order, place) in notes.items() if order == least]
        return f"{silence} on rank {self.rank}, which stands {where}; furthest behind: {'; '.join(behind)}"


def _store(trainer: L.Trainer) -> dist.TCPStore:
    """A store of the run's own, so that looking into it never waits for the one that collective calls use."""
    wait, host = timedelta(seconds=60), os.environ.get("MASTER_ADDR", "127.0.0.1")
    own = None
    if trainer.is_global_zero:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)  # takes a free port
    port = trainer.strategy.broadcast(own.port if own else 0)
    return own or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
