"""Steps that must not be taken, and losses that should be looked at.

The task has its optimiser skip a step whose gradient is not finite (tasks/base.py), without waiting for the device.
Here the skipped steps are counted, their batches are kept for a look, and a run that only skips is ended. The outcome
of a step is read when the next one has been launched, so that a GPU never stands still for it. Losses that jump are
reported from the values that are logged anyway; in a joint run each domain's by itself, as their sum is that of one or
two of them.
"""

import logging
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor

from ..errors import Diverged, UserError
from .common import is_logging_step, log_scalars, parts_at_work, run_folder, steps_in_this_batch

log = logging.getLogger(__name__)

KEPT_BATCHES = 3
WINDOW, LEAST = 50, 20  # logged losses that a new one is compared with, and how many there must be
JUMP = 10.0  # median absolute deviations that a loss may lie above the median


class Guard(L.Callback):
    """Counts skipped steps and reports loss spikes.

    Args:
        stop_after: end the run when so many steps in a row were skipped.

    Logged: train/skipped_steps and train/loss_spikes, both since the start of the run, where there are any.
    Written: <run_dir>/skipped/step<n>_rank<r>.pt, the batches of the first skipped steps (torch.load reads them with
    weights_only=True).

    Raises:
        Diverged: `stop_after` steps in a row were skipped.
    """

    def __init__(self, stop_after: int = 10) -> None:
        if stop_after < 1:
            raise UserError(f"guard.stop_after is {stop_after}; give 1 or more")
        self.stop_after = stop_after
        self.skipped = self.in_a_row = self.spikes = 0
        self._pending: tuple[int, Any, Tensor, torch.cuda.Event | None] | None = None
        self._losses: dict[str, deque[float]] = {}  # the last ones by name
        self._folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        losses = {name: [*values] for name, values in self._losses.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "windows": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]
        self._losses = {name: deque(values, WINDOW) for name, values in state.get("windows", {}).items()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._folder = run_folder(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not steps_in_this_batch(trainer):
            return
        flag: Tensor = pl_module.step_skipped  # type: ignore[assignment]
        if flag.device.type == "cuda":
            self._read(trainer)
            copy = flag.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (trainer.global_step, batch, copy, event)
        else:
            self._pending = (trainer.global_step, batch, flag, None)
            self._read(trainer)
        if is_logging_step(trainer):
            for name in watched_losses(pl_module, batch):
                self._watch_loss(trainer, name)
            found = {"train/skipped_steps": self.skipped, "train/loss_spikes": self.spikes}
            log_scalars(trainer, {name: value for name, value in found.items() if value})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read(trainer)

    def _read(self, trainer: L.Trainer) -> None:
        """Look at the outcome of the step that was launched last."""
        if self._pending is None:
            return
        (step, batch, flag, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if not flag.item():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        kept = self._keep(step, trainer.global_rank, batch) if self.skipped <= KEPT_BATCHES else None
        where = f"; its batch is in {kept}" if kept else ""
        if trainer.is_global_zero:
            log.warning("step %d was skipped: its gradient is not finite (%d so far%s)", step, self.skipped, where)
        if self.in_a_row >= self.stop_after:
            raise Diverged(
                f"the gradient was not finite in {self.in_a_row} steps in a row, the last of them step {step}; "
                "lower model.optimizer.lr, or look at the batches in the run's folder skipped/"
            )

    def _keep(self, step: int, rank: int, batch: Any) -> Path | None:
        if self._folder is None:
            return None
        folder = self._folder / "skipped"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step{step:07d}_rank{rank}.pt"
        torch.save(apply_to_collection(batch, Tensor, lambda t: t.detach().cpu()), path)
        return path

    def _watch_loss(self, trainer: L.Trainer, name: str) -> None:
        loss = float(trainer.callback_metrics.get(name, float("nan")))
        if loss != loss:
            return
        known = self._losses.setdefault(name, deque(maxlen=WINDOW))
        if len(known) >= LEAST:
            middle = median(known)
            spread = median(abs(value - middle) for value in known)
            if loss > middle + JUMP * max(spread, 1e-3 * abs(middle)):
                self.spikes += 1
                if trainer.is_global_zero:
                    log.warning("step %d: %s jumped to %.4g from %.4g", trainer.global_step, name, loss, middle)
        known.append(loss)


def watched_losses(pl_module: L.LightningModule, batch: Any) -> list[str]:
    """Names of the losses that a batch has given: of a joint task those of the domains that had a turn."""
    return [f"train/loss_{domain}" for domain in parts_at_work(pl_module, batch)] or ["train/loss"]
