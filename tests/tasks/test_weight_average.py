"""A fit that averages its weights, for every task: what is averaged, validated, left behind and saved."""

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.optim import OptimizerConfig, net_weights
from tests.tasks.conftest import TASKS, data_for, task, trainer

STEPS, DECAY = 6, 0.4


def config(decay: float = DECAY) -> OptimizerConfig:
    return OptimizerConfig(lr=3e-3, warmup_steps=2, average_decay=decay)


class Watch(L.Callback):
    """The averages by their formula from the weights after each step, and what a checkpoint of a validation holds."""

    def __init__(self) -> None:
        self.step = 0
        self.expected: dict[str, Tensor] = {}
        self.saved: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.expected = {n: p.detach().double() for n, p in module.net.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:  # gradients accumulate
            return
        d = min(DECAY, (1 + self.step) / (10 + self.step))
        self.step = trainer.global_step
        for name, weight in module.net.named_parameters():
            if name in self.expected:
                self.expected[name] = d * self.expected[name] + (1 - d) * weight.detach().double()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.saved = {"state_dict": {name: value.clone() for name, value in module.state_dict().items()}}
        module.on_save_checkpoint(self.saved)


class Load(L.Callback):
    """Gives a net other weights before it is validated."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        module.net.load_state_dict(self.weights)


@pytest.mark.parametrize(("kind", "optimizer"), [*((kind, "adamw") for kind in TASKS), ("language", "muon")])
def test_averages_follow_the_steps_and_are_validated(kind, optimizer, text, tmp_path):
    torch.optim.AdamW([torch.zeros(1)])  # from now on torch calls an optimiser's hooks within AdamW's step too
    watch, module = Watch(), task(kind, "moa", optimizer=replace(config(), name=optimizer))
    rhythm = {"accumulate_grad_batches": 2, "val_check_interval": 2 * STEPS, "check_val_every_n_epoch": None}
    fit = trainer(STEPS, tmp_path, callbacks=[watch], **rhythm)
    fit.fit(module, datamodule=data_for(kind, text))
    averages = dict(module.average.named_parameters())
    assert averages.keys() == watch.expected.keys()
    for name, expected in watch.expected.items():
        assert (averages[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-12, name
    weights = dict(module.net.named_parameters())
    assert sum(not torch.equal(weights[name], value) for name, value in averages.items()) > len(averages) / 2
    for name, value in module.state_dict().items():  # the weights are back, and they were saved as weights
        assert torch.equal(watch.saved["state_dict"][name], value), name
    metrics = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val/")}
    alone = trainer(STEPS, tmp_path, callbacks=[Load(net_weights(watch.saved))])
    alone.validate(task(kind, "moa", optimizer=config(0.0)), datamodule=data_for(kind, text), verbose=False)
    assert {name: float(alone.callback_metrics[name]) for name in metrics} == pytest.approx(metrics, rel=1e-6)


def test_weights_in_bfloat16_have_no_average(text, tmp_path):
    fit = trainer(1, tmp_path, precision="bf16-true")
    with pytest.raises(UserError, match="average_decay needs float32"):
        fit.fit(task("language", optimizer=config()), datamodule=data_for("language", text))
