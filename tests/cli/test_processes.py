"""The real command with two processes: it trains, it stops at a mistake with one sentence, it does not hang."""

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import TEXT

TWO = f"{TEXT} --trainer.max_steps 2 --run_dir run --trainer.strategy ddp --trainer.devices 2"


def command(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    moa = Path(sys.executable).with_name("moa")
    return subprocess.run(
        [str(moa), *line.split()], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def test_two_processes_share_one_folder(words: None) -> None:
    outcome = command(TWO)
    assert outcome.returncode == 0
    assert "2 x cpu, DDP" in outcome.stdout
    assert outcome.stdout.count("tensorboard --logdir run") == 1
    assert Path("run/checkpoints/last.ckpt").exists()
    assert [path.name for path in Path().iterdir() if path.is_dir()] == ["run"]


# the first process ends later than the other by more than Lightning's launcher waits until it kills what is left
LATE = """import atexit, os, time
if "LOCAL_RANK" not in os.environ:
    atexit.register(time.sleep, 20)
"""


def test_a_mistake_in_both_processes_is_said_once(words: None) -> None:
    Path("sitecustomize.py").write_text(LATE)
    outcome = command(f"{TWO} --data.batch_size 5", PYTHONPATH=str(Path.cwd()))  # seen in setup, when both are up
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines() == [
        "moa: batch_size is 5, the number of samples over all devices, and does not divide among 2 devices: "
        "choose a multiple of 2"
    ]
    assert not Path("run").exists()
