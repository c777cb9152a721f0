"""What a task can show of itself: reconstructions, attention maps, generated text, after validations.

The task makes them (`pictures(batch)`, `texts()`) from the first validation batch, the same samples every time; this
callback puts them into TensorBoard and beside the run as ordinary files. All processes ask the task, since a sharded
net needs all of them to run; the first one writes. The random state is put back, so that watching changes no run.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from .common import domain_of, run_folder, tensorboard_step, tensorboard_writer, watched
from .figures import encode, keep_latest, publish


class Pictures(L.Callback):
    """Writes a task's pictures and texts at the end of validations.

    Tags pictures/<name> and samples/<name>; files <run_dir>/pictures/<name>-step000100.png and
    <run_dir>/samples/<name>-step000100.txt.

    Args:
        every_n_validations: 1 for every validation.
        samples: samples of the batch that the task gets to see.
        keep: files kept for each name.
    """

    def __init__(self, every_n_validations: int = 1, samples: int = 8, keep: int = 3) -> None:
        self.every_n_validations, self.samples, self.keep = every_n_validations, samples, keep
        self._validations = 0
        self._batches: dict[str, Any] = {}
        self._run_dir: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validations = state["validations"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._run_dir = run_folder(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hold the first batch of a domain's last loader: the query images, not the bank they are compared with."""
        if batch_idx == 0:
            held = {k: v[: self.samples] if isinstance(v, Tensor) else v for k, v in batch.items()}
            self._batches[domain_of(batch)] = held

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches, self._batches = self._batches, {}
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not batches:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        task = watched(pl_module)
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.val_step_context():
            pictures = {name: made for batch in batches.values() for name, made in task.pictures(batch).items()}
            texts = task.texts()
        if trainer.is_global_zero:
            for name, picture in pictures.items():
                self._write_picture(trainer, name, picture)
            for name, text in texts.items():
                self._write_text(trainer, name, text)

    def _write_picture(self, trainer: L.Trainer, name: str, picture: Tensor) -> None:
        pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        file = self._file(trainer, "pictures", name, ".png")
        publish(encode(pixels), f"pictures/{name}", tensorboard_step(trainer), tensorboard_writer(trainer), file)
        self._rotate(file)

    def _write_text(self, trainer: L.Trainer, name: str, text: str) -> None:
        writer = tensorboard_writer(trainer)
        if writer is not None:
            # indented by four, Markdown leaves a text as it is
            writer.add_text(f"samples/{name}", "    " + text.replace("\n", "\n    "), tensorboard_step(trainer))
        file = self._file(trainer, "samples", name, ".txt")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        self._rotate(file)

    def _file(self, trainer: L.Trainer, folder: str, name: str, suffix: str) -> Path | None:
        if self._run_dir is None:
            return None
        return self._run_dir / folder / f"{name.replace('/', '-')}-step{trainer.global_step:06d}{suffix}"

    def _rotate(self, file: Path | None) -> None:
        if file is not None:
            keep_latest(file.parent, file.stem.rpartition("-step")[0], self.keep)
