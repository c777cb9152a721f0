"""Tiny fits of the three tasks through the real Trainer, each with a record of what happened in it.

One process runs `PROGRAM` in a few seconds; every kind of run (one process, DDP, FSDP2) runs the same program, so what
the tests compare differs in the strategy and in nothing else. The sizes are small, but whatever moves in a real run
moves here: the learning rate, the teacher and its temperature, the centre, the weight decay, clipping; epochs end
inside a run, and the checkpoint is taken inside an epoch. The text is the licence file, the same on every machine.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

import data
import tasks
from data.labelled_text import LabelledText, Row
from data.text import TextModule
from moa_lightning import FFNConfig
from moa_lightning.callbacks import MultipleChoice, default_callbacks
from moa_lightning.callbacks.pruning import Pruning
from moa_lightning.checkpoints import RunCheckpointIO
from moa_lightning.masking import IBOTConfig
from moa_lightning.models import GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import OptimizerConfig
from moa_lightning.parallel import FSDPStrategy

from ..soak.watch import Poison
from .record import Record, Recorder, full

ROOT = Path(__file__).parents[2]
TASKS = ("language", "mae", "dino")
FFNS = ("gelu", "la", "moa")
FITS = [f"{task}-{ffn}" for task in TASKS for ffn in FFNS]
ACCUMULATED = [f"{task}-moa" for task in TASKS]
STRATEGIES = {"one": "auto", "ddp": "ddp", "fsdp": "fsdp2"}
HYBRID = "hsdp"  # two copies, each sharded over half of the processes
BATCH, STEPS, SAVED_AT, ACCUMULATED_STEPS, FIRST = 16, 50, 40, 10, 5
CLASSIFICATION, SOURCES, EVERYWHERE = "classification-moa", "language-moa-mixture", "language-moa-places"
LINES, MASKED, CHANGED = "lines-moa", "dino-moa-masked", "language-moa-slower"
EXPERTS = ["language-moa-bias", "language-moa-loss", "language-moa-muon", SOURCES, CLASSIFICATION, EVERYWHERE, LINES]
EXPERTS_STEPS, EXPERTS_SAVED_AT, EXPERTS_VALIDATED = 6, 4, 3
PRUNED = ["language-moa-averaged", "dino-moa"]
PRUNED_STEPS, PRUNED_SAVED_AT, SPARSITY = 5, 3, 0.6
LEG, LEG_BATCH = 10, 12  # a batch that 1, 2, 3 and 4 processes share equally
CLIP = 0.5
BACKBONE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}


class Answers(MultipleChoice):
    """Answers two files of questions, one so short that only one of two processes has some, and logs what all endings
    of each are worth."""

    def __init__(self, folder: Path) -> None:
        paths = []
        for name, count in (("few", 2), ("many", 7)):
            asked = [
                {"ctx": f"{n} is", "endings": ["a" * n, "work", "the law"], "label": n % 3} for n in range(1, count + 1)
            ]
            folder.joinpath(os.environ.get("RANK", "0")).mkdir(parents=True, exist_ok=True)
            paths.append(str(folder / os.environ.get("RANK", "0") / f"{name}.jsonl"))
            Path(paths[-1]).write_text("\n".join(map(json.dumps, asked)))
        super().__init__(paths)

    def _log_likelihoods(self, rows: Any, trainer: L.Trainer, task: Any) -> Tensor:
        found = super()._log_likelihoods(rows, trainer, task)
        task.log(f"val/worth_{len(rows)}", found.sum(), sync_dist=True)
        return found


MUON = OptimizerConfig("muon", lr=5e-3, warmup_steps=5)
SLOWER = replace(MUON, lr=1e-3, weight_decay=0.3, mixing_lr_factor=2.0, schedule="constant", warmup_steps=0)
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "bias": {"moe": MoEConfig(4, 2, shared_experts=1, balance="bias", balance_bias_rate=0.01)},
    "loss": {"moe": MoEConfig(4, 1, balance_loss_weight=0.1), "loss_chunk": 50, "z_loss_weight": 1e-3},
    "mixture": {"optimizer": OptimizerConfig(lr=5e-3, weight_decay=1.0, warmup_steps=5, average_decay=0.9)},
    "muon": {"moe": MoEConfig(4, 2), "optimizer": MUON},
    "slower": {"moe": MoEConfig(4, 2), "optimizer": SLOWER},
    "averaged": {"moe": MoEConfig(4, 2), "optimizer": replace(MUON, average_decay=0.9)},
}
"""options of language models beside their ffn, as fit names have them: language-<ffn>-<extra>; mixture: of sources,
with documents kept apart and an average of the weights"""
DINOV2: dict[str, Any] = {
    "centering": "sinkhorn_knopp",
    "ibot": IBOTConfig(weight=2.0, out_dim=48, hidden_dim=64, bottleneck_dim=16),
}
"""options of dino-<ffn>-masked"""


def make_task(task: str, ffn: str, extra: str = "") -> tasks.Task:
    values = yaml.safe_load((ROOT / "configs" / "ffn" / f"{ffn}.yaml").read_text())["model"]["init_args"]["ffn"]
    config = FFNConfig(**values)
    rate, decay = (2e-3, 0.2) if task == "dino" else (5e-3, 1.0)
    optimizer = OptimizerConfig(lr=rate, weight_decay=decay, warmup_steps=5)
    vision = {"backbone": "vit_tiny_patch16_224", "backbone_args": BACKBONE, "ffn": config, "optimizer": optimizer}
    if task == "language":
        places = {"attention_gate": "moa", "pointwise_norm": "moa"} if extra == "places" else {}
        narrow = replace(config, hidden_ratio=2.0, **places)
        options = {"optimizer": optimizer, **EXTRAS.get(extra, {})}
        return tasks.LanguageModeling(GPTConfig(depth=2, dim=32, num_heads=2), narrow, seed=0, **options)
    if task == "lines":
        # the router's loss is a mean over a process's tokens, of which there are not as many in each; and every expert
        # takes all tokens, because between tokens that are almost equal, as at the start, rounding would choose
        moe = MoEConfig(4, router="expert_choice", capacity_factor=4.0, z_loss_weight=0.0)
        narrow, gpt = replace(config, hidden_ratio=2.0), GPTConfig(depth=2, dim=32, num_heads=2)
        return tasks.SequenceClassification(gpt, narrow, optimizer, target_scale=(0.1, 0.05), moe=moe, seed=0)
    if task == "classification":
        drawn = {
            "drop_path_rate": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
            "random_erasing": 0.0,
        }  # by each process for itself
        return tasks.ImageClassification(**vision, **drawn, num_classes=10, seed=0)
    if task == "mae":
        return tasks.MAE(**vision, decoder_dim=32, decoder_depth=1, decoder_heads=2, seed=0)
    return tasks.DINO(
        **vision,
        out_dim=64,
        head_hidden_dim=128,
        head_bottleneck_dim=32,
        drop_path_rate=0.0,  # drawn by each process for itself: it cannot agree between world sizes
        teacher_temperature=0.05,
        teacher_momentum=0.8,
        freeze_last_layer=0.1,
        final_weight_decay=0.8,
        seed=0,
        **(DINOV2 if extra == "masked" else {}),
    )


class Lines(LabelledText):
    """The lines of the licence, and the share of each that is the letter e."""

    num_classes, metrics = 1, ["spearman"]

    def read(self) -> dict[str, list[Row]]:
        lines = [line for line in (ROOT / "LICENSE").read_text().split("\n") if line.strip()]
        rows = [Row((line,), line.count("e") / len(line)) for line in lines]
        return {"train": rows[33:], "val": rows[:33]}

    def describe_rows(self) -> dict[str, str | int]:
        return {"source": "LICENSE"}


@cache
def splits(task: str) -> dict[str, Any]:
    """The data of a task or the mixture, read once a process; of 33 validation images two processes share one last."""
    module = _data_module(task, BATCH)
    module.setup()
    return module.splits


def make_data(task: str, batch_size: int) -> data.DataModule:
    module = _data_module(task, batch_size)
    module.splits = splits(task)  # their seed is the module's own
    if isinstance(module, data.Mixture):
        for source in module.sources.values():
            source.setup("validate")
    return module


def _data_module(task: str, batch_size: int) -> data.DataModule:
    if task == "mixture":
        code = [str(ROOT / "moa_lightning" / name) for name in ("errors.py", "losses/__init__.py")]
        sources: dict[str, TextModule] = {"law": data.TextFiles(str(ROOT / "LICENSE")), "code": data.TextFiles(code)}
        weights = {"law": 2.0, "code": 1.0}  # 26 samples of code are more than there are
        options: dict[str, Any] = {"context_length": 32, "batch_size": batch_size, "seed": 0, "mask_documents": True}
        return data.Mixture(sources, weights, epoch_samples=80, **options)
    if task == "lines":
        return Lines(context_length=80, batch_size=batch_size, seed=0)
    if task == "language":
        return data.TextFiles(str(ROOT / "LICENSE"), context_length=32, batch_size=batch_size, seed=0)
    views = data.MultiCrop(local_crops=1, local_size=16) if task == "dino" else data.SingleView(flip=0.0)
    return data.Images(
        transform=views,
        batch_size=batch_size,
        bank_size=64,
        max_val_samples=33,
        val_fraction=0.45,
        test_fraction=0.45,
        seed=0,
    )


def fit(
    kind: str,
    name: str,
    folder: Path,
    accumulate: int = 1,
    stop_at: int | None = None,
    resume: Path | None = None,
    save_at: int | None = None,
    watched: bool = False,
    batch_size: int = BATCH,
    validate_every: int = STEPS // 2,
    callbacks: Sequence[L.Callback] = (),
) -> Record:
    """One fit.

    Args:
        kind: "one", "ddp" or "fsdp".
        name: "<task>-<ffn>", "language-<ffn>-<extra>", or MASKED.
        folder: for the checkpoint.
        accumulate: micro-batches of a step; the batch of a step stays the same.
        stop_at: the step at which to stop short; the schedules are those of STEPS all the same.
        resume: checkpoint to go on from.
        save_at: write <folder>/half.ckpt after this step, which is past the middle of the fit.
        watched: with TensorBoard and the callbacks of `moa fit`.
        batch_size: samples of a step.
        validate_every: steps from one validation to the next.
        callbacks: further ones.
    """
    assert not save_at or 2 * save_at > (stop_at or STEPS), "the checkpoint would be written a second time"
    task, ffn, extra = (name + "-").split("-")[:3]
    recorder = Recorder(stop_at)
    used = [*callbacks, recorder, *(default_callbacks() if watched else [])]
    if save_at:
        used.append(ModelCheckpoint(folder, "half", every_n_train_steps=save_at, save_on_train_epoch_end=False))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=FSDPStrategy(replicas=2) if kind == HYBRID else STRATEGIES[kind],
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        val_check_interval=validate_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=used,
        enable_checkpointing=bool(save_at),
        plugins=[RunCheckpointIO()],
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name) if watched else False,
        log_every_n_steps=4 * accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(
        make_task(task, ffn, extra),
        datamodule=make_data("mixture" if extra == "mixture" else task, batch_size // accumulate),
        ckpt_path=resume,
        weights_only=True,
    )
    record = recorder.record
    if watched:
        trainer.strategy.barrier()  # the first process writes
        record.result = json.loads((folder / "result.json").read_text())
        record.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return record


def program(kind: str, folder: Path) -> dict[str, Record]:
    """All fits of one kind: "<fit>", "<fit>/resumed" and "<fit>/accumulated"."""
    torch.set_num_threads(1)
    records = {}
    for name in FITS:
        records[name] = fit(kind, name, folder / name, save_at=SAVED_AT)
        records[f"{name}/resumed"] = fit(kind, name, folder / name, resume=folder / name / "half.ckpt")
    for name in ACCUMULATED:
        watched = folder / f"{name}-accumulated"
        records[f"{name}/accumulated"] = fit(kind, name, watched, accumulate=2, stop_at=ACCUMULATED_STEPS, watched=True)
    return records


def experts(kind: str, folder: Path) -> dict[str, Record]:
    """EXPERTS_STEPS steps of the fits in EXPERTS and of MASKED, and again from the checkpoint of step
    EXPERTS_SAVED_AT; of the first one also in half batches; CHANGED goes on from the one with Muon."""
    torch.set_num_threads(1)
    records = {}
    for name in (*EXPERTS, MASKED):
        options: dict[str, Any] = {"stop_at": EXPERTS_STEPS, "validate_every": EXPERTS_VALIDATED}
        if name == SOURCES:
            options["callbacks"] = [Answers(folder)]
        records[name] = fit(kind, name, folder / name, save_at=EXPERTS_SAVED_AT, **options)
        half = folder / name / "half.ckpt"
        records[f"{name}/resumed"] = fit(kind, name, folder / name, resume=half, **options)
    half = folder / "language-moa-muon" / "half.ckpt"
    records[CHANGED] = fit(kind, CHANGED, folder / "changed", stop_at=EXPERTS_STEPS, resume=half)
    name = EXPERTS[0]
    records[f"{name}/accumulated"] = fit(kind, name, folder / name, accumulate=2, stop_at=EXPERTS_STEPS)
    return records


def pruned(kind: str, folder: Path) -> dict[str, Record]:
    """The fits in PRUNED: "<fit>/dense"; "<fit>" pruned by what that came to; "<fit>/resumed"."""
    torch.set_num_threads(1)
    records = {}
    for name in PRUNED:
        dense, sparse = folder / f"{name}-dense", folder / name
        records[f"{name}/dense"] = fit(kind, name, dense, stop_at=PRUNED_SAVED_AT, save_at=PRUNED_SAVED_AT)
        source = str(dense / "half.ckpt")
        for part, saving in (
            (name, {"save_at": PRUNED_SAVED_AT}),
            (f"{name}/resumed", {"resume": sparse / "half.ckpt"}),
        ):
            pruning = Pruning(SPARSITY, "layer", gates=True, mask_from=source)
            options: dict[str, Any] = {"stop_at": PRUNED_STEPS, "callbacks": [pruning], **saving}
            records[part] = fit(kind, name, sparse, **options)
    return records


def leg(kind: str, folder: Path) -> dict[str, Record]:
    """LEG steps of a run that changes its strategy and world size: leg<i> goes on from leg<i-1>."""
    torch.set_num_threads(1)
    number = int(folder.name.removeprefix("leg"))
    stop, records = (number + 1) * LEG, {}
    for name in ACCUMULATED:
        before = folder.parent / f"leg{number - 1}" / name / "half.ckpt" if number else None
        options = {"stop_at": stop, "save_at": stop, "resume": before, "batch_size": LEG_BATCH}
        records[name] = fit(kind, name, folder / name, **options)
    return records


class States(L.Callback):
    """The task's state before, after and later than a step."""

    def __init__(self, step: int) -> None:
        self.step, self.states = step, []

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in (self.step - 1, self.step, self.step + 2):
            self.states.append({name: full(value).clone() for name, value in task.state_dict().items()})


