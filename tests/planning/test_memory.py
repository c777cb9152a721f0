"""The memory that is planned is what torch's own tracker sees in real runs."""

from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from moa_lightning.kernels import blocked
from tests.planning.nets import TASKS, Sizes, planned, trainer
from tests.runs.fits import make_task


class Reference(MemTracker):
    """torch's own tracker, which cannot hook parameters that take no gradient; its total does not need the hooks."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class Forget(L.Callback):
    """Lets the reference see a second step."""

    def __init__(self, tracker: Reference) -> None:
        self.tracker = tracker

    def on_train_batch_start(self, *_: Any) -> None:
        self.tracker.reset_mod_stats()


def real_peak(task: str, ffn: str, precision: str, accumulate: int) -> int:
    """Bytes at the worst moment of two real optimiser steps, by torch's tracker."""
    module = make_task(task, ffn)
    with Reference() as tracker:
        fit = trainer(max_steps=2, precision=precision, accumulate_grad_batches=accumulate, callbacks=[Forget(tracker)])
        fit.fit(module, datamodule=Sizes(task, steps=2 * accumulate))
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    ("ffn", "precision", "accumulate"), [("moa", "32-true", 1), ("moa", "bf16-mixed", 1), ("gelu", "bf16-mixed", 2)]
)
@pytest.mark.parametrize("task", TASKS)
def test_peak_memory_is_that_of_a_real_run(task, precision, accumulate, ffn, monkeypatch):
    # the plan is of the mix as a GPU runs it; the CPU's own way needs less for a moment, which tells in nets this small
    monkeypatch.setattr(blocked, "applies", lambda *tensors: False)
    plan = planned(task, ffn, precision=precision, accumulate=accumulate)
    assert plan.peak == pytest.approx(real_peak(task, ffn, precision, accumulate), rel=0.02)
