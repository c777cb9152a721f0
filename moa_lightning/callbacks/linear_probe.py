"""Linear accuracy while a self-supervised net trains: a probe learns from the labels of the training batches.

It sees detached features that the task's own step computed (`train_features`) and never touches the net or a random
number, so a run is the same bit by bit with and without it. It has seen augmented views, and for MAE the visible
patches only, of a net that was still moving: its accuracy is a lower figure than that of a probe trained afterwards.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..checkpoint_reading import VISION
from ..evaluation.linear import LinearProbe


class OnlineProbe(L.Callback):
    """Logs val/linear_top1 and test/linear_top1 in percent; does nothing without labels, or for tasks without features.

    Its state is saved in the checkpoint and restored exactly.
    """

    def __init__(self) -> None:
        self.probe: LinearProbe | None = None
        self._restored: dict[str, Tensor] | None = None
        self._right: Tensor | None = None  # correct and all held-out images so far, (2,)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.probe is None else {"probe": self.probe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state.get("probe")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        features: Tensor | None = getattr(pl_module, "train_features", None)
        classes = getattr(trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        if features is None or not classes:
            return
        self._wake(pl_module)
        if self.probe is None:
            self.probe = LinearProbe(features.shape[1], classes, pl_module.device)
        labels = batch["label"] if "label" in batch else batch["vision"]["label"]  # of images beside text
        self.probe.update(features, labels)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self._judge(pl_module, *arguments[1:])

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self._judge(pl_module, *arguments[1:])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _judge(self, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the query images, which the second loader hands out."""
        features: Tensor | None = getattr(pl_module, "eval_features", None)
        self._wake(pl_module)
        if self.probe is None or features is None or dataloader_idx != 1:
            return
        known = batch["label"] >= 0
        right = (self.probe.predict(features) == batch["label"]) & known
        counts = torch.stack([right.sum(), known.sum()])
        self._right = counts if self._right is None else self._right + counts

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        if self.probe is None:
            return
        counts = torch.zeros(2, dtype=torch.long, device=pl_module.device) if self._right is None else self._right
        self._right = None
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        if counts[1] > 0 and self.probe.state["steps"] > 0:  # one that saw no label yet has nothing to say
            task = getattr(pl_module, "parts", {}).get(VISION, pl_module)  # of a joint run the one with images
            task.log(f"{split}/linear_top1", 100.0 * counts[0] / counts[1])

    def _wake(self, pl_module: L.LightningModule) -> None:
        """Bring what a checkpoint held to the device."""
        if self._restored is not None:
            self.probe = LinearProbe.from_state(self._restored, pl_module.device)
            self._restored = None
