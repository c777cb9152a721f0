"""The grid's answer: one row per task and variant, from the folders of the finished runs.

Files keep every digit; what people read is rounded by its uncertainty, to two digits of the spread over seeds, since
more would be noise.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_lightning.experiments.grid import Grid, GridTask, Run
from moa_lightning.experiments.state import Result, State
from moa_lightning.experiments.statistics import CONFIDENCE, Paired, compare

HEADINGS = ("task", "variant", "metric", "mean ± sd", "parameters", "seconds", "difference", "verdict", "seeds")
FOLDED = ("difference", "verdict")  # columns that a narrow terminal breaks into lines
NOTE = (
    "↓ less is better, ↑ more is better; mean ± sd: over seeds; seconds: median training time of a run; difference: "
    f"to {{baseline}}, paired by seed, with its {CONFIDENCE:.0%} t interval, each on its own (not corrected for the "
    "number of comparisons)."
)


@dataclass(frozen=True)
class Row:
    """A variant on a task. Means are NaN and counts None where no run has finished."""

    task: GridTask
    variant: str
    n: int  # finished seeds
    wanted: int  # seeds in the grid
    mean: float
    sd: float  # over seeds; NaN below two
    parameters: int | None
    seconds: float  # median over seeds
    difference: Paired | None  # None for the baseline itself

    def cells(self) -> list[str]:
        """As read by people, in the order of HEADINGS."""
        parameters = "-" if self.parameters is None else f"{self.parameters:,}"
        difference, verdict = (
            ("", "baseline") if self.difference is None else (_interval(self.difference), self.difference.verdict)
        )
        seeds = str(self.n) if self.n == self.wanted else f"{self.n} of {self.wanted}"
        metric = f"{self.task.metric} {'↓' if self.task.mode == 'min' else '↑'}"
        seconds = (
            "-" if math.isnan(self.seconds) else f"{self.seconds:.3g}" if self.seconds < 100 else f"{self.seconds:.0f}"
        )
        return [
            self.task.name,
            self.variant,
            metric,
            _spread(self.mean, self.sd),
            parameters,
            seconds,
            difference,
            verdict,
            seeds,
        ]


def make_rows(grid: Grid, results: dict[Run, Result]) -> list[Row]:
    """Rows in the grid's order, the baseline first in each task. `results` holds the finished runs."""
    rows = []
    for task in grid.tasks:
        by_variant: dict[str, dict[int, Result]] = {variant.name: {} for variant in grid.variants}
        for run, result in results.items():
            if run.task == task.name:
                by_variant[run.variant][run.seed] = result
        finals = {
            name: {seed: found[seed].metrics[task.metric] for seed in found} for name, found in by_variant.items()
        }
        for name in sorted(by_variant, key=lambda name: name != grid.baseline):
            found, values = by_variant[name], list(finals[name].values())
            rows.append(
                Row(
                    task=task,
                    variant=name,
                    n=len(values),
                    wanted=len(grid.seeds),
                    mean=fmean(values) if values else math.nan,
                    sd=stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan,
                    parameters=next((result.parameters for result in found.values()), None),
                    seconds=median(result.seconds for result in found.values()) if found else math.nan,
                    difference=None
                    if name == grid.baseline
                    else compare(finals[name], finals[grid.baseline], task.mode),
                )
            )
    return rows


def write_tables(grid: Grid, rows: list[Row], states: dict[Run, State], results: dict[Run, Result]) -> list[Path]:
    """Write table.md, table.csv and runs.csv into the grid's folder; returns their paths."""
    paths = [grid.out / name for name in ("table.md", "table.csv", "runs.csv")]
    paths[0].write_text(_markdown(grid, rows), encoding="utf-8")
    _write_csv(paths[1], [_record(row) for row in rows])
    _write_csv(paths[2], [_run_record(run, where, results.get(run)) for run, where in states.items()])
    return paths


def print_table(grid: Grid, rows: list[Row], console: Console) -> None:
    """The same on the terminal, a table a task, colours saying what the verdict says."""
    colours = {"better": "green", "worse": "red"}
    for task in grid.tasks:
        mine = [row for row in rows if row.task.name == task.name]
        table = Table(
            title=f"{task.name}: {mine[0].cells()[2]}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in (HEADINGS[1], *HEADINGS[3:]):
            right = heading in ("parameters", "seconds", "seeds")
            table.add_column(
                heading, justify="right" if right else "left", no_wrap=heading not in FOLDED, min_width=len(heading)
            )
        for row in mine:
            _, variant, _, *cells, verdict, seeds = row.cells()
            table.add_row(variant, *cells, Text(verdict, colours.get(verdict, "")), seeds)
        console.print(table)
    console.print(Text(NOTE.format(baseline=grid.baseline), "dim"))


def _markdown(grid: Grid, rows: list[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"# {grid.name}\n\n{table}\n\n{NOTE.format(baseline=grid.baseline)}\n"


def _record(row: Row) -> dict[str, object]:
    paired = row.difference
    fields = ("mean", "low", "high", "sd", "t", "p")
    compared = {f"difference_{name}": getattr(paired, name) if paired else "" for name in fields}
    return {
        "task": row.task.name,
        "variant": row.variant,
        "metric": row.task.metric,
        "mode": row.task.mode,
        "n": row.n,
        "mean": row.mean,
        "sd": row.sd,
        "parameters": row.parameters,
        "seconds_median": row.seconds,
        **compared,
        "pairs": paired.n if paired else "",
        "verdict": paired.verdict if paired else "baseline",
    }


def _run_record(run: Run, where: State, result: Result | None) -> dict[str, object]:
    record: dict[str, object] = {"task": run.task, "variant": run.variant, "seed": run.seed, "state": str(where)}
    if result is not None:
        record |= {name: getattr(result, name) for name in ("parameters", "steps", "samples", "tokens", "seconds")}
        record |= result.metrics
    return record | {"folder": str(run.folder)}


def _write_csv(path: Path, records: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(records)


def _spread(mean: float, sd: float) -> str:
    if math.isnan(mean):
        return "nan"
    return f"{mean:.4g}" if math.isnan(sd) else f"{mean:.{_decimals(sd)}f} ± {sd:.{_decimals(sd)}f}"


def _interval(paired: Paired) -> str:
    if math.isnan(paired.mean):
        return ""
    if math.isnan(paired.low):
        return f"{paired.mean:+.2g}"
    places = _decimals((paired.high - paired.low) / 2)
    return f"{paired.mean:+.{places}f} [{paired.low:+.{places}f}, {paired.high:+.{places}f}]"


def _decimals(uncertainty: float) -> int:
    """Decimals that show an uncertainty with two digits."""
    if uncertainty <= 0 or not math.isfinite(uncertainty):
        return 4
    return min(8, max(0, 1 - math.floor(math.log10(uncertainty))))
