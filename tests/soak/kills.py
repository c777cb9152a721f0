"""Runs that are killed at random moments and go on must end as the run that nobody touched, to the bit.

`python -m tests.soak.kills --kills 60` kills runs of three tasks, alone, under DDP and under FSDP2, with and without
loader workers, from files and from shards. Each kill is SIGKILL, to all processes of the run or to one of them, at a
random moment after a random number of batches. Every time the same command starts the run again. At the end compared
are: weights, optimiser and everything else in the last checkpoint, the sample ids of every batch (also of those that
were seen twice), metrics.csv and TensorBoard's curves, all of it without tolerance (times aside).
"""

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.writers import write_image_shards
from moa_lightning.checkpoints import RunCheckpointIO
from moa_lightning.run_folder import last_checkpoint

ROOT = Path(__file__).parents[2]
STEPS, RHYTHM = 40, 7
VISION = {"data.batch_size": 12, "data.bank_size": 24, "data.max_val_samples": 14, "model.backbone_args.embed_dim": 32}
VISION |= {"model.backbone_args.depth": 1, "data.val_fraction": 0.45, "data.test_fraction": 0.45}
OPTIONS: dict[str, dict[str, Any]] = {
    "language": {"model.gpt.dim": 32, "model.gpt.depth": 1, "data.context_length": 32, "data.max_val_samples": 14},
    "mae": {**VISION, "model.decoder_dim": 16},
    "dino": {**VISION, "data.transform.local_size": 16, "model.out_dim": 32, "model.head_hidden_dim": 32},
}
CONFIGS = {
    "language": ("language/gpt_tiny", "data/text_files"),
    "mae": ("vision/mae_tiny", "data/mnist5k"),
    "dino": ("vision/dino_tiny", "data/mnist5k"),
}
KINDS = {"one": ("auto", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp2", 2)}
PATIENCE = 600.0  # seconds for a process to end by itself, or to take its first step


@dataclass(frozen=True)
class Case:
    """A run to kill."""

    task: str
    kind: str
    workers: int = 0
    shards: bool = False

    def __str__(self) -> str:
        return f"{self.task}/{self.kind}/{self.workers} workers{'/shards' if self.shards else ''}"

    def command(self, run_dir: Path, shards: Path) -> list[str]:
        """The command line that begins the run and goes on with it."""
        size, source = CONFIGS[self.task]
        strategy, devices = KINDS[self.kind]
        options = {**OPTIONS[self.task], "data.num_workers": self.workers, "run_dir": run_dir, "ckpt_path": "auto"}
        options |= {"trainer.max_steps": STEPS, "trainer.val_check_interval": RHYTHM, "trainer.log_every_n_steps": 1}
        options |= {"trainer.accelerator": "cpu", "trainer.strategy": strategy, "trainer.devices": devices}
        options |= {"import": "tests.soak.watch", "trainer.callbacks+": "tests.soak.watch.IdLog"}
        if self.task == "language":
            options["data.source"] = ROOT / "LICENSE"
        if self.shards:
            source = "data/image_shards"
            options |= {
                "data.image_size": 28,
                "data.channels": 1,
                "data.train": shards / "train-*.tar",
                "data.val": shards / "val-*.tar",
            }
            for name in ("data.val_fraction", "data.test_fraction"):
                options.pop(name)
        configs = [f"configs/{name}.yaml" for name in (size, source, "ffn/moa")]
        words = [word for name in configs for word in ("-c", name)]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "moa_lightning.cli", "fit", *words]


CASES = [
    Case("language", "one"),
    Case("mae", "one", workers=2),
    Case("dino", "one"),
    Case("language", "ddp", workers=1),
    Case("mae", "fsdp"),
    Case("dino", "fsdp"),
    Case("mae", "one", workers=2, shards=True),
    Case("dino", "ddp"),
    Case("language", "fsdp"),
    Case("mae", "ddp", shards=True),
]


class Run:
    """One process group that executes a command, its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def members(self) -> list[int]:
        """The processes that train: the first one and those that it launched."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        launched = [int(pid) for pid in children if b"moa_lightning.cli" in _command_of(int(pid))]
        return [self.process.pid, *launched]

    def end(self) -> None:
        """Kill what is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def finish(case: Case, run_dir: Path, shards: Path) -> None:
    """Run to the end.

    Raises:
        RuntimeError: it does not get there.
    """
    run = Run(case.command(run_dir, shards), run_dir.with_suffix(".log"))
    try:
        code = run.process.wait(PATIENCE * 3)
    finally:
        run.end()
    if code:
        raise RuntimeError(f"{case}: exit code {code}\n{run_dir.with_suffix('.log').read_text()[-3000:]}")


def kill(case: Case, run_dir: Path, shards: Path, dice: random.Random) -> str:
    """Start the run, kill it, and say how; a run that ends before it can be killed counts as killed too late.

    Raises:
        RuntimeError: it takes no step, or the rest of it does not end after one of its processes was killed.
    """
    log = run_dir.with_suffix(".log")
    batches, pause, one = dice.randrange(1, STEPS // 2), dice.random() * 0.2, dice.random() < 0.3
    ids = run_dir / "ids-rank0.txt"
    before = _lines(ids)
    run = Run(case.command(run_dir, shards), log)
    try:
        _wait(lambda: run.process.poll() is not None or _lines(ids) >= before + batches, f"{case} takes no step", log)
        time.sleep(pause)
        if run.process.poll() is not None:
            return "too late"
        victims = run.members()
        if not one or len(victims) == 1:
            return f"all after {batches} batches"
        victim = dice.choice(victims)
        os.kill(victim, signal.SIGKILL)
        _wait(lambda: all(not _command_of(pid) for pid in victims), f"{case} hangs without one of its processes", log)
        return f"rank {victims.index(victim)} after {batches} batches"
    finally:
        run.end()


def _wait(done: Any, otherwise: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"{otherwise}\n{log.read_text()[-3000:]}")
        time.sleep(0.02)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """What is not the same in two finished runs."""
    first, second = (RunCheckpointIO().load_checkpoint(last_checkpoint(run)) for run in (whole, killed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        if not _equal(first[part], second[part]):
            yield f"{part} of the last checkpoint"
    ranks = sorted(path.name for path in whole.glob("ids-rank*.txt"))
    for name in ranks:
        expected = (whole / name).read_text().splitlines()
        # a line cut off by a kill runs into the next one: only whole lines tell which samples were seen
        seen = [line for line in (killed / name).read_text().splitlines() if re.fullmatch(r"\d+( \d+)+", line)]
        if set(expected) - set(seen):
            yield f"{name}: batches lost"
        if set(seen) - set(expected):
            yield f"{name}: other batches"
    if _table(whole) != _table(killed):
        yield "metrics.csv"
    if _curves(whole) != _curves(killed):
        yield "TensorBoard's curves"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _table(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock says."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and k != "seconds"} for row in rows]


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Each scalar of the event files with its steps."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/") and not tag.endswith("_vs_seconds")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def make_shards(folder: Path) -> None:
    """Shards of MNIST's 5,000 images, as `moa data` writes them."""
    write_image_shards("mnist5k", str(folder), samples_per_shard=700, val_fraction=0.1, test_fraction=0.0)


def trial(case: Case, kills: int, folder: Path, shards: Path, dice: random.Random) -> list[str]:
    """Kill one run so many times; returns how.

    Raises:
        RuntimeError: it does not end like the run that nobody touched.
    """
    folder.mkdir(parents=True)
    whole, killed = folder / "whole", folder / "killed"
    finish(case, whole, shards)
    how = []
    while len(how) < kills:
        said = kill(case, killed, shards, dice)
        if said == "too late":  # begin a second run, so that the number of kills is what was asked for
            _compare(case, whole, killed)
            shutil.rmtree(killed)
        else:
            how.append(said)
    finish(case, killed, shards)
    _compare(case, whole, killed)
    return how


def _compare(case: Case, whole: Path, killed: Path) -> None:
    found = list(differences(whole, killed))
    if found:
        raise RuntimeError(f"{case} differs in: {'; '.join(found)} (compare {whole} with {killed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.absolute() / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_shards(folder / "shards")
    dice, begin = random.Random(options.seed), time.monotonic()
    for index, case in enumerate(CASES):
        share = options.kills // len(CASES) + (index < options.kills % len(CASES))
        how = trial(case, share, folder / str(index), folder / "shards", dice)
        print(f"[{time.monotonic() - begin:5.0f} s] {case}: {len(how)} kills, identical ({'; '.join(how)})", flush=True)
    print(f"{options.kills} kills of {len(CASES)} runs (seed {options.seed}), all identical; torch {torch.__version__}")


if __name__ == "__main__":
    main()
