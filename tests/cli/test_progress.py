"""The progress of a fit, on a terminal and in a log file."""

import io
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from moa_lightning.callbacks.progress import StepProgress


def trainer_at(step: int, total: int) -> Any:
    return SimpleNamespace(
        callbacks=[],
        global_step=step,
        estimated_stepping_batches=total,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        callback_metrics={"train/loss": torch.tensor(0.123456), "train/grad_norm": torch.tensor(1.0)},
        progress_bar_metrics={},
    )


def run(console: Console, total: int, first: int = 0) -> None:
    progress = StepProgress(console)
    progress.on_train_start(trainer_at(first, total), None)  # type: ignore[arg-type]
    for step in range(first + 1, total + 1):
        progress.on_train_batch_start()
        progress.on_train_batch_end(trainer_at(step, total))
    progress.on_train_end(trainer_at(total, total), None)  # type: ignore[arg-type]


def test_a_log_gets_a_line_every_five_per_cent() -> None:
    file = io.StringIO()
    run(Console(file=file, soft_wrap=True, highlight=False), total=400)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/400" for step in range(20, 401, 20)]
    assert all(line.endswith("train/loss 0.1235") for line in lines)
    assert all("/s" in line and "left" in line for line in lines)


def test_a_resumed_run_goes_on_counting() -> None:
    file = io.StringIO()
    run(Console(file=file, soft_wrap=True, highlight=False), total=10, first=8)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["9/10", "10/10"]


def test_a_terminal_gets_one_live_line() -> None:
    file = io.StringIO()
    run(Console(file=file, force_terminal=True, width=120), total=50)
    assert "50/50" in file.getvalue()
    assert "1/50\n" not in file.getvalue()


def test_processes_but_the_first_are_silent() -> None:
    file = io.StringIO()
    progress = StepProgress(Console(file=file))
    progress.disable()
    progress.on_train_start(trainer_at(0, 10), None)  # type: ignore[arg-type]
    progress.on_train_batch_start()
    progress.on_train_batch_end(trainer_at(10, 10))
    assert file.getvalue() == ""
