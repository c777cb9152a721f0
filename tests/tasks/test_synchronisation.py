"""Between logging steps nothing in a fit makes the host wait for the device.

Shown with torch's profiler on the CPU by the operations that would: reading a number, asking how many elements a mask
selects, making a tensor of host numbers (on a GPU a copy that is waited for). A number that an operation's CPU code
reads for itself, such as the scale of _foreach_mul_, is not counted: the GPU's code reads it on the device. The guard
alone reads a number a step: that of the step before, from a copy that was started long ago (on a GPU), so that the
device has its next work already.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch.profiler import ProfilerActivity, profile

from moa_lightning.callbacks import default_callbacks
from moa_lightning.callbacks.guard import Guard
from moa_lightning.callbacks.preemption import Preemption
from moa_lightning.callbacks.progress import StepProgress
from moa_lightning.callbacks.watchdog import Watchdog
from tests.planning.nets import TASKS, Sizes
from tests.runs.fits import make_task

WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::lift_fresh",
)
READING = ("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense")  # how a number is asked for
FIRST, LAST, END = 5, 7, 9


class Window(L.Callback):
    """Profiles the steps from FIRST to LAST, with all that other callbacks do after them."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == FIRST - 1:
            self.profiler.start()
        elif trainer.global_step == LAST:
            self.profiler.stop()
        elif trainer.global_step == END:
            trainer.should_stop = True

    def found(self) -> Counter[str]:
        events = self.profiler.events()
        return Counter(event.name for event in events if event.name in WAITING and not inside_another(event))

    def steps(self) -> int:
        return sum("AdamW.step" in event.name for event in self.profiler.events())


def inside_another(event: Any) -> bool:
    """Whether a number is read by an operation's own CPU code, and not asked for."""
    while event.name.startswith(READING) and event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name.startswith("aten::") and not event.name.startswith((*WAITING, *READING))


class Reader(L.Callback):
    """Reads the loss at every step, as a careless callback does."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        outputs["loss"].item()


def waits(task: str, folder: Path, *extra: L.Callback) -> Counter[str]:
    """The operations of a fit with the callbacks of `moa fit` that would wait for a GPU, over three steps."""
    window = Window()
    watchers = [StepProgress(), Preemption(), Watchdog(), *default_callbacks()]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=200,  # so long that the progress line, which reads metrics, is not due
        gradient_clip_val=1.0,
        log_every_n_steps=50,
        callbacks=[*watchers, *extra, window],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    task, _, extra = task.partition("-")
    trainer.fit(make_task(task, "moa", extra), datamodule=Sizes(task, steps=200))
    assert window.steps() == LAST - FIRST + 1
    return window.found()


@pytest.mark.parametrize("task", TASKS)
def test_no_step_between_logging_steps_waits_for_the_device(task: str, tmp_path: Path) -> None:
    assert not waits(task, tmp_path)


def test_masks_are_made_on_the_host_and_how_many_patches_they_hide_is_not_asked_of_the_device(tmp_path: Path) -> None:
    """Mask, places and weights come from NumPy, before the batch travels."""
    assert waits("dino-masked", tmp_path) == {"aten::lift_fresh": 3 * (LAST - FIRST + 1)}


def test_the_guard_reads_one_flag_a_step_and_the_profiler_sees_it(tmp_path: Path) -> None:
    assert waits("mae", tmp_path, Guard()) == {"aten::_local_scalar_dense": LAST - FIRST + 1}


def test_a_callback_that_reads_the_loss_would_be_found(tmp_path: Path) -> None:
    assert waits("mae", tmp_path, Reader())["aten::_local_scalar_dense"] == LAST - FIRST + 1
