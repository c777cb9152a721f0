"""The warm process: it has no threads, and a run forked from it computes what a process of its own would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid_file import digest
from moa_lightning.experiments.worker import execute

SCRIPT = '''
import json, os, sys
from multiprocessing.forkserver import _forkserver
from pathlib import Path


def fit(arguments):
    """A short training in torch; leaves the weights' bytes."""
    import torch

    folder = Path(arguments[arguments.index("--run_dir") + 1])
    torch.manual_seed(int(arguments[arguments.index("--seed_everything") + 1]))
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(20):
        x = torch.randn(128, 64)
        loss = (net(x) - x.sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in net.parameters())
    (folder / "weights").write_bytes(weights)
    (folder / "threads").write_text(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
    result = dict(metrics={"loss": loss.item()}, parameters=1, steps=20, samples=1, tokens=None, seconds=1.0)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if sys.argv[2] == "alone":
        out.mkdir()
        fit(["--run_dir", str(out), "--seed_everything", "3"])
    else:
        from rich.console import Console
        from moa_lightning.experiments import worker
        from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Seeds
        from moa_lightning.experiments.runner import make_schedule, run_grid

        tasks, variants = (GridTask("t", (), "loss", "min"),), (GridVariant("v", ()),)
        grid = Grid("g", out, Seeds((3,), 1), "v", tasks, variants, {}, 1)
        preload = tuple(name for name in worker.PRELOAD if not name.startswith(("moa_lightning", "tasks", "data")))
        assert run_grid(make_schedule(grid), Console(), fit=fit, preload=preload) == []
        print("threads of the warm process:", len(os.listdir(f"/proc/{_forkserver._forkserver_pid}/task")))
        maps = Path(f"/proc/{_forkserver._forkserver_pid}/maps").read_text()
        print("torch is warm:", "libtorch" in maps)
'''


def test_a_job_does_not_train_what_was_edited_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("quality: 1\n")
    record = {"configs": {str(config): digest(config)}, "fit": ["fit"], "later": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    begun: list[list[str]] = []

    def fit(arguments: list[str]) -> int:
        begun.append(arguments)
        return 0

    config.write_text("quality: 1  # a comment\n")
    assert execute(tmp_path, fit) == 0
    config.write_text("quality: 2\n")
    assert execute(tmp_path, fit) == UserError.exit_code
    assert len(begun) == 1
    assert f"{config} was edited since the grid began" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_forked_run_equals_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    cores = str(len(os.sched_getaffinity(0)))
    words = [sys.executable, str(script), str(tmp_path / "grid"), "grid"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True).stdout
    assert "threads of the warm process: 1\n" in said
    assert "torch is warm: True" in said
    words = [sys.executable, str(script), str(tmp_path / "alone"), "alone"]
    subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": cores}, timeout=600, check=True)
    run = tmp_path / "grid/t/v/seed3"
    assert (run / "weights").read_bytes() == (tmp_path / "alone/weights").read_bytes()
    assert (run / "threads").read_text() == (tmp_path / "alone/threads").read_text() == f"{cores} {cores}"
    assert json.loads((run / "run.json").read_text())["fit"][0] == "fit"
