"""What `moa predict` leaves behind: one .npz with the ids of the samples and what the task says about each."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor


class PredictionFile(L.Callback):
    """Collects the tensors that `predict_step` returns, (B, ...) by name with an `id` (B,); writes them sorted by id.

    Padding (id -1) is left out. Each process of several writes its own samples, to predictions-<rank>.npz.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        counted = outputs["id"].cpu() >= 0
        for name, values in outputs.items():
            values = values.detach().cpu()[counted]
            self._parts.setdefault(name, []).append(values.float() if values.dtype == torch.bfloat16 else values)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        columns = {name: torch.cat(parts).numpy() for name, parts in self._parts.items()}
        order = np.argsort(columns["id"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"predictions{rank}.npz"
        np.savez(self.path, allow_pickle=False, **columns)
        self.shapes = {name: values.shape for name, values in columns.items()}
