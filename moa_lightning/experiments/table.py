"""The grid's answer: one row per task and variant, from the folders of the finished runs.

Files keep every digit; what people read is rounded by its uncertainty, to two digits of the spread over seeds, since
more would be noise.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Claim, Grid, GridTask, GridVariant, Interaction, Outcome, Run
from moa_lightning.experiments.power import POWER, detectable_effect, seeds_needed
from moa_lightning.experiments.schedule import Choice, Schedule, setting_name
from moa_lightning.experiments.state import Result, State
from moa_lightning.experiments.statistics import (
    CONFIDENCE,
    Judged,
    Paired,
    bootstrap_interval,
    compare_weighted,
    judge_family,
)

FOLDED = ("difference", "verdict")  # columns that a narrow terminal breaks into lines
NOT_JUDGED = "not judged"  # the task is there for others
UNDECIDED = "not decided"  # before all seeds have finished: looking early and often would claim more than 5 %
RIGHT = ("parameters", "seconds", "detectable", "would show", "p", "seeds")
NARROW = ("task", "metric", "p", "detectable", "would show")  # columns that a terminal has no room for
NOTES = {
    "mean ± sd": "↓ less is better, ↑ more is better; mean ± sd: over seeds",
    "seconds": "seconds: median training time of a run",
    "difference": f"difference: to {{baselines}}, paired by seed, with its {CONFIDENCE:.0%} t interval",
    "p": "p: of the paired t-test, after Holm's correction for the {claims} comparisons of the grid, and the verdict "
    "follows it",
    "verdict": "verdict: by the paired t-test after Holm's correction for the {claims} comparisons of the grid",
    "detectable": f"detectable: the true difference that so many seeds would show with {POWER:.0%} probability, so "
    "corrected",
    "would show": "would show: the seeds that would show the difference seen with that probability",
}
TUNED = " tuned: chosen on the validation split over seeds of its own; * at the edge of the values tried."


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
    against: str
    difference: Judged | None  # None for the baseline itself, and in tasks that are not judged
    detectable: float  # difference that the seeds show with POWER; NaN below two pairs
    seeds_to_show: int | None  # that would show the difference seen with POWER
    choice: Choice | None  # of the tuned options; None where tuning has not ended
    outcome: Outcome  # that means and difference are of
    interaction: bool = False  # a difference of differences: `variant` is its name, and it has no mean of its own

    @property
    def title(self) -> str:
        """Of the table that it belongs to."""
        return f"{self.place}: {self.arrow}"

    @property
    def place(self) -> str:
        """The task, and which of its tests."""
        return f"{self.task.name}, {self.outcome.test}" if self.outcome.test else self.task.name

    @property
    def arrow(self) -> str:
        return f"{self.outcome.metric} {'↓' if self.outcome.mode == 'min' else '↑'}"

    @property
    def verdict(self) -> str:
        if self.difference is not None:
            return self.difference.verdict
        return "baseline" if self.task.judged else NOT_JUDGED

    def cells(self) -> dict[str, str]:
        """As read by people, by heading."""
        judged = self.difference
        return {
            "task": self.place,
            "variant": self.variant,
            "metric": self.arrow,
            "mean ± sd": _spread(self.mean, self.sd) if self.n else "-",
            "tuned": _tuned(self.choice),
            "parameters": "-" if self.parameters is None else f"{self.parameters:,}",
            "seconds": _seconds(self.seconds),
            "difference": "" if judged is None else interval(judged.paired),
            "p": "" if judged is None or math.isnan(judged.p_adjusted) else f"{judged.p_adjusted:.2g}",
            "verdict": self.verdict,
            "detectable": "" if math.isnan(self.detectable) else f"{self.detectable:.2g}",
            "would show": "" if self.seeds_to_show is None else f"{self.seeds_to_show:,}",
            "seeds": str(self.n) if self.n == self.wanted else f"{self.n} of {self.wanted}",
        } | (dict.fromkeys(("mean ± sd", "tuned", "parameters", "seconds"), "") if self.interaction else {})


def headings(grid: Grid) -> list[str]:
    """Of the table, without what this grid has nothing to say about."""
    names = ["task", "variant", "metric", "mean ± sd", "tuned", "parameters", "seconds", "difference", "p", "verdict"]
    return [
        name for name in [*names, "detectable", "would show", "seeds"] if name != "tuned" or grid.tuning is not None
    ]


def make_rows(schedule: Schedule, results: Mapping[Run, Result]) -> list[Row]:
    """Rows in the grid's order, the baseline first in each task, then those of its tests. `results` holds the finished
    runs."""
    grid = schedule.grid
    finals = {run: result for run, result in results.items() if run.setting is None}
    wanted = {task.name: len(schedule.seeds(task)) for task in grid.tasks}
    compared = _comparisons(grid, finals)
    # the p value that an unfinished comparison has by now must not ease Holm's correction of the others either
    done = {
        claim: pair if pair.n >= wanted[claim.task] else replace(pair, p=math.nan) for claim, pair in compared.items()
    }
    judged = judge_family(done, {claim: claim.outcome.mode for claim in compared})
    for claim, found in judged.items():
        if found.paired.n < wanted[claim.task]:
            undecided = f"{UNDECIDED}: {found.paired.n} of {wanted[claim.task]} pairs"
            judged[claim] = replace(found, paired=compared[claim], verdict=undecided)
    rows = []
    for task, outcome in ((each, outcome) for each in grid.tasks for outcome in each.outcomes):
        for variant in sorted(grid.variants_of(task), key=lambda variant: variant.name != grid.baseline):
            difference = judged.get(Claim(task.name, variant.name, outcome))
            rows.append(_row(schedule, task, variant, outcome, finals, difference))
        for interaction in grid.interactions_of(task):
            difference = judged.get(Claim(task.name, interaction.name, outcome))
            if difference is not None:
                rows.append(_interaction_row(task, interaction, outcome, wanted[task.name], difference))
    return rows


def _row(
    schedule: Schedule,
    task: GridTask,
    variant: GridVariant,
    outcome: Outcome,
    finals: Mapping[Run, Result],
    difference: Judged | None,
) -> Row:
    found = [result for run, result in finals.items() if (run.task, run.variant) == (task.name, variant.name)]
    values = [result.metrics[outcome.column] for result in found]
    seconds = [result.seconds for result in found if not result.diverged]
    return Row(
        task=task,
        variant=variant.name,
        n=len(values),
        wanted=len(schedule.seeds(task)),
        mean=fmean(values) if values else math.nan,
        sd=stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan,
        parameters=next((result.parameters for result in found if result.parameters is not None), None),
        seconds=median(seconds) if seconds else math.nan,
        against=schedule.grid.against(variant),
        difference=difference,
        detectable=_detectable(difference),
        seeds_to_show=_seeds_to_show(difference),
        choice=schedule.choice(task, variant),
        outcome=outcome,
    )


def _interaction_row(task: GridTask, interaction: Interaction, outcome: Outcome, wanted: int, found: Judged) -> Row:
    return Row(
        task=task,
        variant=interaction.name,
        n=found.paired.n,
        wanted=wanted,
        mean=math.nan,
        sd=math.nan,
        parameters=None,
        seconds=math.nan,
        against=str(interaction),
        difference=found,
        detectable=_detectable(found),
        seeds_to_show=_seeds_to_show(found),
        choice=None,
        outcome=outcome,
        interaction=True,
    )


def _comparisons(grid: Grid, finals: Mapping[Run, Result]) -> dict[Claim, Paired]:
    """Each claim of the grid, on the seeds that have finished."""
    by_variant: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
    for run, result in finals.items():
        by_variant.setdefault((run.task, run.variant), {})[run.seed] = result.metrics

    def values(claim: Claim, variant: str) -> dict[int, float]:
        found = by_variant.get((claim.task, variant), {})
        return {seed: metrics[claim.outcome.column] for seed, metrics in found.items()}

    return {
        claim: compare_weighted(
            [(weight, values(claim, variant)) for variant, weight in weights.items()], claim.outcome.mode
        )
        for claim, weights in grid.family().items()
    }


def _detectable(judged: Judged | None) -> float:
    if judged is None or not judged.paired.sd > 0:
        return math.nan
    return detectable_effect(judged.paired.n, judged.paired.sd, comparisons=judged.family)


def _seeds_to_show(judged: Judged | None) -> int | None:
    """None where it cannot be told, or is beyond all bounds."""
    if judged is None or not judged.paired.sd > 0 or judged.paired.mean == 0:
        return None
    try:
        return seeds_needed(judged.paired.mean, judged.paired.sd, comparisons=judged.family)
    except UserError:
        return None


def write_tables(grid: Grid, rows: list[Row], states: dict[Run, State], results: dict[Run, Result]) -> list[Path]:
    """Write table.md, table.csv and runs.csv into the grid's folder; returns their paths."""
    paths = [grid.out / name for name in ("table.md", "table.csv", "runs.csv")]
    paths[0].write_text(_markdown(grid, rows), encoding="utf-8")
    _write_csv(paths[1], [_record(row) for row in rows])
    _write_csv(paths[2], [_run_record(run, where, results.get(run)) for run, where in states.items()])
    return paths


