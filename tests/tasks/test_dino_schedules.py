"""What moves in a DINO run besides the student: teacher, centre, temperature, weight decay, the frozen last layer."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from moa_lightning.optim import OptimizerConfig
from tests.official import EXACT, needs_official, official
from tests.tasks.conftest import data_for, task, trainer

STEPS = 6


class Watch(L.Callback):
    """Student, teacher, centre, decay and temperature of each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, model: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append({"temperature": model.teacher_temperature()})

    def on_train_batch_end(
        self, trainer: L.Trainer, model: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        net = model.net
        with torch.no_grad():
            target = net.teacher(batch["views"][:2])
        self.seen[-1].update(
            student=torch.cat([p.detach().flatten() for p in net.student.parameters()]),
            teacher=torch.cat([p.detach().flatten() for p in net.teacher.parameters()]),
            last=net.student.head.last_layer.weight.detach().clone(),
            center=model.loss.center.clone(),
            target=target.mean(0),
            decay={group["name"]: group["weight_decay"] for group in trainer.optimizers[0].param_groups},
        )


def watch(text: Path, folder: Path, accumulate: int = 1, **options: Any) -> list[dict[str, Any]]:
    watcher = Watch()
    model = task("dino", "moa", **options)
    run = trainer(STEPS, folder, callbacks=[watcher], limit_val_batches=0, accumulate_grad_batches=accumulate)
    run.fit(model, datamodule=data_for("dino", text))
    assert len(watcher.seen) == STEPS * accumulate
    return watcher.seen


def cosine(start: float, end: float, share: float) -> float:
    return float(end + (start - end) * (1 + torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64))) / 2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_follows_once_a_step_with_a_rising_momentum(text, tmp_path, accumulate: int) -> None:
    seen = watch(text, tmp_path, accumulate, teacher_momentum=0.8, freeze_last_layer=0.0)
    for index in range(1, len(seen)):
        before, after = seen[index - 1], seen[index]
        if (index + 1) % accumulate:
            assert torch.equal(after["teacher"], before["teacher"])
        else:
            momentum = cosine(0.8, 1.0, (index // accumulate) / STEPS)
            expected = momentum * before["teacher"] + (1 - momentum) * after["student"]
            assert torch.allclose(after["teacher"], expected, atol=1e-6)
            assert not torch.allclose(after["teacher"], before["teacher"], atol=1e-5)


def test_the_centre_follows_the_teachers_outputs(text, tmp_path) -> None:
    """With a teacher that stands still, a batch's mean output can be computed after the batch."""
    seen = watch(text, tmp_path, teacher_momentum=1.0, center_momentum=0.7)
    center = torch.zeros(1, 32)
    for step in seen:
        center = 0.7 * center + 0.3 * step["target"]
        assert torch.allclose(step["center"], center, atol=1e-6)
    assert center.abs().max() > 0.01


def test_the_last_layer_stands_still_at_first(text, tmp_path) -> None:
    """0.34 of six steps: the steps at progress 0, 1/6 and 2/6."""
    seen = watch(text, tmp_path, freeze_last_layer=0.34)
    moved = [not torch.equal(a["last"], b["last"]) for a, b in itertools.pairwise(seen)]
    assert moved == [False, False, True, True, True]
    assert not torch.equal(seen[0]["student"], seen[1]["student"])


def test_weight_decay_rises_for_matrices_only(text, tmp_path) -> None:
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.04, warmup_steps=1)
    seen = watch(text, tmp_path, optimizer=optimizer, final_weight_decay=0.4)
    for index, step in enumerate(seen):
        assert step["decay"].pop("decay") == pytest.approx(cosine(0.04, 0.4, index / STEPS), rel=EXACT)
        assert step["decay"] == {"no_decay": 0.0, "mixing": 0.0}
    constant = watch(text, tmp_path, optimizer=optimizer, final_weight_decay=None)
    assert [step["decay"]["decay"] for step in constant] == [0.04] * STEPS


@needs_official
def test_the_teachers_temperature_is_the_official_one_at_the_start_of_every_epoch(text, tmp_path) -> None:
    """The official temperature rises in steps, epoch by epoch, ours evenly between: with six epochs and a warm-up of
    three, whose last value is reached at the start of the third, the share of the run is 2/6. One step is an epoch."""
    options = {"teacher_temperature": 0.07, "teacher_temperature_start": 0.04}
    seen = watch(text, tmp_path, teacher_temperature_warmup=2 / 6, **options)
    expected = official("dino_teacher_temp_schedule").tolist()
    assert [step["temperature"] for step in seen] == pytest.approx(expected, rel=EXACT)
    sudden = watch(text, tmp_path, teacher_temperature_warmup=0.0, **options)
    assert [step["temperature"] for step in sudden] == pytest.approx([0.07] * STEPS)
