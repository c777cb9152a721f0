"""Density of layers: a column a variant, the mean over its runs, layers that one has not left empty."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moa_lightning.reports.content import Picture, Table
from moa_lightning.reports.densities import densities


def run(folder: Path, density: dict[str, float]) -> Path:
    folder.mkdir(parents=True)
    named = {f"net.{layer}.weight": value for layer, value in density.items()}
    (folder / "pruning.json").write_text(json.dumps({"density": named}))
    return folder


def test_a_column_a_variant_and_the_mean_over_its_runs(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    folders = {
        "dense": [tmp_path / "dense"],
        "ticket": [run(tmp_path / "a", {"up": 0.2, "down": 0.5}), run(tmp_path / "b", {"up": 0.4, "down": 0.3})],
        "gated": [run(tmp_path / "c", {"up": 0.125, "gate": 0.25})],
    }
    _, plot, table = densities(folders, "task-densities")
    assert isinstance(table, Table)
    assert table.headings == ("layer", "ticket", "gated")
    assert table.rows == [["up", "0.300", "0.125"], ["down", "0.400", ""], ["gate", "", "0.250"]]
    assert isinstance(plot, Picture)
    assert plot.name == "task-densities"
    assert ElementTree.fromstring(plot.content).tag.endswith("svg")


def test_runs_that_are_not_pruned_say_nothing(tmp_path: Path) -> None:
    assert densities({"dense": [tmp_path]}, "densities") == []