def print_table(grid: Grid, rows: list[Row], console: Console) -> None:
    """The same on the terminal, a table a task and test, colours saying what the verdict says."""
    colours = {"better": "green", "worse": "red"}
    shown = [heading for heading in headings(grid) if heading not in NARROW]
    for title, mine in by_title(rows).items():
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in shown:
            table.add_column(
                heading,
                justify="right" if heading in RIGHT else "left",
                no_wrap=heading not in FOLDED,
                min_width=len(heading),
            )
        for cells in (row.cells() for row in mine):
            table.add_row(*(Text(cells[heading], colours.get(cells[heading], "")) for heading in shown))
        console.print(table)
    console.print(Text(note(grid, shown), "dim"))


def by_title(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each table, by its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.title, []).append(row)
    return found


def note(grid: Grid, shown: Sequence[str]) -> str:
    """What these columns mean."""
    baselines = dict.fromkeys(grid.against(variant) for variant in grid.variants)
    pairs = [
        f"{grid.against(variant)} for {variant.name}"
        for variant in grid.variants
        if grid.against(variant) not in (grid.baseline, variant.name)
    ]
    names = ", ".join([grid.baseline, *pairs]) if len(baselines) > 1 else grid.baseline
    told = [text for column, text in NOTES.items() if column in shown and not (column == "verdict" and "p" in shown)]
    text = "; ".join(told).format(baselines=names, claims=grid.claims)
    defined = "".join(f" {interaction.name}: {interaction}, within a seed." for interaction in grid.interactions)
    return f"{text}.{defined}{TUNED if 'tuned' in shown else ''}"


