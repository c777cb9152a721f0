"""A small task for the callbacks to watch, and helpers that train it and read back what was written."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moa_lightning.feedforward import FeedForward, FFNConfig

DIM, TOKENS, BATCH = 6, 5, 4
FLOPS = 1000.0  # of a sample


class Block(nn.Module):
    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(DIM, config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class ToyTask(L.LightningModule):
    """Regression of random vectors by two blocks; a "sample" is TOKENS vectors."""

    def __init__(self, config: FFNConfig | None = None, tokens: bool = True, teacher: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.blocks = nn.ModuleList(Block(config or FFNConfig()) for _ in range(2))
        self.teacher = Block(config or FFNConfig()).requires_grad_(False) if teacher else None
        self.tokens = tokens

    def run(self, x: Tensor) -> Tensor:
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(x)
        for block in self.net.blocks:
            x = block(x)
        return x

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.run(batch["x"]) - batch["y"]).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        name = "val/loss" if dataloader_idx == 0 else "val/query_loss"
        self.log(name, self.loss(batch), add_dataloader_idx=False, batch_size=len(batch["x"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def samples_per_batch(self, batch: dict[str, Tensor]) -> int:
        return batch["x"].shape[0]

    def tokens_per_batch(self, batch: dict[str, Tensor]) -> int | None:
        return batch["x"].shape[0] * TOKENS if self.tokens else None

    def flops_per_sample(self) -> float:
        return FLOPS

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"input": batch["x"][:1].sigmoid().expand(3, -1, -1)}

    def token_classes(self, batch: dict[str, Tensor]) -> None:
        return None

    def texts(self) -> dict[str, str]:
        return {"sample": "def f(x):\n    return x"}


def _collate(rows: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])}


def toy_loader(count: int = 24, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, TOKENS, DIM, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH, collate_fn=_collate)


def fit(task: L.LightningModule, folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """Train into `folder` on CPU; 6 batches an epoch, logging every 2 steps, validation every 4 batches by default."""
    ckpt_path, val = options.pop("ckpt_path", None), options.pop("val", toy_loader(8, seed=1))
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 10,
        "log_every_n_steps": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        "logger": TensorBoardLogger(folder.parent, name="", version=folder.name),
    }
    trainer = L.Trainer(callbacks=callbacks, **(settings | options))
    trainer.fit(task, toy_loader(), val, ckpt_path=ckpt_path)
    return trainer


def events(folder: Path) -> EventAccumulator:
    """TensorBoard's view of a run, with nothing thinned out."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
