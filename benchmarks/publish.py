"""The runs of a finished grid as one small file, such as docs/results/claims.csv.

    python benchmarks/publish.py configs/grids/claims.yaml docs/results/claims.csv

From the `runs.csv` that `moa ablate` wrote into the grid's folder: of tuning runs the metric on the validation split,
of final ones the metric that decides and, in rows of their own, those of the task's tests, as TEST/METRIC; empty where
training diverged.
"""

import argparse
import csv
from pathlib import Path

from moa_lightning.configs import resolve_config
from moa_lightning.experiments.grid import Grid
from moa_lightning.experiments.grid_file import load_grid

KEPT = ("task", "variant", "setting", "seed")
COSTS = ("parameters", "steps", "seconds")
COLUMNS = (*KEPT, "metric", "value", *COSTS)


def published(grid: Grid, runs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a grid's runs.csv as they are published; all runs must have finished."""
    tasks = {task.name: task for task in grid.tasks}
    rows = []
    for run in runs:
        if run["state"] != "finished":
            raise SystemExit(f"{run['folder']} has not finished: let moa ablate come to its end first")
        task = tasks[run["task"]]
        for metric in [task.metric] if run["setting"] else [outcome.column for outcome in task.outcomes]:
            row = {**{name: run[name] for name in KEPT}, "metric": metric}
            row["value"] = "" if run[metric] == "nan" else run[metric]
            rows.append(row | {name: run[name] for name in COSTS})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="the grid file")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--folder", type=Path, help="folder of the runs, instead of the grid's `out`")
    options = parser.parse_args()
    grid = load_grid(resolve_config(options.grid), resolve_config)
    with ((options.folder or grid.out) / "runs.csv").open(encoding="utf-8") as file:
        rows = published(grid, list(csv.DictReader(file)))
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
