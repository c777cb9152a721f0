"""The cost of variants: parameters, FLOPs and seconds, and ratios to the baseline's."""

import math
from pathlib import Path

import pytest

from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Run, Seeds
from moa_lightning.experiments.state import Result, read_result
from moa_lightning.reports.content import Table
from moa_lightning.reports.costs import costs

TASK = GridTask("text", (), "val/loss", "min")
VARIANTS = (GridVariant("gelu", ()), GridVariant("moa", ()))
GRID = Grid("g", Path("out"), Seeds((0, 1, 2), 3), "gelu", (TASK,), VARIANTS, {}, 2)
DIVERGED = Result({"val/loss": math.nan}, None, None, None, None, math.nan)


def finished(seconds: dict[str, tuple[float, ...]], flops: float | None = 1e12) -> dict[Run, Result]:
    """By variant the seconds of seeds 0, 1, ...; moa takes 2 % more FLOPs."""
    return {
        GRID.run(TASK, variant, seed, {}): Result(
            {"val/loss": 1.0}, 1000, 10, 10, None, value, flops and flops * (1.02 if variant.name == "moa" else 1)
        )
        for variant in GRID.variants
        for seed, value in enumerate(seconds[variant.name])
    }


def test_seconds_are_compared_by_seed() -> None:
    """Log ratios log 1.1, log 1.2, log 1.3: t interval with 4.302653 standard errors."""
    table, totals = costs(GRID, finished({"gelu": (10.0, 20.0, 30.0), "moa": (11.0, 24.0, 39.0)}))
    assert isinstance(table, Table)
    assert isinstance(totals, Table)
    gelu, moa = table.rows
    assert gelu == ["text", "gelu", "1,000", "1e+12", "", "20", "", "3"]
    assert moa[2:6] == ["1,000", "1.02e+12", "1.020", "24.7"]
    logs = [math.log(ratio) for ratio in (1.1, 1.2, 1.3)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    ratio, _, interval = moa[6].partition(" ")
    low, high = map(float, interval.strip("[]").split(", "))
    assert float(ratio) == pytest.approx(math.exp(mean), rel=0.01)
    assert (low, high) == (
        pytest.approx(math.exp(mean - half), abs=0.006),
        pytest.approx(math.exp(mean + half), abs=0.006),
    )
    assert "2 runs side by side" in table.note
    assert totals.rows == [["text", "final", "6", "0", "6.06e+12", "2:14"]]


def test_diverged_runs_and_runs_without_a_count_of_flops_are_told_apart() -> None:
    results = finished({"gelu": (10.0, 20.0, 30.0), "moa": (11.0, 24.0, 39.0)}, flops=None)
    results[next(run for run in results if (run.variant, run.seed) == ("moa", 2))] = DIVERGED
    table, totals = costs(GRID, results)
    assert isinstance(table, Table)
    assert isinstance(totals, Table)
    assert [row[3:5] for row in table.rows] == [["", ""], ["", ""]]
    assert [row[-1] for row in table.rows] == ["3", "2"]
    assert totals.rows[0][3:5] == ["1", ""]
    assert len(costs(GRID, dict.fromkeys(results, DIVERGED))) == 1
    assert len(costs(GRID, {})) == 1


def test_a_result_has_its_flops(tmp_path: Path) -> None:
    grid = Grid("g", tmp_path, GRID.seeds, "gelu", (TASK,), GRID.variants, {}, 1)
    run = grid.run(TASK, grid.variants[0], 0, {})
    run.folder.mkdir(parents=True)
    rest = '"metrics": {"val/loss": 1.0}, "parameters": 5, "steps": 1, "samples": 8, "tokens": null, "seconds": 2.5'
    (run.folder / "result.json").write_text(f'{{{rest}, "flops": 3e9}}')
    assert read_result(run).flops == 3e9
    (run.folder / "result.json").write_text(f"{{{rest}}}")
    assert read_result(run).flops is None
