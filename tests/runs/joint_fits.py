"""Tiny fits of the joint task in one process, DDP and FSDP2, for test_joint.py; what fits.py is for the other tasks."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import data
import tasks
from moa_lightning.checkpoints import RunCheckpointIO

from .fits import BATCH, STRATEGIES, fit, make_data, make_task
from .record import Record, full, share

STEPS, SAVED_AT = 6, 4
FITS = {  # name -> vision task, ties, batches of vision and language
    "mixes": ("dino", ("alpha", "gates"), (1, 2)),
    "ffn": ("mae", ("ffn",), (2, 1)),
}


class JointRecorder(L.Callback):
    """Fills a Record; sample ids of both domains, those of language negative."""

    def __init__(self) -> None:
        self.record = Record()

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, index: int) -> None:
        if "id" in batch:
            return
        vision, language = (batch[domain]["id"].tolist() if batch[domain] else [] for domain in ("vision", "language"))
        self.record.ids.append([*vision, *(~number for number in language)])

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        self.record.loss.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.record.validations.append({name: float(metrics[name]) for name in metrics if name.startswith("val/")})

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.record.weights = {name: full(value).clone() for name, value in task.state_dict().items()}
        self.record.shares = {"parameters": share(list(task.parameters()))}


def make_joint(name: str) -> tuple[tasks.Joint, data.Joint]:
    vision, ties, ratio = FITS[name]
    parts = make_task(vision, "moa"), make_task("language", "moa")
    sizes: dict[str, Any] = {"mlp_ratio": 2.0} if "ffn" in ties else {}  # the language model's width
    options = dict(parts[0].hparams)
    options["backbone_args"] = {**options["backbone_args"], **sizes}
    return (
        tasks.Joint(type(parts[0])(**options), parts[1], tie=ties),  # type: ignore[arg-type]
        data.Joint(make_data(vision, BATCH), make_data("language", BATCH), *ratio),  # type: ignore[arg-type]
    )


def fit_joint(kind: str, name: str, folder: Path, resume: Path | None = None) -> Record:
    """A fit that writes <folder>/half.ckpt, or goes on from it."""
    return _fit(kind, *make_joint(name), folder, resume)


def fit_upgrade(kind: str, ffn: str, source: Path, folder: Path) -> Record:
    """A language model that starts with the weights of a run."""
    task = make_task("language", ffn)
    task.weights_from = str(source)
    return _fit(kind, task, make_data("language", BATCH), folder, None)


def _fit(kind: str, task: tasks.Task, module: data.DataModule, folder: Path, resume: Path | None) -> Record:
    recorder = JointRecorder()
    saving = ModelCheckpoint(folder, "half", every_n_train_steps=SAVED_AT, save_on_train_epoch_end=False)
    strategy: Any = "ddp_find_unused_parameters_true" if kind == "ddp" else STRATEGIES[kind]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        max_steps=STEPS,
        gradient_clip_val=0.5,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[recorder] if resume else [recorder, saving],
        enable_checkpointing=resume is None,
        plugins=[RunCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(task, datamodule=module, ckpt_path=resume, weights_only=True)
    return recorder.record


def joint(kind: str, folder: Path) -> dict[str, Record]:
    """All fits: "<strategy>/<fit>", "<strategy>/<fit>/resumed" and "<strategy>/upgrade-<ffn>"; "one" is one process."""
    torch.set_num_threads(1)
    records = {}
    for strategy in ["one"] if kind == "one" else ["ddp", "fsdp"]:
        for name in FITS:
            place = folder / f"{strategy}-{name}"
            records[f"{strategy}/{name}"] = fit_joint(strategy, name, place)
            records[f"{strategy}/{name}/resumed"] = fit_joint(strategy, name, place, place / "half.ckpt")
        fit(strategy, "language-gelu", folder / strategy, stop_at=SAVED_AT, save_at=SAVED_AT)
        for ffn in ("gelu", "moa"):
            source, place = folder / strategy / "half.ckpt", folder / f"{strategy}-{ffn}"
            records[f"{strategy}/upgrade-{ffn}"] = fit_upgrade(strategy, ffn, source, place)
    return records
