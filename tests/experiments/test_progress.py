"""The figures of the progress display, on a clock that the test turns."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moa_lightning.experiments.grid import Run
from moa_lightning.experiments.progress import Progress, duration, last_step


def make_run(task: str, seed: int, folder: Path = Path("absent")) -> Run:
    return Run(task, "la", seed, folder, (), (("trainer.max_steps", "300"),), "val/loss")


def make_progress(runs: list[Run], console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    progress = Progress(1, console, clock)
    progress.ahead(runs, len(runs))
    return progress


def test_remaining_time_follows_the_runs_of_the_same_task() -> None:
    now = 0.0
    runs = [make_run(task, seed) for seed in (0, 1) for task in ("short", "long")]
    progress = make_progress(runs, Console(file=io.StringIO()), lambda: now)
    assert progress.remaining() is None
    progress.started(runs[0], resumed=False)
    now = 10.0
    progress.done(runs[0], None)
    assert progress.remaining() == pytest.approx(30.0), "all that is known is that a run takes 10 s"
    progress.started(runs[1], resumed=False)
    now = 110.0
    progress.done(runs[1], None)
    assert progress.remaining() == pytest.approx(110.0)
    progress.started(runs[2], resumed=False)
    now = 114.0
    assert progress.remaining() == pytest.approx(106.0)


def test_a_failed_run_says_why_and_teaches_no_time() -> None:
    screen = io.StringIO()
    run = make_run("t", 0)
    progress = make_progress([run, make_run("t", 1)], Console(file=screen, width=40), lambda: 0.0)
    progress.started(run, resumed=True)
    progress.done(run, "RuntimeError: [red]")
    assert screen.getvalue() == (
        "[0/2] t/la/seed0 continues (0:00 elapsed)\n[1/2] t/la/seed0 FAILED: RuntimeError: [red] (0:00 elapsed)\n"
    )
    assert progress.remaining() is None


def test_a_terminal_shows_the_runs_under_way(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/loss\n12,1.0\n")
    screen = io.StringIO()
    with make_progress([make_run("t", 0, tmp_path)], Console(file=screen, force_terminal=True, width=100)) as progress:
        progress.started(make_run("t", 0, tmp_path), resumed=False)
        progress.live.refresh()
    assert "0 of 1 runs" in screen.getvalue()
    assert "step 12 of 300" in screen.getvalue()


def test_last_step_of_unfinished_files(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    for text, step in (("", 0), ("step,val/loss\n", 0), ("step,val/loss\n3,\n4,1.5\n", 4)):
        (tmp_path / "metrics.csv").write_text(text)
        assert last_step(tmp_path) == step


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
