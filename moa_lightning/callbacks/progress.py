"""How far a fit is: on a terminal one live line, in a log file a plain line every few per cent.

Lightning's bars count the batches of an epoch, which says little where runs are counted in steps.
"""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..experiments.progress import duration
from .collapse import Collapse
from .common import TrainingClock

# Shown besides what is logged with prog_bar: Lightning reads those values from the device after every batch, and so has
# the host wait for each step, whether they are shown or not.
SHOWN = ("train/loss",)
REFRESH_SECONDS = 0.25  # reading a metric waits for the device, so not at every step
PERCENT_A_LINE = {"step": 5, "batch": 25}


class StepProgress(ProgressBar):
    """Step of the last step, steps a second, time left and the latest metrics of a fit; batches of other commands.

    Args:
        console: where it is written; None: the process's standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.enabled = True
        self._live: Progress | None = None

    def disable(self) -> None:
        """Lightning calls this on all processes but the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._total: int | None = None if total == float("inf") else int(total)
        self._first_step = self._seen = trainer.global_step
        self._clock = TrainingClock()
        self._clock.start()
        self._start("step")

    def on_train_batch_start(self, *_: Any) -> None:
        self._clock.start()  # it stands still while the run validates, draws and saves

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self._show(trainer.global_step, self._total, trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._clock.pause()
        else:
            self._start_evaluation(trainer.num_val_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._show(trainer.global_step, self._total, trainer, force=True)
        else:
            self._stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_evaluation(trainer.num_test_batches)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_evaluation(trainer.num_predict_batches)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._count(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._count(trainer)

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._count(trainer)

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _start_evaluation(self, batches: Any) -> None:
        self._total = int(sum(batches))
        self._first_step = self._seen = 0
        self._clock = TrainingClock()
        self._clock.start()
        self._start("batch")

    def _count(self, trainer: L.Trainer) -> None:
        self._seen += 1
        self._show(self._seen, self._total, trainer)

    def _start(self, unit: str) -> None:
        self._unit, self._shown_at, self._percent = unit, 0.0, 0
        if self.enabled and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.add_task(unit, total=self._total, text="")
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, done: int, total: int | None, trainer: L.Trainer, force: bool = False) -> None:
        """Bring the live line up to date, or write a line where the next few per cent are reached."""
        if not self.enabled:
            return
        if self._live is not None:
            if force or done == total or time.monotonic() - self._shown_at > REFRESH_SECONDS:
                self._shown_at = time.monotonic()
                task = self._live.task_ids[0]
                self._live.update(task, completed=done, text=self._text(done, total, trainer))
        elif total:
            every = PERCENT_A_LINE[self._unit]
            percent = 100 * done // total // every * every
            if percent > self._percent:
                self._percent = percent
                self.console.print(f"{self._unit} {self._text(done, total, trainer)}", markup=False)

    def _text(self, done: int, total: int | None, trainer: L.Trainer) -> str:
        parts = [f"{done}/{total}" if total else str(done)]
        seconds, steps = self._clock.seconds, done - self._first_step
        if seconds > 0 and steps > 0:
            parts.append(f"{steps / seconds:.3g}/s")
            if total:
                parts.append(f"{duration((total - done) * seconds / steps)} left")
        if trainer.state.fn == TrainerFn.FITTING:
            values: dict[str, Any] = {n: value for n, value in trainer.callback_metrics.items() if n in SHOWN}
            values |= trainer.progress_bar_metrics
            parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            parts += [callback.words for callback in callbacks if isinstance(callback, Collapse) and callback.words]
        return "  ".join(parts)
