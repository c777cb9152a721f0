"""What goes wrong in a run: gradients that are not finite, a rank that hangs, a job that is taken away."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ..soak.kills import Case, Run
from .group import run_group

PATIENCE = 600  # seconds, of a machine with much else to do


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_step_with_a_nan_changes_nothing_but_the_counters(kind: str, tmp_path: Path) -> None:
    for rank in run_group(kind, tmp_path, program="poisoned"):
        for name, (before, after, later) in rank.items():
            trained = [key for key in before if "student" in key or "encoder" in key]
            assert len(trained) > 10
            for key in before:
                assert later[key].isfinite().all(), (name, key)
            for key in trained:
                assert torch.equal(before[key], after[key]), (name, key)
            assert any(not torch.equal(after[key], later[key]) for key in trained), name


def run(case: Case, tmp_path: Path, *options: str) -> tuple[int, str]:
    """Exit code of a run with further options, and what it printed."""
    log = tmp_path / "run.log"
    process = Run([*case.command(tmp_path / "run", tmp_path), *options], log)
    try:
        return process.process.wait(PATIENCE), log.read_text()
    except subprocess.TimeoutExpired:
        process.end()
        raise


def added(name: str, **arguments: object) -> list[str]:
    """Options that add a callback of the soak's."""
    given = [word for key, value in arguments.items() for word in (f"--trainer.callbacks.{key}", str(value))]
    return ["--trainer.callbacks+", f"tests.soak.watch.{name}", *given]


def test_a_run_that_only_skips_is_ended_and_leaves_the_batches(tmp_path: Path) -> None:
    code, said = run(Case("mae", "one"), tmp_path, *added("Poison", first=5, last=99), "--guard.stop_after", "4")
    assert code == 3
    assert "not finite in 4 steps in a row, the last of them step 9; lower model.optimizer.lr" in said.splitlines()[-1]
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    assert [path.name for path in kept] == [f"step000000{step}_rank0.pt" for step in (6, 7, 8)]
    batch = torch.load(kept[0], weights_only=True)
    assert batch["views"][0].isnan().all()
    expected = (tmp_path / "run" / "ids-rank0.txt").read_text().splitlines()[5]
    assert expected == f"5 {' '.join(map(str, batch['id'].tolist()))}"


def test_a_rank_that_hangs_is_named_with_its_step(tmp_path: Path) -> None:
    stall = added("Stall", rank=1, step=3, late=0.4)
    code, said = run(Case("language", "ddp"), tmp_path, *stall, "--watchdog.timeout", "6")
    assert code == 70
    assert re.search(r"nothing has moved for 6 s .* furthest behind: rank 1 stands in the forward pass of step 4", said)
    assert "rank 0 stands" not in said.split("furthest behind")[1]
    time.sleep(2 * 6)
    assert not [pid for pid in Path("/proc").iterdir() if str(tmp_path).encode() in command_of(pid)]  # none is left


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(kind: str, tmp_path: Path) -> None:
    signalled = added("Signal", rank=1, step=3, number=int(signal.SIGUSR1))
    code, said = run(Case("language", kind), tmp_path, *signalled)
    assert code == os.EX_TEMPFAIL
    stopped = re.search(r"stopped after step (\d+); the last checkpoint goes on with", said)
    assert stopped is not None
    assert int(stopped[1]) in (4, 5)  # the ranks agree a step later
    last = os.readlink(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last == f"step{int(stopped[1]):07d}.ckpt"
