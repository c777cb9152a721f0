"""Convergence on every axis that a comparison may ask for: steps, samples, tokens, FLOPs and seconds of training.

Lightning draws metrics against steps; this callback counts what a run has consumed and writes train/loss and all val/
metrics again as `<metric>_vs_samples`, `_vs_tokens`, `_vs_megaflops` (10^6 FLOPs of matrix products) and `_vs_seconds`,
with the count as TensorBoard's step. The same numbers go to metrics.csv, and to result.json when a fit has come to its
end, for `moa report`. A better curve per step can lose on the clock, so no comparison should have to do with one axis.

With `trainer.num_sanity_val_steps: -1`, Lightning's check of the whole validation set before the first step, the curves
of a new fit begin there, at step 0.

The counters travel in the checkpoint; a resumed fit first cuts metrics.csv and the event files back to it.
"""

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from .common import (
    TrainingClock,
    data_replicas,
    is_logging_step,
    run_folder,
    synchronize,
    tensorboard_step,
    tensorboard_writer,
    watched,
    write_scalars,
)
from .files import MetricsTable, cut_event_files, write_json


class Convergence(L.Callback):
    """Counts samples, tokens and training seconds, and writes metrics against them.

    It must come after the callbacks whose metrics metrics.csv shall hold (train/, perf/, val/).

    Attributes:
        samples: samples trained on so far, over all processes.
        tokens: the same in tokens; None for a task without tokens.
        flops: matrix-product FLOPs of forward and backward passes on them, by the task's closed form.
        clock: its `seconds` are seconds of training: waiting for data counts, validation does not.
    """

    def __init__(self) -> None:
        self._run_dir: Path | None = None
        self._table: MetricsTable | None = None
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self.tokens: int | None = None
        self.flops = 0.0
        self.clock = TrainingClock()
        self._last_validation: dict[str, float] = {}
        self._last_validation_step: int | None = None
        self._at_start: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.clock.seconds,
            "last_validation": self._last_validation,
            "last_validation_step": self._last_validation_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.tokens, self.flops = state["samples"], state["tokens"], state["flops"]
        self.clock = TrainingClock(float(state["seconds"]))
        self._last_validation = state["last_validation"]
        self._last_validation_step = state["last_validation_step"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._reset()
            self._table = None
            self._run_dir = run_folder(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run_dir is None or not trainer.is_global_zero:
            return
        (self._run_dir / "result.json").unlink(missing_ok=True)
        self._table = MetricsTable(self._run_dir / "metrics.csv", last_step=trainer.global_step)
        writer = tensorboard_writer(trainer)
        if trainer.global_step > 0 and writer is not None:
            writer.close()  # it opens a new file with the next event
            cut_event_files(self._run_dir, trainer.global_step, self.samples)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._at_start:
            self.tokens = None if watched(pl_module).tokens_per_batch(batch) is None else 0
            self._record_start(trainer)
        self.clock.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task, replicas = watched(pl_module), data_replicas(trainer)
        samples = task.samples_per_batch(batch) * replicas
        self.samples += samples
        self.flops += samples * task.flops_per_sample()
        tokens = task.tokens_per_batch(batch)
        if tokens is not None:
            self.tokens = (self.tokens or 0) + tokens * replicas
        if is_logging_step(trainer):
            self._record(trainer, _metrics(trainer, ("train/", "perf/")))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronize(trainer)
        self.clock.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.sanity_checking:
            if math.isinf(trainer.num_sanity_val_steps):  # -1: all of the validation set
                self._at_start = _metrics(trainer, ("val/",))
            return
        self._last_validation = _metrics(trainer, ("val/",))
        self._last_validation_step = trainer.global_step
        self._record(trainer, self._last_validation)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronize(trainer)
        self.clock.pause()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning comes here only when fit has finished: errors and interrupts leave by other ways."""
        if self._run_dir is None or not trainer.is_global_zero:
            return
        seed = os.environ.get("PL_GLOBAL_SEED")
        result = {
            "metrics": self._last_validation,
            "validation_step": self._last_validation_step,
            "parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "steps": trainer.global_step,
            "samples": self.samples,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": round(self.clock.seconds, 3),
            "task": type(pl_module).__name__,
            "seed": None if seed is None else int(seed),
        }
        write_json(self._run_dir / "result.json", result)

    def _record_start(self, trainer: L.Trainer) -> None:
        """Lightning gives its loggers nothing of what it measures before the first step."""
        writer = tensorboard_writer(trainer)
        if writer is not None:
            write_scalars(writer, self._at_start, tensorboard_step(trainer))
        self._record(trainer, self._at_start)
        self._at_start = {}

    def _record(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        """Write metrics measured now to metrics.csv and on the further axes of TensorBoard."""
        seconds = self.clock.seconds
        if self._table is not None and metrics:
            counts = {"samples": self.samples, "tokens": self.tokens, "flops": self.flops}
            self._table.append({"step": trainer.global_step, **counts, "seconds": round(seconds, 3), **metrics})
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        curves = {name: value for name, value in metrics.items() if name == "train/loss" or name.startswith("val/")}
        megaflops = int(self.flops / 1e6)  # TensorBoard's step has 63 bits
        axes = {"samples": self.samples, "tokens": self.tokens, "megaflops": megaflops, "seconds": int(seconds)}
        for axis, count in axes.items():  # samples first: files.py
            if curves and count is not None:
                write_scalars(writer, {f"{name}_vs_{axis}": value for name, value in curves.items()}, count)


def _metrics(trainer: L.Trainer, prefixes: tuple[str, ...]) -> dict[str, float]:
    """Lightning's latest metrics under these prefixes; reading them waits for the device."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefixes)}
