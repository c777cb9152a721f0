"""That the online probe measures, goes on exactly after a resume and leaves the run alone."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from moa_lightning.callbacks import OnlineProbe
from tests.tasks.conftest import data_for, task, trainer


def fit(kind: str, folder: Path, callbacks: list[L.Callback], steps: int = 6, **options: Any) -> tuple[Any, L.Trainer]:
    L.seed_everything(3, verbose=False)
    model, run = task(kind, "moa", seed=0), trainer(steps, folder, callbacks=callbacks, **options)
    run.fit(model, datamodule=data_for(kind, folder))
    return model, run


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_the_run_is_the_same_bit_by_bit_with_and_without_it(kind: str, tmp_path) -> None:
    bare, _ = fit(kind, tmp_path, [], limit_val_batches=0)
    state = torch.random.get_rng_state()
    watched, _ = fit(kind, tmp_path, [OnlineProbe()], limit_val_batches=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = bare.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in watched.state_dict().items())


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_its_accuracy_is_that_of_its_predictions_on_the_queries(kind: str, tmp_path) -> None:
    callback = OnlineProbe()
    model, run = fit(kind, tmp_path, [callback], limit_train_batches=6)
    _, query = data_for_query(kind, tmp_path)
    right = total = 0
    model.eval()
    with torch.no_grad():
        for batch in query:
            known = batch["label"] >= 0
            right += int((callback.probe.predict(model.features(batch["image"])) == batch["label"])[known].sum())
            total += int(known.sum())
    assert total == 40
    assert float(run.callback_metrics["val/linear_top1"]) == pytest.approx(100 * right / total, abs=1e-4)
    assert float(run.callback_metrics["val/feature_rank"]) > 1


def data_for_query(kind: str, folder: Path) -> list[Any]:
    module = data_for(kind, folder)
    module.setup()
    return module.val_dataloader()


def test_a_resumed_run_has_the_probe_of_a_run_in_one_go(tmp_path) -> None:
    whole, resumed = OnlineProbe(), OnlineProbe()
    fit("mae", tmp_path, [whole], 6, limit_val_batches=0)
    half, first = (
        task("mae", "moa", seed=0),
        trainer(6, tmp_path, callbacks=[OnlineProbe(), Stop(3)], limit_val_batches=0),
    )
    L.seed_everything(3, verbose=False)
    first.fit(half, datamodule=data_for("mae", tmp_path))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(6, tmp_path, callbacks=[resumed], limit_val_batches=0)
    again.fit(task("mae", "moa", seed=0), datamodule=data_for("mae", tmp_path), ckpt_path=tmp_path / "half.ckpt")
    assert float(whole.probe.state["steps"]) == 6
    assert all(torch.equal(resumed.probe.state[name], value) for name, value in whole.probe.state.items())


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_without_labels_there_is_no_probe(tmp_path) -> None:
    module = data_for("mae", tmp_path)
    module.setup()
    for split in module.splits.values():
        split.labels.fill_(-1)
    module.num_classes, callback = None, OnlineProbe()
    run = trainer(2, tmp_path, callbacks=[callback], limit_train_batches=2)
    run.fit(task("mae"), datamodule=module)
    assert callback.probe is None
    assert "val/linear_top1" not in run.callback_metrics
    assert "val/feature_rank" in run.callback_metrics


def test_a_probe_that_saw_no_label_reports_nothing(tmp_path) -> None:
    """As on stl10_unlabelled, whose held-out images have labels."""
    module, callback = data_for("mae", tmp_path), OnlineProbe()
    module.setup()
    labels = module.splits["train"].labels
    module.splits["train"].labels = torch.full_like(labels, -1)
    run = trainer(2, tmp_path, callbacks=[callback], limit_train_batches=2)
    run.fit(task("mae"), datamodule=module)
    assert float(callback.probe.state["steps"]) == 0
    assert "val/knn_top1" in run.callback_metrics
    assert "val/linear_top1" not in run.callback_metrics
    module.splits["train"].labels = labels
    run = trainer(2, tmp_path, callbacks=[callback], limit_train_batches=2)
    run.fit(task("mae"), datamodule=module)
    assert "val/linear_top1" in run.callback_metrics
