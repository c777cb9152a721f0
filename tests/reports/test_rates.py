"""What a report says of a tuned option: losses at multiples of the best value, basins, and why there is no plot."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Run, Seeds, Tuning
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.state import Result
from moa_lightning.reports.content import Block, Picture, Table, Text
from moa_lightning.reports.rates import tuned_values
from tests.experiments.conftest import Ablate

VARIANTS = (GridVariant("gelu", ()), GridVariant("moa", ()))
OPTIMA = {"gelu": 0.004, "moa": 0.005}


def loss(variant: str, rate: float, seed: int) -> float:
    """A parabola over the logarithm of the rate; seed 101 is worse at high rates, for gelu more than for moa."""
    slope = {"gelu": 0.05, "moa": 0.02}[variant] * (seed - 100)
    return 1.0 + 0.1 * math.log(rate / OPTIMA[variant]) ** 2 + slope * (rate > 0.004)


def blocks_of(
    tune: dict[str, tuple[str, ...]], value: Callable[[str, float, int], float] = loss, seeds: tuple[int, ...] = (100,)
) -> list[Block]:
    """Of a grid whose tuning runs have all finished."""
    task = GridTask("text", (), "val/loss", "min", effect=0.01, tune=tune)
    grid = Grid("g", Path("out"), Seeds((0,), 1), "gelu", (task,), VARIANTS, {}, 1, tuning=Tuning(seeds, {}))

    def refuse(*_: Any) -> Any:
        raise AssertionError("no size is needed")

    schedule = Schedule(grid, refuse, lambda run: None)
    results: dict[Run, Result] = {}
    for run in schedule.tuning_runs():
        rate = next((v for option, v in run.options if option == "model.optimizer.lr"), "1")
        number = float(rate) if rate != "auto" else 1.0
        results[run] = Result({"val/loss": value(run.variant, number, run.seed)}, 1, 1, 1, 1, 1.0)
    return tuned_values(schedule, task, results)


def table(blocks: list[Block], heading: str) -> Table:
    return next(block for block in blocks if isinstance(block, Table) and heading in block.headings)


RATES = ("0.001", "0.002", "0.004", "0.008", "0.016")


def test_losses_at_multiples_of_the_best_rate_are_compared_by_seed() -> None:
    blocks = blocks_of({"model.optimizer.lr": RATES}, seeds=(100, 101))
    lost = table(blocks, "best lr")
    assert list(lost.headings) == ["variant", "best lr", "val/loss", "× 1/4", "× 1/2", "× 2", "× 4"]
    gelu, moa = lost.rows
    assert gelu[:2] == ["gelu", "0.004"]
    mean = 0.1 * math.log(2) ** 2 + 0.025  # of 0 and 0.05 on top
    assert float(gelu[5]) == pytest.approx(mean, rel=0.05)
    assert moa[:2] == ["moa", "0.004"]
    differences = table(blocks, "baseline").rows
    assert [row[:2] for row in differences] == [["moa", "gelu"]]
    lost_2x = [[loss(name, 0.008, s) - loss(name, 0.004, s) for s in (100, 101)] for name in ("moa", "gelu")]
    difference = sum(lost_2x[0]) / 2 - sum(lost_2x[1]) / 2
    cell, _, rest = differences[0][4].partition(" ")
    assert float(cell) == pytest.approx(difference, abs=0.006)
    low, high = map(float, rest.strip("[]").split(", "))
    assert low < difference < high
    assert "mean over 2 tuning seeds" in lost.note


def test_one_seed_has_no_interval_and_empty_columns_are_left_out() -> None:
    blocks = blocks_of({"model.optimizer.lr": ("0.002", "0.004", "0.008")})
    lost = table(blocks, "best lr")
    assert list(lost.headings[3:]) == ["× 1/2", "× 2"]
    assert "one tuning seed, so no interval" in lost.note
    assert not any("baseline" in block.headings for block in blocks if isinstance(block, Table))
    basin = table(blocks, "basin")
    low, high = (float(end) for end in basin.rows[1][2].split(" to "))
    assert low < float(basin.rows[1][1]) < high, "the optimum lies in its basin"
    assert float(basin.rows[1][5]) == pytest.approx(1.25, rel=0.01), "largest rates, 0.005 to 0.004"
    assert "less than 0.01 worse" in basin.note, "the task's effect"


def test_a_rate_at_which_a_seed_diverged_is_counted() -> None:
    def diverging(variant: str, rate: float, seed: int) -> float:
        return math.nan if variant == "gelu" and (rate > 0.005 and seed == 101) else loss(variant, rate, 100)

    blocks = blocks_of({"model.optimizer.lr": RATES}, diverging, (100, 101))
    gelu = table(blocks, "best lr").rows[0]
    assert gelu[-2:] == ["1 of 2 diverged"] * 2
    assert table(blocks, "baseline").rows[0][4] == "not finite on 1 of 2 seeds"
    never = blocks_of({"model.optimizer.lr": RATES}, lambda *given: math.nan if given[0] == "moa" else loss(*given))
    assert table(never, "best lr").rows[1][1:3] == ["", "all diverged"]


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        (
            {"model.optimizer.lr": ("0.004", "0.008")},
            "has no plot of val/loss against lr: only 0.004 and 0.008 were tried.",
        ),
        ({"model.optimizer.lr": ("0.004",)}, "only 0.004 was tried."),
        (
            {"model.optimizer.lr": RATES, "model.optimizer.weight_decay": ("0.0", "0.1")},
            "has no plot of val/loss against lr and weight_decay: they were tuned together.",
        ),
        ({"model.optimizer.lr": ("auto", "0.004", "0.008")}, "its values are not numbers."),
    ],
)
def test_a_plot_that_is_left_out_is_explained(tune: dict[str, tuple[str, ...]], words: str) -> None:
    blocks = blocks_of(tune)
    assert not any(isinstance(block, Picture) for block in blocks)
    assert any(isinstance(block, Text) and words in block.text for block in blocks)


def test_two_values_still_say_what_the_other_one_loses() -> None:
    blocks = blocks_of({"model.optimizer.lr": ("0.004", "0.008")})
    assert list(table(blocks, "best lr").headings[3:]) == ["× 2"]
    assert float(table(blocks, "best lr").rows[0][3]) == pytest.approx(0.1 * math.log(2) ** 2, rel=0.05)


def test_a_grid_under_way_says_what_it_waits_for(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_grid(
        tasks={"t": {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}},
        tune={"seeds": [100, 101], "options": {"rate": [0.005, 0.01, 0.02]}},
    )
    assert ablate(path).status == 0
    report = (tmp_path / "out/report.md").read_text()
    assert "| variant | baseline | × 1/2 | × 2 |" in report
    for result in tmp_path.glob("out/t/*/tune/rate=0.02/seed101/result.json"):
        result.unlink()
    from moa_lightning.reports.command import make_report

    (section,) = [each for each in make_report(tmp_path / "out")[0].sections if each.title == "t"]
    texts = [block.text for block in section.blocks if isinstance(block, Text)]
    assert "t has no plot of val/loss against rate: the tuning runs of no variant have all finished." in texts
