"""What a grid shows while it runs: a line per event and, on a terminal, a live bar with the runs under way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moa_lightning.experiments.grid import Run


def duration(seconds: float) -> str:
    """0:42, 12:05, 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Progress:
    """Counts events of a grid and tells about them; use as a context manager around the runs."""

    jobs: int
    console: Console
    clock: Callable[[], float] = time.monotonic
    waiting: list[Run] = field(default_factory=list)  # known and not begun, in the order in which they will start
    total: int = 0  # runs of this session, as far as can be told
    under_way: dict[Run, float] = field(default_factory=dict)  # when each began
    spent: dict[str, list[float]] = field(default_factory=dict)  # seconds of the ended runs, by task
    ended: int = 0

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.live = Live(get_renderable=self._panel, console=self.console, transient=True, refresh_per_second=2)

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def ahead(self, waiting: Sequence[Run], left: int) -> None:
        """What is known to wait, and how many runs are left in all; tuning decides about later ones."""
        self.waiting = list(waiting)
        self.total = self.ended + left

    def started(self, run: Run, resumed: bool) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.under_way[run] = self.clock()
        if not self.live.is_started:
            self._say(f"{run.name} {'continues' if resumed else 'starts'}")

    def copied(self, run: Run, source: Run, finished: bool) -> None:
        """A run was taken from another one; it may still have to be measured."""
        if run in self.waiting:
            self.waiting.remove(run)
        self.ended += finished
        self._say(f"{run.name} is a copy of {source.name}")

    def done(self, run: Run, failure: str | None) -> None:
        """A run has ended; `failure` says why where it did not finish."""
        seconds = self.clock() - self.under_way.pop(run)
        self.ended += 1
        if failure is None:
            self.spent.setdefault(run.task, []).append(seconds)
        self._say(f"{run.name} " + (f"FAILED: {failure}" if failure else f"finished in {duration(seconds)}"))

    def remaining(self) -> float | None:
        """Seconds left, from the mean run of the same task (else of all tasks); None before a run has finished."""
        if not self.spent:
            return None
        overall = fmean(seconds for task in self.spent.values() for seconds in task)
        expected = {run: fmean(self.spent.get(run.task, [overall])) for run in (*self.waiting, *self.under_way)}
        now = self.clock()
        left = [max(0.0, expected[run] - (now - began)) for run, began in self.under_way.items()]
        unknown = max(0, self.total - self.ended - len(self.under_way) - len(self.waiting)) * overall
        busy = max(1, min(self.jobs, len(left) + len(self.waiting)))
        return max((sum(left) + sum(expected[run] for run in self.waiting) + unknown) / busy, max(left, default=0.0))

    def _summary(self) -> str:
        left = self.remaining()
        rest = f", about {duration(left)} left" if left is not None and self.ended < self.total else ""
        return f"{duration(self.clock() - self.began)} elapsed{rest}"

    def _say(self, event: str) -> None:
        line = f"[{self.ended}/{self.total}] {event} ({self._summary()})"
        self.console.print(Text(line), soft_wrap=True)

    def _panel(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(self.total, self.ended, width=30), f"{self.ended} of {self.total} runs", self._summary()
        )
        rows = Table.grid(padding=(0, 2))
        if not self.under_way and not self.ended:
            rows.add_row("  loading the libraries, once for all runs")
        for run, began in self.under_way.items():
            goal = dict(run.options).get("trainer.max_steps")
            steps = f"step {last_step(run.folder)}" + (f" of {goal}" if goal else "")
            rows.add_row(f"  {run.name}", steps, duration(self.clock() - began))
        return Group(bar, rows)


def last_step(folder: Path) -> int:
    """The step of the last line in a run's metrics.csv, 0 before there is one."""
    try:
        with (folder / "metrics.csv").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            return int(file.read().splitlines()[-1].split(b",")[0])
    except (OSError, IndexError, ValueError):  # no file yet, only the header, half a line
        return 0
