"""configs/slurm.sbatch with stand-ins for srun and scontrol: two tasks train, are told that the time is up, save, and
the job asks to be queued again; the second time it goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..runs.group import free_port
from .conftest import TEXT

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
tasks = []
for rank in range(2):
    slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    tasks.append(subprocess.Popen(command, env={**os.environ, **slurm}))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def job(tmp_path: Path, words: None) -> dict[str, str]:
    """The environment of a job of two tasks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    moa = f'#!/bin/sh\nexec {sys.executable} -m moa_lightning.cli "$@"\n'
    scontrol = f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("moa", moa)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"NTASKS": 2, "NNODES": 1, "NTASKS_PER_NODE": 2, "JOB_ID": 17, "JOB_NAME": "moa", "NODELIST": "here"}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    given = {**here, **{f"SLURM_{name}": value for name, value in slurm.items()}}
    own = {name: str(value) for name, value in given.items()}
    return {**os.environ, **own, "PATH": f"{tools}:{os.environ['PATH']}"}


def start(job: dict[str, str], steps: int) -> subprocess.Popen[bytes]:
    options = f"{TEXT.removeprefix('fit ')} --run_dir run --trainer.max_steps {steps} --trainer.val_check_interval 1000"
    options += " --trainer.precision 32-true"
    with Path("job.log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / "configs" / "slurm.sbatch"), *options.split(), "--trainer.strategy", "fsdp2"],
            env=job,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(job: dict[str, str]) -> None:
    process = start(job, 100_000)
    try:
        end = time.monotonic() + 600
        while not (Path("run/metrics.csv").exists() and len(Path("run/metrics.csv").read_text().splitlines()) > 4):
            assert process.poll() is None, Path("job.log").read_text()
            assert time.monotonic() < end, Path("job.log").read_text()
            time.sleep(0.1)
        srun = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        asked = time.monotonic()
        os.kill(int(srun), signal.SIGUSR1)
        assert process.wait(600) == 75, Path("job.log").read_text()
        assert time.monotonic() - asked < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert Path("scontrol.txt").read_text() == "requeue 17\n"
    saved = int(os.readlink("run/checkpoints/last.ckpt")[4:11])
    assert saved >= 4
    assert start(job, saved + 2).wait(600) == 0, Path("job.log").read_text()
    assert f"going on after step {saved}" in Path("job.log").read_text()
    assert json.loads(Path("run/result.json").read_text())["steps"] == saved + 2
