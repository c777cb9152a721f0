"""A small grid on disk: two tasks, three variants, fake runs; and `moa ablate` on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from moa_lightning.errors import UserError
from moa_lightning.experiments.command import ablate_command
from tests.experiments import fake_moa

Ablate = Callable[..., "Ended"]
PRELOAD = ("pytest", "tests.experiments.fake_moa")


class Ended(NamedTuple):
    status: int
    output: str


@pytest.fixture
def ablate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`moa ablate` in this process, its runs in others; a UserError counts as the exit status 2 that it becomes."""

    def run(*words: object) -> Ended:
        try:
            status = ablate_command([str(word) for word in words], Path, fake_moa.main, PRELOAD)
        except UserError as error:
            return Ended(2, str(error))
        return Ended(status, capsys.readouterr().out)

    return run


@pytest.fixture
def make_grid(tmp_path: Path) -> Callable[..., Path]:
    """Write a grid of fake runs into tmp_path; keywords replace its entries."""

    def make(**entries: Any) -> Path:
        for name, quality in (("gelu", 0.0), ("la", 0.1), ("moa", 0.2)):
            (tmp_path / f"{name}.yaml").write_text(f"quality: {quality}\n")
        (tmp_path / "task.yaml").write_text("{}\n")
        (tmp_path / "other.yaml").write_text("{}\n")
        task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
        grid = {
            "name": "small",
            "out": str(tmp_path / "out"),
            "seeds": [0, 1, 2],
            "baseline": "gelu",
            "tasks": {"language": task, "mae": {**task, "config": [*task["config"], str(tmp_path / "other.yaml")]}},
            "variants": {name: {"config": [str(tmp_path / f"{name}.yaml")]} for name in ("gelu", "la", "moa")},
            "overrides": {"steps": 6, "step_seconds": 0.01, "journal": str(tmp_path / "journal.txt")},
            "jobs": 2,
        }
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(grid | entries, sort_keys=False))
        return path

    return make
