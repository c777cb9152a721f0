"""Small fits that are both planned and run: the tasks of tests/runs, on batches of the same shapes without data."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

import tasks
from moa_lightning.planning.fake import Measurement, measure
from tests.runs.fits import make_task

TASKS = ("language", "mae", "dino")
BATCH, CONTEXT, IMAGE, VIEWS = 16, 32, 28, {"mae": (28,), "dino": (28, 28, 16)}


class Sizes(L.LightningDataModule):
    """What tasks ask of a data module, and one batch a step."""

    vocab_size, context_length, image_size, channels = 256, CONTEXT, IMAGE, 1

    def __init__(self, task: str, samples: int = BATCH, steps: int = 1) -> None:
        super().__init__()
        self.task, self.samples, self.steps = task, samples, steps

    def batch(self) -> dict[str, Any]:
        ids = torch.arange(self.samples)
        if self.task == "language":
            tokens = torch.zeros(self.samples, CONTEXT, dtype=torch.int64)
            return {"tokens": tokens, "targets": tokens.clone(), "id": ids, "seed": ids.clone()}
        views = [torch.zeros(self.samples, 1, size, size) for size in VIEWS[self.task]]
        return {"views": views, "label": ids.clone(), "id": ids, "seed": ids.clone()}

    def train_dataloader(self) -> Any:
        return Loader(self.batch, self.steps)

    def val_dataloader(self) -> list[Any]:
        return []


class Loader:
    """A batch a step."""

    def __init__(self, batch: Callable[[], dict[str, Any]], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return (self.batch() for _ in range(self.steps))


def built(task: str, ffn: str) -> tasks.Task:
    """The task with its real net."""
    module = make_task(task, ffn)
    sizes = {"vocab_size": 256, "context_length": CONTEXT, "image_size": IMAGE, "channels": 1}
    module.hparams.update({name: value for name, value in sizes.items() if name in module.hparams})
    module.configure_model()
    return module


def trainer(**options: Any) -> L.Trainer:
    """A Trainer that only trains."""
    return L.Trainer(
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def planned(task: str, ffn: str, recompute: str | bool = False, **options: Any) -> Measurement:
    """A step of it without content."""
    sizes = Sizes(task)
    options = {"strategy": "auto", "devices": 1, "clip": {"gradient_clip_val": 1.0}, **options}

    def new_task() -> tasks.Task:
        module = make_task(task, ffn)
        module.activation_checkpointing = recompute
        return module

    return measure(new_task, sizes.batch, sizes, **options)
