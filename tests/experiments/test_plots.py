"""Pictures of curves and of tuned options are drawn for every kind of values."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.image import imread

from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Run, Seeds
from moa_lightning.experiments.plots import axes_figure, draw_convergence, rates_figure, read_traces, svg

HEADER = "step,samples,tokens,seconds,train/loss,val/loss\n"


@pytest.mark.parametrize("values", [["3", "2", "1"], ["1", "1", "1"], ["2", "nan", "inf"], ["2", "", ""]])
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
    traces = read_traces(task, runs)
    assert list(traces) == names
    assert all(list(seeds) == [0, 1] for seeds in traces.values())
    drawing = svg(axes_figure(task, traces, names))
    assert drawing == svg(axes_figure(task, traces, names)), "the same figure, the same bytes"
    labels = {"".join(text.itertext()) for text in ElementTree.fromstring(drawing).iter() if text.tag.endswith("text")}
    comments = drawing.decode()
    assert "seconds" in labels or "<!-- seconds -->" in comments
    assert "FLOPs" not in comments, "the runs have not counted them"


def test_single_points_have_no_common_time(tmp_path: Path) -> None:
    """One validation a run: curves against seconds cannot be joined over seeds, the others can."""
    task = GridTask("language", (), "val/loss", "min")
    grid = Grid("g", tmp_path, Seeds((0, 1), 2), "v", (task,), (GridVariant("v", ()),), {}, 1)
    runs = [grid.run(task, grid.variants[0], seed, {}) for seed in (0, 1)]
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.csv").write_text(f"{HEADER}5,40,,{1.5 + run.seed},,2\n")
    assert draw_convergence(grid, runs)
    drawing = svg(axes_figure(task, read_traces(task, runs), ["v"])).decode()
    assert "<!-- samples -->" in drawing
    assert "<!-- seconds -->" not in drawing


def test_a_dot_marks_a_final_value_only(tmp_path: Path) -> None:
    """Seeds end at different seconds: the line stops where the first one does, which is no end of the others."""
    task = GridTask("language", (), "val/loss", "min")
    grid = Grid("g", tmp_path, Seeds((0, 1), 2), "v", (task,), (GridVariant("v", ()),), {}, 1)
    runs = [grid.run(task, grid.variants[0], seed, {}) for seed in (0, 1)]
    for run in runs:
        run.folder.mkdir(parents=True)
        rows = [f"{step},8,,{step * (1 + run.seed)},,{3 - step}\n" for step in (1, 2)]
        (run.folder / "metrics.csv").write_text(HEADER + "".join(rows))

    def dots(seeds: list[Run]) -> dict[str, int]:
        panels = axes_figure(task, read_traces(task, seeds), ["v"]).axes
        return {
            axes.get_xlabel(): sum(line.get_marker() == "o" for line in axes.get_lines())
            for axes in panels
            if axes.get_visible()
        }

    assert dots(runs) == {"steps": 1, "samples": 1, "seconds": 0}
    assert dots(runs[:1])["seconds"] == 1


def test_rates_mark_diverged_runs() -> None:
    task = GridTask("language", (), "val/loss", "min")
    losses = {"gelu": {0.001: {0: 2.0, 1: 2.1}, 0.01: {0: 1.5, 1: float("nan")}, 0.1: {0: float("inf"), 1: 9.0}}}
    ElementTree.fromstring(svg(rates_figure(task, "lr", losses)))
