"""Which data a task trains on, and how many of a batch's samples a process must have."""

from typing import Any

import lightning as L

import data
import tasks
from data.image_base import ImageModule
from data.labelled_text import LabelledText
from data.text import TextModule
from tasks.vision import SelfSupervised

from .errors import UserError


def check_kind(task: L.LightningModule, datamodule: L.LightningDataModule) -> None:
    """Raise UserError for data that a task cannot train on."""
    name, source = type(task).__name__, type(datamodule).__name__
    if isinstance(task, tasks.Joint) and isinstance(datamodule, data.Joint):
        for domain, part in task.parts.items():
            check_kind(part, datamodule.parts[domain])
        return
    if isinstance(task, tasks.Joint) or isinstance(datamodule, data.Joint):
        raise UserError(f"{name} does not train on {source}; the task Joint needs --data Joint, and no other task does")
    if isinstance(task, tasks.SequenceClassification) != isinstance(datamodule, LabelledText):
        raise UserError(
            f"{name} does not train on {source}; the task SequenceClassification needs --data TextTask or --data "
            "LabelledFiles, and no other task does"
        )
    if isinstance(task, SelfSupervised | tasks.ImageClassification) and isinstance(datamodule, TextModule):
        raise UserError(f"{name} trains on images, and {source} is text; choose --data Images or --data ImageShards")
    if isinstance(task, tasks.LanguageModeling) and isinstance(datamodule, ImageModule):
        raise UserError(f"{name} trains on text, and {source} is images; choose --data TextFiles or --data TextShards")
    if isinstance(task, tasks.DINO) and isinstance(datamodule, ImageModule):
        views = len(datamodule.transform.build(datamodule.image_size))
        if views < 2:
            raise UserError(
                f"DINO compares views of an image, and the data give {views}; choose --data.transform MultiCrop"
            )


def check_share(task: Any, datamodule: Any, processes: int) -> None:
    """Raise UserError where a process gets too few samples of a batch for the objective."""
    if isinstance(task, tasks.Joint):
        for domain, part in task.parts.items():
            check_share(part, datamodule.parts[domain], processes)
    elif isinstance(task, tasks.DINO) and task.hparams["koleo_weight"] and datamodule.batch_size < 2 * processes:
        raise UserError(
            f"KoLeo compares the images of a process, and data.batch_size {datamodule.batch_size} over {processes} of "
            "them leaves no two; give a larger batch, or set model.koleo_weight to 0"
        )
