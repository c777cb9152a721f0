"""Gradient norm and learning rate at the optimiser's steps."""

import pytest
import torch

from moa_lightning.callbacks import GradientNorm, LearningRate
from moa_lightning.optim import total_norm

from .toy import ToyTask, events, fit, toy_loader


def values(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_the_norm_is_of_the_accumulated_gradient_before_clipping(tmp_path):
    task = ToyTask()
    loss = torch.stack([task.loss(batch) for batch in list(toy_loader())[:3]]).mean()
    gradients = torch.autograd.grad(loss, list(task.parameters()))
    expected = torch.cat([g.flatten().double() for g in gradients]).norm().item()
    assert expected > 0.02
    fit(
        task,
        tmp_path / "run",
        [GradientNorm()],
        accumulate_grad_batches=3,
        max_steps=2,
        log_every_n_steps=1,
        gradient_clip_val=0.01,
    )
    (first, value), (second, _) = values(tmp_path / "run", "train/grad_norm")
    assert value == pytest.approx(expected, rel=1e-5)
    assert (first, second) == (0, 1)


def test_the_norm_comes_on_logging_steps_only(tmp_path):
    fit(ToyTask(), tmp_path / "run", [GradientNorm()])
    assert [step for step, _ in values(tmp_path / "run", "train/grad_norm")] == [1, 3, 5, 7, 9]


def test_no_gradients_have_norm_zero():
    assert total_norm([]).item() == 0.0


class TwoRates(ToyTask):
    def configure_optimizers(self):
        first, *rest = self.parameters()
        groups = [{"params": [first], "lr": 0.5, "name": "mixing"}, {"params": rest}]
        optimizer = torch.optim.SGD(groups, lr=0.25)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                "interval": "step",
            },
        }


def test_the_rate_is_the_one_that_the_step_was_made_with(tmp_path):
    fit(TwoRates(), tmp_path / "run", [LearningRate()], max_steps=4)
    assert values(tmp_path / "run", "train/lr") == [(1, 0.25), (3, 0.125)]
    assert values(tmp_path / "run", "train/lr/mixing") == [(1, 0.25), (3, 0.125)]
    assert values(tmp_path / "run", "train/lr/1") == [(1, 0.125), (3, 0.0625)]


def test_equal_rates_have_one_tag(tmp_path):
    trainer = fit(ToyTask(), tmp_path / "run", [LearningRate()], max_steps=2)
    assert trainer.callback_metrics["train/lr"].item() == 0.1  # for files, in full precision
    tags = [tag for tag in events(tmp_path / "run").Tags()["scalars"] if tag.startswith("train/lr")]
    assert tags == ["train/lr"]
    assert values(tmp_path / "run", "train/lr")[0][1] == pytest.approx(0.1)
