"""The table: figures by hand, rounding by uncertainty, gaps where runs are missing."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Interaction, Run, Seeds
from moa_lightning.experiments.runner import make_schedule
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.state import Result, State
from moa_lightning.experiments.statistics import Paired
from moa_lightning.experiments.table import Row, headings, interval, make_rows, print_table, write_tables

TASK = GridTask("language", (), "val/loss", "min")


def grid(out: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Schedule:
    variants = (GridVariant("moa", ()), GridVariant("gelu", ()))
    small = Grid("small", out, Seeds(seeds, len(seeds)), "gelu", (TASK,), variants, {}, 1)
    return make_schedule(small)


def results(small: Schedule, losses: dict[str, list[float]]) -> dict[Run, Result]:
    """Finished runs with these losses for the first seeds; 3 s a run and 1 s more with each seed."""
    return {
        run: Result({"val/loss": losses[run.variant][run.seed]}, 1_234_567, 10, 80, None, 3.0 + run.seed)
        for run in small.runs()
        if run.seed < len(losses[run.variant])
    }


def cells(row: Row) -> tuple[str, ...]:
    """Mean, difference, verdict, seeds as printed."""
    return tuple(row.cells()[heading] for heading in ("mean ± sd", "difference", "verdict", "seeds"))


def test_rows_by_hand(tmp_path: Path) -> None:
    small = grid(tmp_path)
    baseline, moa = make_rows(small, results(small, {"gelu": [1.21, 1.23, 1.25], "moa": [1.20, 1.21, 1.22]}))
    assert baseline.variant == "gelu", "the baseline stands first"
    assert (baseline.mean, baseline.sd) == pytest.approx((1.23, 0.02))
    assert [baseline.cells()[heading] for heading in headings(small.grid)] == [
        *("language", "gelu", "val/loss ↓", "1.230 ± 0.020", "1,234,567", "4", "", "", "baseline", "", "", "3")
    ]
    # differences -0.01, -0.02, -0.03: t(0.975, 2) = 4.302653, standard error 0.01 / sqrt(3), half width 0.02484
    assert cells(moa) == ("1.210 ± 0.010", "-0.020 [-0.045, +0.005]", "no difference shown", "3")


def test_rounding_follows_the_spread(tmp_path: Path) -> None:
    small = grid(tmp_path)
    baseline, moa = make_rows(
        small, results(small, {"gelu": [100.0, 130.0, 160.0], "moa": [1.00002, 1.00004, 1.00006]})
    )
    assert cells(baseline)[0] == "130 ± 30"
    assert cells(moa)[0] == "1.000040 ± 0.000020"


def test_what_rounds_to_zero_has_no_minus() -> None:
    paired = Paired(n=4, mean=-0.0004, sd=1.0, low=-1.5, high=1.5, t=0.0, p=1.0, verdict="")
    assert interval(paired) == "+0.0 [-1.5, +1.5]"


def test_missing_and_diverged_runs(tmp_path: Path) -> None:
    small = grid(tmp_path)
    _, none = make_rows(small, results(small, {"gelu": [1.0, 1.1, 1.2], "moa": []}))
    assert cells(none) == ("-", "", "not decided: 0 of 3 pairs", "0 of 3")
    _, one = make_rows(small, results(small, {"gelu": [1.0, 1.1, 1.2], "moa": [0.9]}))
    assert cells(one) == ("0.9", "-0.1", "not decided: 1 of 3 pairs", "1 of 3")
    _, two = make_rows(small, results(small, {"gelu": [1.0, 1.1, 1.2], "moa": [0.9, 1.001]}))
    assert two.difference is not None
    assert two.difference.paired.p < 0.05, "two seeds of three would make a claim"
    assert cells(two)[2:] == ("not decided: 2 of 3 pairs", "2 of 3")
    assert cells(two)[1].startswith("-0.0995 [")
    _, lost = make_rows(small, results(small, {"gelu": [1.0, 1.1, 1.2], "moa": [0.9, math.nan, 1.0]}))
    assert cells(lost) == ("nan", "", "not finite on 1 of 3 seeds", "3")


def test_an_unfinished_comparison_eases_no_other(tmp_path: Path) -> None:
    """Of two tasks the second has two of three pairs, with a tiny p value: the first is corrected for both all the
    same."""
    small = grid(tmp_path)
    two = make_schedule(replace(small.grid, tasks=(TASK, replace(TASK, name="vision"))))
    losses = {"gelu": (1.21, 1.23, 1.25), "moa": (1.20, 1.2199, 1.2401)}

    def judged(seeds: int) -> Row:
        found = {
            run: Result({"val/loss": losses[run.variant][run.seed]}, 1, 10, 80, None, 3.0)
            for run in two.runs()
            if run.task == "language" or run.seed < seeds
        }
        return next(row for row in make_rows(two, found) if (row.task.name, row.variant) == ("language", "moa"))

    alone, beside = judged(0).difference, judged(2).difference
    assert alone is not None
    assert beside is not None
    assert alone.p_adjusted == beside.p_adjusted == pytest.approx(2 * alone.paired.p)


def test_a_task_that_is_not_judged_has_means_and_no_claims(tmp_path: Path) -> None:
    small = grid(tmp_path)
    material = replace(TASK, name="material", judged=False)
    two = make_schedule(replace(small.grid, tasks=(TASK, material)))
    rows = make_rows(two, results(two, {"gelu": [1.21, 1.23, 1.25], "moa": [1.20, 1.21, 1.22]}))
    assert [row.verdict for row in rows] == ["baseline", "no difference shown", "not judged", "not judged"]
    assert cells(rows[3]) == ("1.210 ± 0.010", "", "not judged", "3")
    assert rows[1].difference is not None
    assert rows[1].difference.family == 1
    assert rows[1].difference.p_adjusted == rows[1].difference.paired.p, "nothing else is in the family"
    alone = make_schedule(replace(small.grid, tasks=(material,)))
    rows = make_rows(alone, results(alone, {"gelu": [1.21, 1.23, 1.25], "moa": [1.20, 1.21, 1.22]}))
    assert [row.verdict for row in rows] == ["not judged", "not judged"]


def test_only_the_variants_of_a_task_have_rows_and_claims(tmp_path: Path) -> None:
    small = grid(tmp_path)
    few = make_schedule(replace(small.grid, tasks=(TASK, replace(TASK, name="few", variants=("gelu",)))))
    rows = make_rows(few, results(few, {"gelu": [1.21, 1.23, 1.25], "moa": [1.20, 1.21, 1.22]}))
    assert [(row.task.name, row.variant) for row in rows] == [
        *(("language", "gelu"), ("language", "moa")),
        ("few", "gelu"),
    ]
    assert {row.difference.family for row in rows if row.difference is not None} == {1}


@pytest.mark.parametrize(("mode", "word"), [("min", "worse"), ("max", "better")])
def test_an_interaction_by_hand(tmp_path: Path, mode: str, word: str) -> None:
    """(moa_ticket - moa) - (gelu_ticket - gelu) is 0.2, 0.21 and 0.22 on the seeds: as a one-sample t-test."""
    names = ("gelu", "gelu_ticket", "moa", "moa_ticket")
    losses = {"gelu": [1.0, 1.3, 1.1], "gelu_ticket": [1.1, 1.5, 1.15], "moa": [0.9, 1.2, 1.05]}
    ticket = [moa + (small - dense) + more for moa, small, dense, more in zip(
        losses["moa"], losses["gelu_ticket"], losses["gelu"], (0.2, 0.21, 0.22), strict=True)]  # fmt: skip
    interaction = Interaction("prunes", ("moa_ticket", "moa"), ("gelu_ticket", "gelu"))
    small = grid(tmp_path)
    crossed = make_schedule(
        replace(
            small.grid,
            tasks=(replace(TASK, mode=mode),),
            variants=tuple(GridVariant(name, ()) for name in names),
            interactions=(interaction,),
        )
    )
    found = results(crossed, {**losses, "moa_ticket": ticket})
    rows = make_rows(crossed, found)
    assert [row.variant for row in rows] == [*names, "prunes"], "after the variants"
    assert cells(rows[-1]) == ("", "+0.210 [+0.185, +0.235]", word, "3")
    assert rows[-1].difference is not None
    assert rows[-1].difference.family == 4
    expected = ttest_1samp([0.2, 0.21, 0.22], 0.0).pvalue
    assert rows[-1].difference.paired.p == pytest.approx(expected)
    assert rows[-1].difference.p_adjusted == pytest.approx(4 * expected), "the smallest of four"
    unfinished = make_rows(crossed, {run: result for run, result in found.items() if run.name.count("gelu/seed2") == 0})
    assert cells(unfinished[-1])[2:] == ("not decided: 2 of 3 pairs", "2 of 3")
    write_tables(crossed.grid, rows, dict.fromkeys(found, State.FINISHED), found)
    record = list(csv.DictReader((tmp_path / "table.csv").open()))[-1]
    assert record["against"] == "(moa_ticket - moa) - (gelu_ticket - gelu)"
    assert (record["variant"], record["verdict"]) == ("prunes", word)
    assert float(record["difference_mean"]) == pytest.approx(0.21)
    assert "prunes: (moa_ticket - moa) - (gelu_ticket - gelu), within a seed." in (tmp_path / "table.md").read_text()


def test_files_keep_every_digit_and_list_every_run(tmp_path: Path) -> None:
    small = grid(tmp_path, seeds=(0, 1))
    found = results(small, {"gelu": [1 / 3, 2 / 3], "moa": [1 / 7]})
    states = {run: State.FINISHED if run in found else State.RESUME for run in small.runs()}
    write_tables(small.grid, make_rows(small, found), states, found)
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert float(table[1]["difference_mean"]) == 1 / 7 - 1 / 3
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(run["variant"], run["seed"], run["state"]) for run in runs] == [
        ("moa", "0", "finished"),
        ("gelu", "0", "finished"),
        ("moa", "1", "to continue"),
        ("gelu", "1", "finished"),
    ]
    assert float(runs[1]["val/loss"]) == 1 / 3
    markdown = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown if line.startswith("|")}) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_figures_whole(tmp_path: Path, width: int) -> None:
    small = grid(tmp_path)
    console = Console(width=width, record=True, file=(tmp_path / "terminal").open("w"))
    rows = make_rows(small, results(small, {"gelu": [1.21, 1.23, 1.25], "moa": [1.20, 1.21, 1.22]}))
    print_table(small.grid, rows, console)
    text = console.export_text()
    assert "…" not in text
    for figure in ("1.210 ± 0.010", "1,234,567", "[-0.045,", "+0.005]"):
        assert figure in text
