"""The command `moa` called in this process, in an empty folder, on one thread."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moa_lightning.cli import main

VISION = "-c configs/vision/mae_tiny.yaml -c configs/data/mnist5k.yaml -c configs/trainer/cpu.yaml"
SMALL = (
    "--trainer.precision 32-true --data.batch_size 8 --data.bank_size 16 --data.max_val_samples 8 "
    "--model.backbone_args.depth 1 --trainer.log_every_n_steps 1"
)
MAE = f"fit {VISION} {SMALL} --trainer.val_check_interval 3"
TEXT = (
    "fit -c configs/language/gpt_tiny.yaml -c configs/data/text_files.yaml --trainer.accelerator cpu "
    "--data.source words.txt --data.context_length 16 --data.batch_size 4 --model.gpt.depth 1 "
    "--trainer.log_every_n_steps 1"
)


class Outcome(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Moa = Callable[[str], Outcome]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder, one thread, and no traces of a run in the environment."""
    monkeypatch.chdir(tmp_path)
    before, environment = torch.get_num_threads(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for number, handler in handlers.items():  # Lightning leaves Ctrl-C switched off after one
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def moa(capfd: pytest.CaptureFixture[str]) -> Moa:
    """Run a command line and return its exit code and what it printed."""

    def run(line: str) -> Outcome:
        capfd.readouterr()
        code = main(line.split())
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def words() -> None:
    """words.txt, a text of 6,400 bytes."""
    Path("words.txt").write_text("the quick brown fox jumps over a lazy dog, and it sleeps on...\n" * 100)
