"""Programs that train in turns, so that two trainers can be timed against each other as they are.

Each program runs in a process of its own and does nothing while another one has its turn: on a busy machine all of them
see the same load, and a ratio of their times in the same round is fair. A program says where a step begins by calling
`Turn.step`; the process that starts the programs hands out turns with `measure`. Only the standard library is used,
as a program may belong to another environment.
"""

import os
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANY = 100_000  # steps
VARIABLE = "BENCHMARK_TURN"  # the two ends of the pipes that a program gets


class Turn:
    """In a program: waits for a turn, and tells how long the turn took."""

    def __init__(self) -> None:
        self._read, self._write = map(int, os.environ[VARIABLE].split(","))
        self._left, self._begun = 0, 0.0

    def step(self) -> None:
        """A step begins here, and the one before it has ended."""
        if self._left == 0:
            if self._begun:
                os.write(self._write, struct.pack("d", time.perf_counter() - self._begun))
            (self._left,) = struct.unpack("i", os.read(self._read, 4))
            self._begun = time.perf_counter()
        self._left -= 1


class Program:
    """A process that takes turns.

    Args:
        command: its arguments, the program first.
        folder: where it runs, and where its output goes (<folder>/output.txt).
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        theirs, self._write = os.pipe()
        self._read, other = os.pipe()
        variables = {**os.environ, **(environment or {}), VARIABLE: f"{theirs},{other}"}
        with (folder / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=variables, pass_fds=(theirs, other), stdout=output, stderr=output
            )
        os.close(theirs)
        os.close(other)

    def turn(self, steps: int) -> float:
        """Seconds of so many steps.

        Raises:
            SystemExit: the program ended.
        """
        os.write(self._write, struct.pack("i", steps))
        answer = os.read(self._read, 8)
        if not answer:
            sys.exit((self.folder / "output.txt").read_text()[-3000:])
        return float(struct.unpack("d", answer)[0])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def fit(files: Sequence[str], settings: Mapping[str, object], folder: Path, threads: int) -> Program:
    """`moa fit` that takes turns, with all its callbacks.

    Args:
        files: its configs, such as "language/gpt_tiny".
        settings: options after them; by itself it validates and stops after more steps than any benchmark takes.
        folder: made for it.
    """
    folder.mkdir()
    (folder / "turns.yaml").write_text("trainer:\n  callbacks:\n  - class_path: take_turns.TakeTurns\n")
    command = [sys.executable, "-m", "moa_lightning.cli", "fit", "--import", "take_turns"]
    for file in files:
        command += ["-c", str(ROOT / "configs" / f"{file}.yaml")]
    command += ["-c", "turns.yaml"]
    never = {"trainer.max_steps": MANY, "trainer.val_check_interval": MANY}
    for name, value in {**never, **settings, "run_dir": folder / "run"}.items():
        command += [f"--{name}", str(value)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return Program(command, folder, {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths})


def measure(programs: Mapping[str, Program], rounds: int, steps: int, warm_up: int = 5) -> dict[str, list[float]]:
    """Seconds of a step in each round, by program; all programs are ended then.

    Args:
        rounds: in each of them every program has a turn.
        steps: of a turn.
        warm_up: steps of a turn that is not counted, in which programs compile.
    """
    try:
        for program in programs.values():
            program.turn(warm_up)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, program in programs.items():
                seconds[name].append(program.turn(steps) / steps)
        return seconds
    finally:
        for program in programs.values():
            program.end()
