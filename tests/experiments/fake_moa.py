"""A stand-in for `moa fit` that keeps its contract (metrics.csv, last.ckpt, result.json) without training.

The "loss" is a formula of step, seed and the config's `quality`, so that an interrupted and continued grid must end
with the very numbers of an uninterrupted one. As a script it is `moa ablate` with this fit: `python fake_moa.py
GRID.yaml ...`. Options: --steps, --step_seconds, --journal FILE (a line for each start), --fail MESSAGE, --die true,
--silent true, --diverge true, --after FOLDER (fails unless a run has finished there), --rate R (the best is the
config's `best_rate`). `test --fog F` adds F times the seed to what it reports and writes as the options' own file.
"""

import argparse
import csv
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

from moa_lightning.errors import Diverged, UserError
from moa_lightning.experiments.command import ablate_command
from moa_lightning.experiments.worker import execute

COMMAND = (sys.executable, __file__)
METRIC_COLUMNS = ["step", "samples", "tokens", "seconds", "train/loss", "val/loss"]


def loss(step: int, seed: int, quality: float, too_far: float = 0.0) -> float:
    return 4.0 / (1 + step) + 0.01 * random.Random(seed).random() - quality * (1 + 0.2 * (seed % 3)) + too_far**2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["fit", "test", "validate"])
    parser.add_argument("-c", dest="configs", action="append", type=Path)
    for option in ("--run_dir", "--journal"):
        parser.add_argument(option, type=Path)
    for option, kind in (("--seed_everything", int), ("--steps", int), ("--step_seconds", float)):
        parser.add_argument(option, type=kind, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--freeze_gates", type=int)
    for option in ("--fail", "--die", "--silent", "--ckpt_path", "--diverge", "--after", "--fog"):
        parser.add_argument(option, default="")
    options = parser.parse_args(arguments)
    if options.command == "test":
        folder = Path(options.ckpt_path).parents[1]
        journal(folder, folder / "journal.txt", f"tested {options.fog}".strip())
        value = json.loads((folder / "result.json").read_text())["metrics"]["val/loss"] + 1
        found = {"test/loss": value, "test/top1": 50 * value}
        if not options.fog:
            write_whole(folder / "test.json", json.dumps({"metrics": {"test/loss": value}}))
        elif options.fog == "lost":
            print("no fog at hand")
            return 2
        else:
            options.run_dir.mkdir(parents=True, exist_ok=True)
            foggy = {name: value + float(options.fog) * int(folder.name[4:]) for name, value in found.items()}
            write_whole(options.run_dir / f"test-fog-{options.fog}.json", json.dumps({"metrics": foggy}))
        return 0
    if options.command == "validate":
        folder = Path(options.ckpt_path).parents[1]
        journal(folder, folder / "journal.txt", f"held over {options.freeze_gates}")
        trained = json.loads((folder / "result.json").read_text())["metrics"]["val/loss"]
        held = {"trained": {"val/loss": trained}, "held": {"val/loss": trained + 0.25 + 0.01 * int(folder.name[4:])}}
        write_whole(folder / "held_gates.json", json.dumps(held))
        return 0
    folder = options.run_dir
    checkpoint = folder / "checkpoints" / "last.ckpt"
    begin = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    if options.journal:
        journal(folder, options.journal, f"from {begin}")
    print("a first line", flush=True)
    config: dict[str, float] = {}
    for path in options.configs:
        config |= yaml.safe_load(path.read_text()) or {}
    if options.fail:
        raise RuntimeError(options.fail)
    if options.die:
        os.kill(os.getpid(), signal.SIGKILL)
    if options.diverge:
        print("moa: the gradient was not finite")
        return Diverged.exit_code
    if options.after and not (Path(options.after) / "result.json").is_file():
        raise RuntimeError(f"{options.after} has not finished")
    quality, too_far = config.get("quality", 0.0), 0.0
    if options.rate is not None:
        too_far = math.log(options.rate / config.get("best_rate", 0.01))
    train(options, folder, checkpoint, begin, quality)
    metrics = {"val/loss": loss(options.steps, options.seed_everything, quality, too_far)}
    if not options.silent:
        result = {"metrics": metrics, "parameters": 1000, "steps": options.steps, "samples": 8 * options.steps}
        result |= {"tokens": None, "seconds": 0.5 * options.steps, "task": "Fake", "seed": options.seed_everything}
        write_whole(folder / "result.json", json.dumps(result))
    return 0


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all its text or not at all, whenever the process is killed."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    os.replace(draft, path)


def journal(folder: Path, path: Path, event: str) -> None:
    with path.open("a") as file:
        file.write(f"{'/'.join(folder.parts[-3:])} {event}\n")


def train(options: argparse.Namespace, folder: Path, checkpoint: Path, begin: int, quality: float) -> None:
    checkpoint.parent.mkdir(exist_ok=True)
    with (folder / "metrics.csv").open("a" if begin else "w", newline="") as file:
        writer = csv.writer(file)
        if not begin:
            writer.writerow(METRIC_COLUMNS)
        for step in range(begin + 1, options.steps + 1):
            time.sleep(options.step_seconds)
            value = loss(step, options.seed_everything, quality)
            writer.writerow([step, 8 * step, "", 0.5 * step, value, value if step % 2 == 0 else ""])
            file.flush()
            write_whole(checkpoint, str(step))


if __name__ == "__main__":
    if (Path(sys.argv[1]) / "run.json").is_file():
        sys.exit(execute(Path(sys.argv[1]), main))
    try:
        sys.exit(ablate_command(sys.argv[1:], Path, main, ("moa_lightning.experiments.command",), COMMAND))
    except UserError as error:
        print(f"error: {error}")
        sys.exit(2)
