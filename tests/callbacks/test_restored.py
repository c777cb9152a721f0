"""A resumed run's optimiser state fits its parameters, or the run does not start."""

import lightning as L
import pytest
import torch

from moa_lightning.callbacks.restored import RestoredState, check_state
from moa_lightning.errors import UserError


def stepped() -> torch.optim.AdamW:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.zeros(0)),
        ("exp_avg", torch.zeros(3)),
        ("exp_avg_sq", torch.zeros(3, 4)),
        ("exp_avg_sq", "x"),
        ("exp_avg", torch.zeros(4, 3, dtype=torch.int64)),
        ("step", torch.zeros(3)),
        ("step", None),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name: str, value: object) -> None:
    optimizer = stepped()
    check_state(optimizer)
    next(iter(optimizer.state.values()))[name] = value
    with pytest.raises(UserError, match="optimiser state does not fit the parameters"):
        check_state(optimizer)


def test_a_moment_that_is_missing_is_refused() -> None:
    optimizer = stepped()
    del next(iter(optimizer.state.values()))["exp_avg"]
    with pytest.raises(UserError, match="does not fit"):
        check_state(optimizer)


def test_a_state_of_no_parameter_is_refused() -> None:
    optimizer = stepped()
    optimizer.state[7] = {"step": 1.0}
    with pytest.raises(UserError, match="does not fit"):
        check_state(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("betas", 5), ("betas", (0.9,)), ("betas", (0.9, "x")), ("lr", None), ("fused", 0.5), ("eps", True)],
)
def test_settings_of_another_kind_are_refused(name: str, value: object) -> None:
    optimizer = stepped()
    optimizer.param_groups[0][name] = value
    with pytest.raises(UserError, match="settings that are none"):
        check_state(optimizer)


def test_amsgrad_wants_its_moment() -> None:
    optimizer = stepped()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(UserError, match="does not fit"):
        check_state(optimizer)


@pytest.mark.parametrize("count", ["3", None, -1, 2.5])
def test_counters_that_are_no_counts_are_refused(count: object) -> None:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    RestoredState().on_train_start(trainer, L.LightningModule())
    trainer.fit_loop.epoch_progress.total.processed = count
    with pytest.raises(UserError, match="counts of batches and steps are no counts"):
        RestoredState().on_train_start(trainer, L.LightningModule())
