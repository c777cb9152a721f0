"""A small grid on disk: two tasks, three variants, fake runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def make_grid(tmp_path: Path) -> Callable[..., Path]:
    """Write a grid of fake runs into tmp_path; keywords replace its entries."""

    def make(**entries: Any) -> Path:
        for name, quality in (("gelu", 0.0), ("la", 0.1), ("moa", 0.2)):
            (tmp_path / f"{name}.yaml").write_text(f"quality: {quality}\n")
        (tmp_path / "task.yaml").write_text("{}\n")
        task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
        grid = {
            "name": "small",
            "out": str(tmp_path / "out"),
            "seeds": [0, 1, 2],
            "baseline": "gelu",
            "tasks": {"language": task, "mae": dict(task)},
            "variants": {name: {"config": [str(tmp_path / f"{name}.yaml")]} for name in ("gelu", "la", "moa")},
            "overrides": {"steps": 6, "step_seconds": 0.01, "journal": str(tmp_path / "journal.txt")},
            "jobs": 2,
        }
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(grid | entries, sort_keys=False))
        return path

    return make
