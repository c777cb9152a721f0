"""The grids that come with the package: each run's command line fits the code.

Every task with every variant, its budget's options and its tuned values are made as a grid makes them, and parsed and
built up to the first step. Runs that differ from another one in numbers alone are left out.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moa_lightning import lightning_cli
from moa_lightning.cli import main
from moa_lightning.configs import resolve_config
from moa_lightning.experiments.grid import GridTest, Run
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.sizes import Size
from moa_lightning.planning.settings import _ParsedFit
from tests.cli.conftest import Moa

ROOT = Path(__file__).parents[2]
GRIDS = sorted(f"configs/grids/{path.name}" for path in (ROOT / "configs" / "grids").glob("*.yaml"))

SIZE = Size(parameters=200_000, samples_per_step=32, tokens_per_sample=64, flops_per_sample=1e8)  # lengths follow

Mistake = Callable[[Run], str | None]


class BuiltFit(_ParsedFit):
    """A fit whose parts are made and which is not begun."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": lightning_cli.LightningCLI.subcommands()["fit"]}


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mistake:
    """What `moa` says of a run that cannot begin; None for one that can."""
    monkeypatch.setattr(lightning_cli, "MoaCLI", BuiltFit)
    monkeypatch.setattr(lightning_cli, "COMMANDS", ("fit",))  # half the time goes into the parsers of commands

    def found(run: Run) -> str | None:
        capfd.readouterr()
        code = main(run.arguments())
        return f"{run.name}: {capfd.readouterr().err}" if code else None

    return found


def runs_of(path: Path) -> Iterator[Run]:
    """On the first seed each task's final runs with each variant, and all tuning runs."""
    grid = load_grid(path, resolve_config)
    schedule = Schedule(grid, measure=lambda *_: SIZE, value=lambda run: 0.0)
    for task in grid.tasks:
        finals = [schedule.final_run(task, variant, grid.seeds.pilot[0]) for variant in grid.variants_of(task)]
        for run in finals:
            if run is not None:
                yield run
                yield from (with_options(run, test) for test in run.tests)
    seed = grid.tuning.seeds[0] if grid.tuning else None
    yield from (run for run in schedule.tuning_runs() if run.seed == seed)


def with_options(run: Run, test: GridTest) -> Run:
    """The run with the configs and options of one of its tests, as if it were trained with them."""
    options = dict(run.options) | dict(test.options)
    return replace(run, configs=run.configs + test.configs, options=tuple(options.items()))


def unlike_runs(paths: Sequence[Path]) -> dict[Path, list[Run]]:
    """The runs of each grid whose config files and options, or a value of an option, no run before them has."""
    seen: set[object] = set()
    found: dict[Path, list[Run]] = {path: [] for path in paths}
    for path in paths:
        for run in runs_of(path):
            facts = {(run.configs, frozenset(option for option, _ in run.options))}
            facts |= {(option, without_number(value)) for option, value in run.options}
            if not facts <= seen:
                found[path].append(run)
            seen |= facts
    return found


def without_number(value: str) -> str:
    """int and float for numbers, other values as they are."""
    try:
        number = json.loads(value)
    except ValueError:
        return value
    return type(number).__name__ if type(number) in (int, float) else value


@functools.cache
def shipped() -> dict[Path, list[Run]]:
    return unlike_runs([ROOT / path for path in GRIDS])


def test_there_is_a_quickstart() -> None:
    assert "configs/grids/quickstart.yaml" in GRIDS


@pytest.mark.parametrize("path", GRIDS)
def test_every_run_of_a_grid_can_begin(mistake: Mistake, path: str) -> None:
    assert [said for run in shipped()[ROOT / path] if (said := mistake(run))] == []


@pytest.mark.parametrize(
    ("grid", "right", "wrong"),
    [
        ("controls", "model.ffn.start_from: ", "model.ffn.start_form: "),  # of the last two variants
        ("tickets", "pruning.shuffle: ", "pruning.shufle: "),
        ("tickets", "pruning.sparsity: 0.9", "pruning.sparsity: 90%"),
        ("tickets", "data.corruption: shift", "data.corruptoin: shift"),  # of a test
        ("joint", "model.tie: [ffn]", "model.tie: [fnn]"),
        ("finetune_experts", "model.moe.router: ", "model.moe.routers: "),
        ("cross_domain", "{model.optimizer.lr: [0.0005,", "{model.optimizer.rl: [0.0005,"),  # tuned, of the last task
    ],
)
def test_a_mistake_anywhere_in_a_grid_is_seen(
    mistake: Mistake, tmp_path: Path, grid: str, right: str, wrong: str
) -> None:
    text = (ROOT / f"configs/grids/{grid}.yaml").read_text()
    assert right in text
    path = tmp_path / f"{grid}.yaml"
    path.write_text(text.replace(right, wrong))
    option = wrong.strip("{").partition(":")[0]
    runs = [run for run in unlike_runs([path])[path] if option in dict(run.options)]
    assert option in next((said for run in runs if (said := mistake(run))), "nothing is said")


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
