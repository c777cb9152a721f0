"""docs/results.md against the published runs: each figure of a table with verdicts is worked out again.

A section is tied to its runs by the link to results/NAME.csv in it, and NAME is the grid, which says what is compared
with what. Tables have a row for each variant or interaction (a column `against`), or for each task (columns such as
`LA − GELU`).
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pytest

from benchmarks.publish import published
from moa_lightning.configs import resolve_config
from moa_lightning.experiments.grid import Grid, Outcome
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.statistics import Judged, compare_weighted, judge_family

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"

# a name on the page -> in the grid; one that is not here is the grid's own, in whatever case
VARIANTS = {
    "ReLU²": "relu2",
    "gated MoA": "moa_both",
    "GELU, wider by MoA's parameters": "gelu_widened",
    "MoA, gates frozen at random": "moa_frozen_gates",
    "MoA, gates shuffled between samples": "moa_shuffled_gates",
    "LA, begun at the mean mix of a trained MoA": "la_at_mean",
    "that mean mix as a fixed activation": "la_held_at_mean",
    "MoA, begun with a MAE's mixes": "moa_start",
    "MoA, held at a MAE's mixes": "moa_held",
    "a MAE's mean mix as a fixed activation": "la_held",
    "GELU, going on from GELU": "gelu_on",
    "LA, going on from GELU": "la_on",
    "MoA, going on from GELU": "moa_on",
    "MoA, begun with a GPT's mixes": "moa_text",
    "a GPT's mean mix as a fixed activation": "la_text_held",
    "joint, nothing tied": "joint",
    "α tied": "alpha",
    "α and gates tied": "mixes",
    "whole layers tied": "ffn",
    "ticket, 30 % kept": "ticket70",
    "ticket, 10 % kept": "ticket90",
    "random mask, 10 % kept": "random90",
    "small dense net": "small_dense",
    "dense, MoA": "moa_dense",
    "ticket, MoA, 30 % kept": "moa_ticket70",
    "ticket, MoA, 10 % kept": "moa_ticket90",
    "what pruning to 10 % gains MoA more than GELU": "moa_prunes",
    "token choice": "token_choice",
    "expert choice": "expert_choice",
    "sigmoid": "moa",
    "sigmoid, the paper's start": "paper_start",
    "no mix": "none",
    "gate, sigmoid": "gate_fixed",
    "gate, LA": "gate_la",
    "gate, MoA": "gate_moa",
    "norm, tanh": "norm_fixed",
    "norm, LA": "norm_la",
    "norm, MoA": "norm_moa",
}
TASKS = {
    "claims": {
        "0.6 M bytes": "budget-0.6M",
        "1.2 M bytes": "budget-1.2M",
        "2.4 M bytes": "budget-2.4M",
        "linear schedule": "schedule-linear",
        "WSD schedule": "schedule-wsd",
        "mixture of experts": "experts",
    },
    "experts_2m": {
        "AdamW and cosine": "adamw-cosine",
        "AdamW and WSD": "adamw-wsd",
        "Muon and cosine": "muon",
    },
    "joint": {"MAE": "vision"},
    "transfer": {"MAE": "vision"},
    "little_data": {
        "10 of each class": "classification-10each",
        "50 of each class": "classification-50each",
        "100 of each class": "classification-100each",
        "long tail": "classification-tail",
        "MAE of 50 of each class": "mae-50each",
        "MAE of a long tail": "mae-tail",
    },
    "little_data_plain": {
        "10 of each class": "classification-10each",
        "50 of each class": "classification-50each",
        "long tail": "classification-tail",
    },
    "tickets": {
        "50 of each class": "each50",
        "100 of each class": "each100",
        "the same on noisy images": "each100/noise",
        "the same on shifted images": "each100/shift",
        "the same by a probe on clothes": "each100/clothes",
        "long tail": "tail",
        "50 of each class without crops": "plain",
        "50 of each class on a MAE": "pretrained",
    },
    "tickets_long": {"50 of each class": "each50"},
    "finetune_experts": {
        "kind of ending at capacity 0.5": "kind-half",
        "kind of ending at capacity 1": "kind-one",
        "kind of ending at capacity 2": "kind-two",
        "next piece": "next",
        "indentation": "indent",
    },
    "scaling": {size: f"language-{size}" for size in ("24x2", "40x3", "56x4", "80x4")},
}
TUNED = ("at rate", "gates' factor")  # columns of a value that tuning has chosen

LINK = re.compile(r"\]\(results/(\w+)\.csv\)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
INTERVAL = re.compile(r"([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]")


class Study(NamedTuple):
    """What the published runs of a grid come to."""

    grid: Grid
    finals: Mapping[tuple[str, str], Mapping[int, float]]
    """place, variant -> seed -> metric, where a place is a task or TASK/TEST"""
    tuned: Mapping[tuple[str, str], str]
    """task, variant -> the setting that was best on the validation split"""
    judged: Mapping[tuple[str, str], Judged]
    """place, variant or interaction -> what is said of it"""

    def against(self, name: str) -> str | None:
        """The variant that another one is compared with; None: an interaction is compared with nothing."""
        return next((self.grid.against(each) for each in self.grid.variants if each.name == name), None)


def place(task: str, outcome: Outcome) -> str:
    return f"{task}/{outcome.test}" if outcome.test else task


@cache
def study(name: str) -> Study:
    grid = load_grid(ROOT / f"configs/grids/{name}.yaml", resolve_config)
    tasks = {task.name: task for task in grid.tasks}
    places = {
        (task.name, outcome.column): place(task.name, outcome) for task in grid.tasks for outcome in task.outcomes
    }
    finals: dict[tuple[str, str], dict[int, float]] = {}
    tried: dict[tuple[str, str], dict[str, list[float]]] = {}
    with (ROOT / f"docs/results/{name}.csv").open() as file:
        for row in csv.DictReader(file):
            value = float(row["value"] or "nan")
            if row["setting"]:
                tried.setdefault((row["task"], row["variant"]), {}).setdefault(row["setting"], []).append(value)
            else:
                key = places[row["task"], row["metric"]], row["variant"]
                assert int(row["seed"]) not in finals.setdefault(key, {}), f"twice: {row}"
                finals[key][int(row["seed"])] = value
    assert set(finals) == {
        (place(task.name, outcome), variant.name)
        for task in grid.tasks
        for outcome in task.outcomes
        for variant in grid.variants_of(task)
    }
    pairs, modes = {}, {}
    for claim, weights in grid.family().items():
        where = place(claim.task, claim.outcome)
        sides = [(weight, finals[where, variant]) for variant, weight in weights.items()]
        pairs[where, claim.name] = compare_weighted(sides, claim.outcome.mode)
        modes[where, claim.name] = claim.outcome.mode
    tuned = {}
    for (task, variant), means in tried.items():
        best = min if tasks[task].mode == "min" else max
        tuned[task, variant] = best(means, key=lambda setting: fmean(means[setting]))
    return Study(grid, finals, tuned, judge_family(pairs, modes))


class Cells(NamedTuple):
    """A table: the name of its runs, headings, rows."""

    csv: str
    headings: list[str]
    rows: list[list[str]]


def tables(page: str) -> Iterator[Cells]:
    """Those with verdicts, in sections that name published runs."""
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        links = set(LINK.findall(section))
        for lines in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
            head, _, *rows = (
                [cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines.splitlines()
            )
            if "verdict" in head:
                assert len(links) == 1, f"the section '{section.splitlines()[0]}' must link to the runs of its table"
                yield Cells(*links, head, rows)


def wrong_figures(page: str) -> list[str]:
    """What the page prints and the runs do not come to."""
    found: list[str] = []
    for table in tables(page):
        for place, name, printed, value in figures(table):
            if not agrees(printed, value):
                found.append(f"{table.csv}, {place}, {name}: {printed}, and the runs come to {value}")
    return found


Figure = tuple[str, str, str, float | str]  # row, column, what is printed, what it should be


def figures(table: Cells) -> Iterator[Figure]:
    for row in table.rows:
        yield from variant_figures(table, row) if "against" in table.headings else task_figures(table, row)


def variant_figures(table: Cells, row: list[str]) -> Iterator[Figure]:
    """Of a row that is a variant: name | mean ± sd | what was tuned | against | difference | p | verdict."""
    found, cells = study(table.csv), dict(zip(table.headings, row, strict=True))
    task, variant = task_name(table.csv, table.headings[0]), variant_name(row[0])
    against = found.against(variant)
    if against is not None:
        yield from spread(row[0], cells["mean ± sd"], found.finals[task, variant])
        for name in (name for name in TUNED if name in cells):
            yield row[0], name, cells[name], float(found.tuned[task, variant].partition("=")[2])
        yield row[0], "against", variant_name(cells["against"]) if cells["against"] else variant, against
    if against != variant:
        difference = next(text for heading, text in cells.items() if heading.startswith("difference"))
        yield from comparison(row[0], found.judged[task, variant], difference, cells["p"], cells["verdict"])


def task_figures(table: Cells, row: list[str]) -> Iterator[Figure]:
    """Of a row that is a task: name | BASELINE | then for each variant VARIANT − BASELINE | p | verdict."""
    found, task = study(table.csv), task_name(table.csv, row[0])
    compared = [column for column, heading in enumerate(table.headings) if " − " in heading]
    assert len(row) == len(table.headings) == 2 + 3 * len(compared), table.headings
    yield from spread(row[0], row[1], found.finals[task, variant_name(table.headings[1])])
    for column in compared:
        variant, baseline = map(variant_name, table.headings[column].split(" − "))
        yield row[0], table.headings[column], baseline, found.against(variant)
        yield from comparison(row[0], found.judged[task, variant], *row[column : column + 3])


def spread(place: str, printed: str, values: Mapping[int, float]) -> Iterator[Figure]:
    mean, sd = printed.split(" ± ")
    yield place, "mean", mean, fmean(values.values())
    yield place, "sd", sd, stdev(values.values())


def comparison(place: str, judged: Judged, difference: str, p: str, verdict: str) -> Iterator[Figure]:
    parts = INTERVAL.fullmatch(difference.replace("−", "-"))
    assert parts is not None, f"{place}: '{difference}' is no difference with its interval"
    for name, printed in zip(("mean", "low", "high"), parts.groups(), strict=True):
        yield place, f"difference, {name}", printed, getattr(judged.paired, name)
    yield place, "p", str(float(p)), str(float(f"{judged.p_adjusted:.2g}"))  # two digits, as the command prints it
    yield place, "verdict", verdict, judged.verdict


def agrees(printed: str, value: float | str) -> bool:
    """Whether a text, or a number to the printed decimals, is this."""
    if isinstance(value, str):
        return printed == value
    if NUMBER.fullmatch(printed) is None:
        return False
    decimals = len(printed.partition(".")[2])
    return math.isclose(float(printed), round(value, decimals), rel_tol=1e-9, abs_tol=1e-9)


def variant_name(shown: str) -> str:
    return VARIANTS.get(shown, shown.lower())


def task_name(name: str, shown: str) -> str:
    label = shown.partition(",")[0]
    return TASKS.get(name, {}).get(label, label.lower())


def test_the_tables_say_what_the_published_runs_come_to() -> None:
    assert wrong_figures(PAGE.read_text()) == []


def test_every_comparison_of_the_published_runs_is_on_the_page() -> None:
    shown: dict[str, int] = {}
    for table in tables(PAGE.read_text()):
        verdicts = sum(name == "verdict" for _, name, _, _ in figures(table))
        shown[table.csv] = shown.get(table.csv, 0) + verdicts
    assert {
        "cross_domain",
        "mixing_rates",
        "claims",
        "scaling",
        "controls",
        "controls_mae",
        "joint",
        "experts_2m",
        "transfer",
        "little_data",
        "little_data_plain",
        "tickets",
        "tickets_long",
        "finetune_experts",
        "places",
    } <= shown.keys()
    assert shown == {name: len(study(name).judged) for name in shown}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("1.583 ± 0.017 | 0.008", "1.584 ± 0.017 | 0.008"),
        ("0.3215 ± 0.0041 | 0.004", "0.3215 ± 0.0042 | 0.004"),
        ("1.547 ± 0.025 | 0.016", "1.547 ± 0.025 | 0.008"),
        ("| −0.014 [−0.037, +0.008] |", "| +0.014 [−0.037, +0.008] |"),
        ("| −0.045 [−0.070, −0.020] |", "| −0.045 [−0.071, −0.020] |"),
        ("0.69 | no difference shown | −0.006 [−0.021, +0.009]", "0.69 | better | −0.006 [−0.021, +0.009]"),
        ("| 4.5e-06 |", "| 4.6e-06 |"),
        ("| 6.5e-05 |", "| 0.0001 |"),
        ("+0.017 [+0.010, +0.024] | 0.0008", "+0.017 [+0.010, +0.024] | 0.0009"),
        ("0.008, 10, 0.1 | LA | +0.017", "0.008, 10, 0.1 | GELU | +0.017"),
    ],
)
def test_a_wrong_figure_is_found(right: str, wrong: str) -> None:
    page = PAGE.read_text()
    assert page.count(right) == 1
    assert len(wrong_figures(page.replace(right, wrong))) == 1


def test_publishing_keeps_the_deciding_metric_of_each_run() -> None:
    with (ROOT / "docs/results/gates.csv").open() as file:
        rows = list(csv.DictReader(file))
    other = {"state": "finished", "val/loss": "9", "test/loss": "9", "samples": "9", "folder": "runs/gates"}
    assert published(study("gates").grid, [{**other, **row, row["metric"]: row["value"]} for row in rows]) == rows
    with pytest.raises(SystemExit, match="runs/gates has not finished"):
        published(study("gates").grid, [{**other, **rows[0], "state": "to run"}])
