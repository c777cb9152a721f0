"""Curves from metrics.csv, and that a picture of them is written."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Seeds
from moa_lightning.experiments.plots import draw_convergence, make_curve, read_points

HEADER = "step,samples,tokens,seconds,train/loss,val/loss\n"


def test_points_are_the_rows_where_the_metric_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + "1,8,,0.5,3.0,\n2,16,,1.0,2.5,2.4\n3,24,,1.5,2.0,\n4,32,,2.0,,1.9\n4,32,,2.1,,1.8\n")
    assert read_points(path, "val/loss") == {2: (1.0, 2.4), 4: (2.1, 1.8)}


def test_a_file_without_a_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/loss\n1,2.0\n")
    with pytest.raises(UserError, match="cannot read the curve of val/loss"):
        read_points(path, "val/loss")


def test_a_curve_joins_the_steps_that_all_seeds_have() -> None:
    curve = make_curve("la", [{1: (1.0, 5.0), 2: (2.0, 4.0), 3: (3.0, 3.0)}, {1: (1.2, 6.0), 3: (3.4, 2.0)}])
    assert (curve.steps, curve.seconds, curve.mean) == ([1, 3], [1.1, 3.2], [5.5, 2.5])
    assert (curve.low, curve.high, curve.seeds) == ([5.0, 2.0], [6.0, 3.0], 2)


@pytest.mark.parametrize("values", [["3", "2", "1"], ["1", "1", "1"], ["2", "nan", "inf"], ["2", "", ""], ["", "", ""]])
def test_a_picture_for_every_kind_of_curve(tmp_path: Path, values: list[str]) -> None:
    names = [f"v{number}" for number in range(10)]  # more than there are colours
    task = GridTask("language", (), "val/loss", "min")
    variants = tuple(GridVariant(name, ()) for name in names)
    grid = Grid("g", tmp_path, Seeds((0, 1), 2), "v0", (task,), variants, {}, 1)
    runs = [grid.run(task, variant, seed, {}) for seed in (0, 1) for variant in variants]
    for run in runs:
        run.folder.mkdir(parents=True)
        rows = [f"{step},8,,{step},,{value}\n" for step, value in enumerate(values, start=1)]
        (run.folder / "metrics.csv").write_text(HEADER + "".join(rows))
    (path,) = draw_convergence(grid, runs)
    picture = imread(path)
    assert picture.shape[1] == 2400
    assert picture.min() < 0.1, "nothing was drawn"
    assert picture[0, 0].min() == 1, "the background is white"
