"""Spikes of the loss: what is compared with what, alone and in a joint run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moa_lightning.callbacks.guard import LEAST, Guard, watched_losses

JOINT: Any = SimpleNamespace(parts={"vision": 1, "language": 2})
ALONE: Any = SimpleNamespace()


def watch(guard: Guard, module: Any, batch: dict[str, Any], **losses: float) -> None:
    metrics = {f"train/{name}": torch.tensor(value) for name, value in losses.items()}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, is_global_zero=True, global_step=1)
    for name in watched_losses(module, batch):
        guard._watch_loss(trainer, name)


def test_a_domain_without_a_turn_is_no_spike_and_a_jump_of_one_domain_is(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    for step in range(4 * LEAST):
        turn = step % 4 == 0
        both = {"loss": 3.0 + 4.0 * turn, "loss_vision": 3.0, "loss_language": 4.0}  # what was logged last stays
        watch(guard, JOINT, {"vision": 1, "language": 1 if turn else None}, **both)
    assert guard.spikes == 0
    watch(guard, JOINT, {"vision": 1, "language": None}, loss=9.0, loss_vision=9.0, loss_language=4.0)
    assert guard.spikes == 1
    assert "train/loss_vision jumped to 9 from 3" in caplog.text


def test_a_jump_is_told_after_a_resume_too() -> None:
    guard, again = Guard(), Guard()
    for _ in range(LEAST):
        watch(guard, ALONE, {}, loss=3.0)
    again.load_state_dict(guard.state_dict())
    watch(again, ALONE, {}, loss=9.0)
    assert again.spikes == 1