def _markdown(grid: Grid, rows: list[Row]) -> str:
    names = headings(grid)
    lines = [names, ["---"] * len(names), *([row.cells()[name] for name in names] for row in rows)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"# {grid.name}\n\n{table}\n\n{note(grid, names)}\n"


def _record(row: Row) -> dict[str, object]:
    judged = row.difference
    fields = ("mean", "low", "high", "sd", "t", "p")
    compared = {f"difference_{name}": getattr(judged.paired, name) if judged else "" for name in fields}
    described = bootstrap_interval(judged.paired.differences) if judged else None
    return {
        "task": row.task.name,
        **row.task.axes,
        "variant": row.variant,
        **({"test": row.outcome.test} if row.task.tests else {}),
        "metric": row.outcome.metric,
        "mode": row.outcome.mode,
        "n": row.n,
        "mean": row.mean,
        "sd": row.sd,
        "tuned": "" if row.interaction else _tuned(row.choice),
        "parameters": row.parameters,
        "seconds_median": row.seconds,
        "against": "" if judged is None else row.against,
        **compared,
        "bootstrap_low": "" if described is None else described[0],
        "bootstrap_high": "" if described is None else described[1],
        "pairs": judged.paired.n if judged else "",
        "p_adjusted": judged.p_adjusted if judged else "",
        "family": judged.family if judged else "",
        "verdict": row.verdict,
        "detectable": row.detectable,
        "seeds_to_show": row.seeds_to_show,
    }


def _run_record(run: Run, where: State, result: Result | None) -> dict[str, object]:
    record: dict[str, object] = {
        "task": run.task,
        "variant": run.variant,
        "setting": run.setting or "",
        "seed": run.seed,
    }
    record["state"] = str(where)
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


def _tuned(choice: Choice | None) -> str:
    """lr=0.004*"""
    if choice is None:
        return "not yet"
    return ", ".join(
        f"{setting_name({option: value})}{'*' if option in choice.edges else ''}"
        for option, value in choice.options.items()
    )


def _seconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def _spread(mean: float, sd: float) -> str:
    if math.isnan(mean):
        return "nan"
    return f"{mean:.4g}" if math.isnan(sd) else f"{mean:.{_decimals(sd)}f} ± {sd:.{_decimals(sd)}f}"


def interval(paired: Paired) -> str:
    """A difference with its interval, rounded by it."""
    if math.isnan(paired.mean):
        return ""
    if math.isnan(paired.low):
        return f"{paired.mean:+.2g}"
    places = _decimals((paired.high - paired.low) / 2)
    mean, low, high = (f"{value:+z.{places}f}" for value in (paired.mean, paired.low, paired.high))  # z: no -0
    return f"{mean} [{low}, {high}]"


def _decimals(uncertainty: float) -> int:
    """Decimals that show an uncertainty with two digits."""
    if uncertainty <= 0 or not math.isfinite(uncertainty):
        return 4
    return min(8, max(0, 1 - math.floor(math.log10(uncertainty))))
