"""A grid whose runs are jobs, through submitit's processes on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.cluster import JOB, Jobs, RunJob
from moa_lightning.experiments.grid import Cluster
from tests.experiments import fake_moa
from tests.experiments.test_ablate import begun, finished, results, wait_for

MakeGrid = Callable[..., Path]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Start `moa ablate` with fake runs as a process; what it leaves under way is ended."""
    grids: list[subprocess.Popen[str]] = []

    def run(path: Path) -> "subprocess.Popen[str]":
        words = [sys.executable, fake_moa.__file__, str(path)]
        grids.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return grids[-1]

    yield run
    for grid in grids:
        grid.kill()
    for job in tmp_path.rglob(JOB):
        with suppress(OSError, ValueError):
            os.kill(int(json.loads(job.read_text())["job"]), signal.SIGTERM)


def cluster_grid(make_grid: MakeGrid, folder: Path, seconds: float) -> Path:
    return make_grid(
        tasks={"t": {"config": [str(folder / "task.yaml")], "metric": "val/loss", "mode": "min"}},
        overrides={"steps": 8, "step_seconds": seconds, "journal": str(folder / "journal.txt")},
        seeds=[0],
        cluster={"kind": "local", "timeout_min": 5},
    )


def test_a_grid_of_jobs_goes_on_without_its_process(
    start: Callable[[Path], "subprocess.Popen[str]"], make_grid: MakeGrid, tmp_path: Path
) -> None:
    path = cluster_grid(make_grid, tmp_path, seconds=0.5)
    grid = start(path)
    wait_for(lambda: len(begun(tmp_path)) == 2)  # jobs: 2
    grid.send_signal(signal.SIGINT)
    output, _ = grid.communicate(timeout=60)
    assert grid.returncode == 130
    assert "2 jobs go on by themselves" in output
    again = start(path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert Counter(begun(tmp_path)) == {f"t/{name}/seed0 from 0": 1 for name in ("gelu", "la", "moa")}, output
    assert len(finished(tmp_path)) == 3
    by_jobs = results(tmp_path)
    (tmp_path / "out").rename(tmp_path / "jobs")
    path.write_text(
        "\n".join(
            line
            for line in path.read_text().splitlines()
            if "cluster" not in line[:7] and "kind: local" not in line and "timeout_min" not in line
        )
    )
    assert start(path).wait(120) == 0
    assert results(tmp_path) == by_jobs


def test_a_job_that_must_end_saves_and_is_queued_again(tmp_path: Path) -> None:
    """Submitit's own signal to a job before its time limit; the run goes on in the second process."""
    submitit = pytest.importorskip("submitit")
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1]); state = folder / 'state'\n"
        "if state.exists():\n"
        "    state.rename(folder / 'result.json'); sys.exit(0)\n"
        "def save(*_):\n"
        "    state.write_text('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(RunJob(tmp_path, (sys.executable, str(script))))
    wait_for((tmp_path / "ready").exists)
    time.sleep(0.2)
    # the controller passes SIGTERM on to its tasks, where submitit ignores it; its own signal goes to the task itself
    task = next(int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == int(job.job_id))
    os.kill(task, signal.SIGUSR2)
    wait_for(lambda: (tmp_path / "result.json").exists())
    assert (tmp_path / "result.json").read_text() == "saved"
    job.wait()


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_an_unknown_parameter_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cluster: .*partitoin") as error:
        Jobs(Cluster("local", {"slurm_partitoin": "x", "partitoin": "x"}), tmp_path, 1, fake_moa.COMMAND)
    assert "\n" not in str(error.value)
