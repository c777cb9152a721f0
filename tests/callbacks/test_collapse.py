"""That a collapse is said while it happens, in words, in TensorBoard and in the progress line, and only then."""

import io
import logging
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from moa_lightning.callbacks import Collapse
from moa_lightning.callbacks.collapse import LEAST_SPREAD, PATIENCE, SETTLED, diagnosis
from moa_lightning.callbacks.progress import StepProgress
from moa_lightning.optim import OptimizerConfig
from tasks import MAE
from tests.tasks.conftest import data_for, task

SOUND = {
    "train/feature_spread": 0.5,
    "train/feature_rank": 20.0,
    "train/teacher_entropy": 0.8,
    "train/prototype_entropy": 0.7,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, ""),
        ({"train/feature_spread": 0.001}, "alike"),
        ({"train/feature_rank": 1.1}, "line"),
        ({"train/teacher_entropy": 0.999}, "uniform"),
        ({"train/prototype_entropy": 1e-4}, "same prototype"),
    ],
)
def test_the_diagnosis_names_what_is_wrong(change: dict[str, float], word: str) -> None:
    found = diagnosis({**SOUND, **change})
    assert word in found
    assert bool(found) == bool(word)


@pytest.mark.parametrize(("spread", "rank", "word"), [(7e-4, 1.48, ""), (3e-5, 1.07, "alike"), (0.5, 1.1, "line")])
def test_without_a_teacher_only_a_rank_of_about_one_is_a_collapse(spread: float, rank: float, word: str) -> None:
    """Of a sound MAE at its lowest, of one that a learning rate of 0.3 had ruined, and of features on a line."""
    found = diagnosis({"train/feature_spread": spread, "train/feature_rank": rank})
    assert word in found
    assert bool(found) == bool(word)


class Features(L.LightningModule):
    """Its features shrink to one point after `sound` steps, and spread again after `sick` more."""

    def __init__(self, sound: int, sick: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sound, self.sick = sound, sick
        self.train_features: torch.Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        sick = self.sound <= self.global_step < self.sound + self.sick
        noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(batch_idx))
        self.train_features = 1 + (1e-3 if sick else 1.0) * noise
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: L.LightningModule, folder: Any, steps: int, watcher: Collapse, **options: Any) -> str:
    shown = io.StringIO()
    progress = StepProgress(Console(file=shown, soft_wrap=True))
    run = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, log_every_n_steps=1, limit_val_batches=0,
        logger=TensorBoardLogger(folder, name="", version=""), enable_checkpointing=False,
        enable_model_summary=False, callbacks=[progress, watcher], use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(model, **options)
    return shown.getvalue()


def test_it_is_said_while_it_lasts_and_taken_back(tmp_path, caplog) -> None:
    watcher, loader = Collapse(), DataLoader(TensorDataset(torch.zeros(40, 1)))
    with caplog.at_level(logging.WARNING, "moa_lightning.callbacks.collapse"):
        shown = fit(Features(10, 20), tmp_path, 40, watcher, train_dataloaders=loader)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith(f"step {10 + PATIENCE}: collapsed: the features of all images are alike")
    assert said[1] == "step 31: the net tells images apart again"
    lines = {int(line.split()[1].split("/")[0]): "alike" in line for line in shown.splitlines() if "step" in line}
    assert [lines[step] for step in (10, 20, 30, 40)] == [False, True, True, False]
    events = EventAccumulator(str(tmp_path)).Reload()
    collapsed = {event.step: event.value for event in events.Scalars("train/collapsed")}
    assert [step for step, value in collapsed.items() if value] == list(range(10 + PATIENCE - 1, 30))
    assert len(events.Tensors("train/collapse/text_summary")) == 2


class Named(Features):
    """Sound features, and the entropies of a teacher with one prototype for all, logged as `suffix` has it."""

    def __init__(self, suffix: str, images: int) -> None:
        super().__init__(10**6, 0)
        self.suffix, self.images = suffix, images

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.train_features = self.train_features[: self.images]
        self.log(f"train/teacher_entropy{self.suffix}", 0.001)
        self.log(f"train/prototype_entropy{self.suffix}", 0.001)
        return loss


@pytest.mark.parametrize("suffix", ["", "_vision"])
def test_one_prototype_for_all_images_is_found_also_in_a_joint_run(suffix: str, tmp_path) -> None:
    watcher, loader = Collapse(), DataLoader(TensorDataset(torch.zeros(40, 1)))
    fit(Named(suffix, 16), tmp_path / "early", SETTLED, watcher, train_dataloaders=loader)
    assert watcher.words == "", "the centre needs some steps"
    fit(Named(suffix, 16), tmp_path / "late", SETTLED + PATIENCE, watcher, train_dataloaders=loader)
    assert "same prototype" in watcher.words


def test_one_image_is_no_collapse(tmp_path) -> None:
    watcher, loader = Collapse(), DataLoader(TensorDataset(torch.zeros(40, 1)))
    fit(Named("", 1), tmp_path, PATIENCE + 1, watcher, train_dataloaders=loader)
    assert watcher.words == ""


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_a_net_that_is_forced_to_collapse_is_found_and_a_sound_one_is_not(kind: str, text, tmp_path) -> None:
    """A backbone whose last norm has no scale gives every image the same features."""
    sound, forced = Collapse(), Collapse()
    fit(task(kind, seed=0), tmp_path / "sound", 6, sound, datamodule=data_for(kind, text))
    assert sound.words == ""
    model = task(kind, seed=0)
    model.configure_model = lambda build=model.configure_model: (build(), _flatten(model))[0]  # type: ignore[method-assign]
    fit(model, tmp_path / "forced", 6, forced, datamodule=data_for(kind, text))
    assert "collapsed" in forced.words


def _flatten(model: Any) -> None:
    net = model.net
    for backbone in [net.student.backbone, net.teacher.backbone] if hasattr(net, "teacher") else [net.encoder]:
        norm = next(m for name, m in backbone.named_modules() if name in ("norm", "fc_norm") and hasattr(m, "weight"))
        norm.weight.data.mul_(1e-3)
        norm.bias.data.fill_(1.0)


def test_a_young_mae_whose_features_share_a_large_vector_is_sound(text, tmp_path, caplog) -> None:
    """The quickstart's net on smaller batches."""
    watcher, vit = Collapse(), {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 4}
    decoder = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4}
    model = MAE("vit_tiny_patch16_224", vit, optimizer=OptimizerConfig(warmup_steps=5), seed=0, **decoder)
    with caplog.at_level(logging.WARNING, "moa_lightning.callbacks.collapse"):
        fit(model, tmp_path, 40, watcher, datamodule=data_for("mae", text))
    assert not caplog.records
    spreads = [event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("train/feature_spread")]
    assert max(spreads[-PATIENCE:]) < LEAST_SPREAD


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("unused")