def poisoned(kind: str, folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    """The states before, after and later than a step whose images are NaN."""
    torch.set_num_threads(1)
    found = {}
    for name in ("mae-moa", "dino-moa"):
        states = States(4)
        fit(kind, name, folder / name, stop_at=6, callbacks=[Poison(3, 3), states])
        found[name] = states.states
    return found


def first_steps(kind: str, folder: Path) -> dict[str, Record]:
    """FIRST steps of the tasks, "<strategy>/<fit>", and in two processes what it takes to build a net: "start"."""
    torch.set_num_threads(1)
    records = {}
    for strategy in ["one"] if kind == "one" else ["ddp", "fsdp"]:
        for name in ACCUMULATED:
            records[f"{strategy}/{name}"] = fit(strategy, name, folder / f"{strategy}-{name}", stop_at=FIRST)
    if os.environ.get("WORLD_SIZE") == "2":
        records["start"] = start()
    return records


class Weighed(tasks.LanguageModeling):
    """Measures what its net takes while it is built and sharded."""

    def configure_model(self) -> None:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        super().configure_model()
        taken, parameters = resident("VmHWM") - before, list(self.net.parameters())
        self.record = Record()
        self.record.shares = {
            "taken": taken,
            "largest": max(p.numel() * p.element_size() for p in parameters),
            "whole": sum(p.numel() * p.element_size() for p in parameters),
            "held": sum(p.to_local().numel() * p.element_size() for p in parameters),
        }


def resident(field: str) -> int:
    """A field of this process's memory, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def start() -> Record:
    """The start of a GPT of 57 M parameters under FSDP2, its sizes in bytes among the shares."""
    gpt = GPTConfig(depth=8, dim=768, num_heads=12)
    task = Weighed(gpt, FFNConfig("moa"), vocab_size=256, context_length=32, seed=0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=FSDPStrategy(),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.validate(task, datamodule=make_data("language", BATCH), verbose=False)
    return task.record
