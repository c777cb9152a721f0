"""Which checkpoints a run keeps: the latest ones to go on from, and the best ones by a metric.

Every checkpoint has the step in its name and is never written into again; `last.ckpt` is a link to the latest. They are
written after validations (without validation data, where those would have been), at the last step, and when a run is
asked to stop. What is written is decided here, how it is written in checkpoints.py.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from ..checkpoints import RunCheckpointIO
from ..errors import UserError
from ..run_folder import REWIND
from .common import steps_in_this_batch
from .validation import ValidationSchedule


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also keeps the latest checkpoints.

    Args:
        keep_last: how many of the latest checkpoints are kept.
        monitor: metric by which the best `save_top_k` are kept besides; None keeps the latest only.
        save_top_k: how many of the best; -1 keeps all checkpoints.
        rewind_step: keep rewind.ckpt of this early step too, where rounds of pruning start again.
        kwargs: the other options of ModelCheckpoint.
    """

    def __init__(
        self,
        keep_last: int = 1,
        monitor: str | None = None,
        save_top_k: int = 1,
        rewind_step: int | None = None,
        **kwargs: Any,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last is {keep_last}; give 1 or more")
        if rewind_step is not None and rewind_step < 1:
            raise UserError(f"checkpoint.rewind_step is {rewind_step}; give an optimiser step, 1 or more")
        super().__init__(monitor=monitor, save_top_k=save_top_k, **kwargs)
        self.keep_last, self.rewind_step = keep_last, rewind_step
        self.latest: list[str] = []  # names in dirpath, the newest at the end

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = state_dict.get("latest")
        if not isinstance(names, list) or not all(isinstance(name, str) and self._is_name(name) for name in names):
            raise UserError("the checkpoint's list of kept checkpoints is none; it is damaged, so give another one")
        super().load_state_dict(state_dict)
        self.latest = list(names)

    def _is_name(self, name: str) -> bool:
        """Of a checkpoint in a folder."""
        return name.endswith(self.FILE_EXTENSION) and name == Path(name).name

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        if self.rewind_step is not None and self.rewind_step > steps:
            raise UserError(
                f"checkpoint.rewind_step is {self.rewind_step} and the run has {steps} steps; give an early one of them"
            )

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.rewind_step and steps_in_this_batch(trainer):
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / REWIND)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        schedule = next((c for c in callbacks if isinstance(c, ValidationSchedule)), None)
        if schedule is not None and schedule.due and not any(trainer.num_val_batches):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # with a monitor Lightning writes the last checkpoint only where it was among the best
        self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)
        trainer.strategy.checkpoint_io.teardown()  # a run has not finished before its last checkpoint is on the disk

    def save(self, trainer: L.Trainer) -> None:
        """Save unless this step is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor is not None:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        path = Path(self.format_checkpoint_name(monitor_candidates))
        self.latest = [*(name for name in self.latest if name != path.name), path.name]
        self.last_model_path = str(path.with_name(f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"))
        if self._last_checkpoint_saved != str(path):
            self._save_checkpoint(trainer, str(path))
        if trainer.is_global_zero:
            checkpoint_io(trainer).link(path, Path(self.last_model_path))
        old, self.latest = self.latest[: -self.keep_last], self.latest[-self.keep_last :]
        for name in old:
            self._remove_checkpoint(trainer, str(path.with_name(name)))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove one of this folder that is neither among the latest nor among the best."""
        best = {Path(kept).name for kept in self.best_k_models}
        folder, name = Path(filepath).parent, Path(filepath).name
        kept = name in best or name in self.latest or self.save_top_k == -1
        # a checkpoint that somebody else made must not name what is removed
        if not kept and self._is_name(name) and folder == Path(self.dirpath or ""):
            super()._remove_checkpoint(trainer, filepath)


def checkpoint_io(trainer: L.Trainer) -> RunCheckpointIO:
    """The run's checkpoint plugin.

    Raises:
        UserError: the config gives another one.
    """
    found = trainer.strategy.checkpoint_io
    if not isinstance(found, RunCheckpointIO):
        raise UserError(f"checkpoints are written by {RunCheckpointIO.__name__}; take {type(found).__name__} out")
    return found
