"""The offline protocols in validation, test and at the end of a fit: the figures of a computation by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_lightning.callbacks import FeatureProbes
from moa_lightning.errors import UserError
from moa_lightning.evaluation import knn_accuracies, linear_accuracy
from tests.tasks.conftest import data_for, task, trainer

OPTIONS: dict[str, Any] = {"ks": (5, 20), "epochs": 3}


def by_hand(model: Any, loaders: list[Any], pixels: bool) -> dict[str, float]:
    sets: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for loader in loaders:
            batches = list(loader)
            seen = [b["image"].flatten(1) if pixels else model.features(b["image"]) for b in batches]
            sets.append((torch.cat(seen), torch.cat([b["label"] for b in batches])))
    neighbours = knn_accuracies(*sets[0], *sets[1], OPTIONS["ks"])
    linear = linear_accuracy(*sets[0], *sets[1], OPTIONS["epochs"]).top1
    return {**{f"knn{k}_top1": value for k, value in neighbours.items()}, "probe_top1": linear}


@pytest.mark.parametrize("kind", ["mae", "dino", "classification"])
def test_test_and_the_end_of_a_fit_measure_features_and_pixels(kind: str, tmp_path: Path, capsys) -> None:
    model, module = task(kind, "moa"), data_for(kind, tmp_path)
    probes = FeatureProbes(**OPTIONS)
    run = trainer(4, tmp_path, callbacks=[probes], val_check_interval=2, check_val_every_n_epoch=None)
    run.fit(model, datamodule=module)
    assert capsys.readouterr().out.count("raw pixels") == 1  # only after the last step
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    run.test(model, datamodule=module, verbose=False)
    metrics |= {name: float(value) for name, value in run.callback_metrics.items()}
    model.eval()
    for split, loaders in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        for prefix, pixels in (("", False), ("pixels_", True)):
            expected = {f"{split}/{prefix}{name}": v for name, v in by_hand(model, loaders, pixels).items()}
            assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert f"{metrics['test/pixels_probe_top1']:.2f}" in capsys.readouterr().out
    assert metrics["test/pixels_knn20_top1"] > 60


def test_tasks_without_features_or_labels_are_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("a fox jumps over a dog\n" * 200)
    model, module = task("mae"), data_for("mae", tmp_path)
    module.setup()
    for split in module.splits.values():
        split.labels.fill_(-1)
    for each, own in ((model, module), (task("language"), data_for("language", text))):
        run = trainer(1, tmp_path, callbacks=[FeatureProbes(**OPTIONS)], limit_train_batches=1)
        run.fit(each, datamodule=own)
        assert not any("probe" in name for name in run.callback_metrics)


def test_options_that_make_no_sense_are_refused() -> None:
    for options in ({"ks": []}, {"temperature": 0.0}, {"epochs": 0}, {"rates": [0.0]}, {"held_out": 1.0}):
        with pytest.raises(UserError, match=next(iter(options))):
            FeatureProbes(**options)
