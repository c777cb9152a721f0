"""The grids that come with the package: each run's command line fits the code."""

from pathlib import Path

import pytest

from moa_lightning.configs import resolve_config
from moa_lightning.experiments.grid import Run
from moa_lightning.experiments.grid_file import load_grid
from tests.cli.conftest import Moa

ROOT = Path(__file__).parents[2]
GRIDS = sorted(f"configs/grids/{path.name}" for path in (ROOT / "configs" / "grids").glob("*.yaml"))


def one_run_a_task(path: str) -> list[Run]:
    """The first run of each task, of whatever length."""
    grid = load_grid(ROOT / path, resolve_config)
    return [grid.run(task, grid.variants[0], 0, {}) for task in grid.tasks]


def test_there_is_a_quickstart() -> None:
    assert "configs/grids/quickstart.yaml" in GRIDS


@pytest.mark.parametrize("path", GRIDS)
def test_every_task_of_a_grid_parses(moa: Moa, path: str) -> None:
    for run in one_run_a_task(path):
        outcome = moa(" ".join([*run.arguments(), "--print_config"]))
        assert outcome.code == 0, outcome.err
        assert "class_path: tasks." in outcome.out


def test_options_may_spell_the_levels_that_a_config_has(moa: Moa) -> None:
    fragments = "fit -c configs/vision/dino_tiny.yaml -c configs/data/mnist5k.yaml"
    short = moa(f"{fragments} --data.transform.local_size 14 --model.backbone_args.depth 2 --print_config")
    long = moa(
        f"{fragments} --data.init_args.transform.init_args.local_size 14 --model.init_args.backbone_args.depth 2 "
        "--print_config"
    )
    assert (short.code, long.code) == (0, 0), long.err
    assert "local_size: 14" in long.out
    assert long.out == short.out
