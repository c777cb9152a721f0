"""Which runs a grid comes to: axes, budgets, tuning on seeds of its own, the number of seeds after a pilot."""

import datetime
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Run
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.power import pilot_of_grid, seeds_after_pilot
from moa_lightning.experiments.schedule import Schedule
from moa_lightning.experiments.sizes import Size

MakeGrid = Callable[..., Path]
LR = "model.optimizer.lr"
TUNE = {"seeds": [100, 101], "options": {LR: [0.001, 0.002, 0.004]}}


def size(task: GridTask, variant: GridVariant, more: Mapping[str, str]) -> Size:
    """Variants differ in parameters and FLOPs, as they do without matching."""
    batch = int(more.get("data.batch_size", 8))
    parameters, flops = {"gelu": (1000, 6e3), "la": (1100, 7e3), "moa": (2000, 12e3)}[variant.name]
    return Size(parameters, batch, 16, flops)


def schedule(path: Path, value: Callable[[Run], float | None] = lambda run: None) -> Schedule:
    return Schedule(load_grid(path, Path), size, value)


def task_of(path: Path, **entries: Any) -> dict[str, Any]:
    return {"config": [str(path.parent / "task.yaml")], "metric": "val/loss", "mode": "min", **entries}


def steps(runs: list[Run]) -> dict[str, str]:
    return {run.variant: dict(run.options)["trainer.max_steps"] for run in runs}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"steps": 300}, {"gelu": "300", "la": "300", "moa": "300"}),
        ({"samples": 1e3}, {"gelu": "125", "la": "125", "moa": "125"}),
        ({"tokens": "1e4"}, {"gelu": "78", "la": "78", "moa": "78"}),  # 10,000 / (8 * 16) = 78.1
        ({"tokens_per_parameter": 20}, {"gelu": "156", "la": "172", "moa": "312"}),  # 20 * parameters / 128
        ({"flops": 2.4e6}, {"gelu": "50", "la": "43", "moa": "25"}),  # / (8 * FLOPs a sample)
    ],
)
def test_a_budget_becomes_steps(make_grid: MakeGrid, budget: dict[str, Any], expected: dict[str, str]) -> None:
    plan = schedule(make_grid(budget={**budget, "validations": 4}, seeds=[0]))
    runs = plan.runs()[:3]
    assert steps(runs) == expected
    rhythm = {run.variant: dict(run.options)["trainer.val_check_interval"] for run in runs}
    assert rhythm == {name: str(math.ceil(int(count) / 4)) for name, count in expected.items()}
    # the last one at the end of the run, whether or not the interval divides it
    assert {math.ceil(int(count) / int(rhythm[name])) for name, count in expected.items()} == {4}


def test_a_tuned_batch_keeps_the_budget(make_grid: MakeGrid) -> None:
    tune = {"seeds": [9], "options": {"data.batch_size": [8, 16]}}
    plan = schedule(
        make_grid(budget={"tokens": 1e4}, tune=tune, seeds=[0]), lambda run: float("batch_size=16" not in run.name)
    )
    lengths = {run.setting: dict(run.options)["trainer.max_steps"] for run in plan.tuning_runs()}
    assert lengths == {"batch_size=8": "78", "batch_size=16": "39"}
    assert {dict(run.options)["trainer.max_steps"] for run in plan.final_runs()} == {"39"}


def test_a_run_on_top_of_another_changes_with_it(make_grid: MakeGrid, tmp_path: Path) -> None:
    entries: dict[str, Any] = {"dense": {}, "ticket": {"overrides": {"mask": "{run:dense}"}}}
    entries["finer"] = {"overrides": {"mask": "{run:ticket}"}}

    def fingerprints() -> dict[str, dict[str, str]]:
        path = make_grid(variants=entries, baseline="dense", seeds=[0], tasks={"t": task_of(tmp_path / "x")})
        return {run.variant: run.fingerprint() for run in schedule(path).runs()}

    before = fingerprints()
    entries["dense"] = {"overrides": {"width": 3}}
    after = fingerprints()
    assert [name for name in after if after[name] != before[name]] == ["dense", "ticket", "finer"]


def test_a_task_has_the_seeds_of_those_that_build_on_it(make_grid: MakeGrid, tmp_path: Path) -> None:
    first = task_of(tmp_path / "x", effect=10.0)
    second = task_of(tmp_path / "x", effect=0.005, overrides={"start": "{run:first/gelu}"})
    path = make_grid(tasks={"first": first, "second": second}, seeds={"pilot": [0, 1, 2], "most": 20})
    noise = {"gelu": (0.0, 0.004, 0.001), "la": (0.003, 0.0, 0.002), "moa": (0.001, 0.0, 0.004)}
    plan = schedule(path, lambda run: noise[run.variant][run.seed] if run.seed < 3 else None)
    tasks = {task.name: task for task in plan.grid.tasks}
    asked = plan.plan(tasks["first"])
    assert asked is not None
    assert asked.needed == 2
    assert len(plan.seeds(tasks["second"])) > 3
    assert plan.seeds(tasks["first"]) == plan.seeds(tasks["second"])


def test_a_task_that_is_not_judged_has_the_seeds_of_those_that_build_on_it(make_grid: MakeGrid, tmp_path: Path) -> None:
    """It needs no `effect`, has no plan, and its spread asks for nothing."""
    first = task_of(tmp_path / "x", judged=False)
    second = task_of(tmp_path / "x", effect=0.005, overrides={"start": "{run:first/gelu}"})
    lone = task_of(tmp_path / "x", judged=False)
    path = make_grid(tasks={"first": first, "second": second, "lone": lone}, seeds={"pilot": [0, 1, 2], "most": 20})
    noise = {"gelu": (0.0, 0.004, 0.001), "la": (0.003, 0.0, 0.002), "moa": (0.001, 0.0, 0.004)}
    plan = schedule(path, lambda run: noise[run.variant][run.seed] if run.seed < 3 else None)
    tasks = {task.name: task for task in plan.grid.tasks}
    assert plan.plan(tasks["first"]) is None
    assert plan.seeds(tasks["lone"]) == (0, 1, 2)
    assert len(plan.seeds(tasks["second"])) > 3
    assert plan.seeds(tasks["first"]) == plan.seeds(tasks["second"])
    assert plan.grid.claims == 2


def test_tuning_and_pilot_are_of_the_tasks_own_variants(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = task_of(tmp_path / "x", effect=0.005, variants=["gelu", "la"])
    path = make_grid(tasks={"t": task}, tune=TUNE, seeds={"pilot": [0, 1, 2], "most": 20})
    noise = {"gelu": (0.0, 0.004, 0.001), "la": (0.003, 0.0, 0.002)}
    plan = schedule(path, lambda run: 1.0 if run.setting else noise[run.variant][run.seed] if run.seed < 3 else None)
    assert {run.variant for run in plan.runs()} == {"gelu", "la"}
    assert len(plan.tuning_runs()) == 2 * 2 * 3
    asked = plan.plan(plan.grid.tasks[0])
    assert asked is not None
    pilot = pilot_of_grid({name: dict(enumerate(values)) for name, values in noise.items()})
    assert asked.needed == seeds_after_pilot(0.005, pilot, target=0.8, comparisons=1)


def test_tokens_of_images_are_refused(make_grid: MakeGrid) -> None:
    plan = Schedule(
        load_grid(make_grid(budget={"tokens": 5}), Path), lambda *_: Size(10, 8, None, 1e3), lambda run: None
    )
    with pytest.raises(UserError, match="needs a task that counts in tokens"):
        plan.runs()


def test_axes_multiply_tasks(make_grid: MakeGrid, tmp_path: Path) -> None:
    axes = {"size": {"small": None, "large": {"overrides": {"b": 2}}}, "data": {"all": None, "tenth": None}}
    tasks = {"t": task_of(tmp_path / "x", overrides={"b": 1}), "u": task_of(tmp_path / "x", axes={"rate": {"hot": {}}})}
    grid = load_grid(make_grid(tasks=tasks, axes=axes), Path)
    assert [task.name for task in grid.tasks] == [
        *("t-small-all", "t-small-tenth", "t-large-all", "t-large-tenth"),
        *("u-small-all-hot", "u-small-tenth-hot", "u-large-all-hot", "u-large-tenth-hot"),
    ]
    assert grid.tasks[2].axes == {"size": "large", "data": "all"}
    assert (grid.tasks[0].overrides["b"], grid.tasks[2].overrides["b"]) == ("1", "2"), "an axis wins over the task"
    assert {task.base for task in grid.tasks} == {"t", "u"}


def losses(best: Mapping[str, str], noise: float = 0.0) -> Callable[[Run], float]:
    """A loss that is least at a variant's own rate."""

    def loss(run: Run) -> float:
        rate = math.log(float(dict(run.options)[LR]) / float(best[run.variant]))
        return rate**2 + noise * run.seed * len(run.variant)

    return loss


def test_finals_wait_for_tuning_and_take_each_variants_best(make_grid: MakeGrid, tmp_path: Path) -> None:
    path = make_grid(tasks={"t": task_of(tmp_path / "x")}, tune=TUNE, seeds=[0, 1], overrides={})
    nothing = schedule(path)
    assert len(nothing.runs()) == 3 * 3 * 2
    assert nothing.total() == 3 * 3 * 2 + 3 * 2
    first = nothing.runs()[0]
    assert (first.name, first.seed) == ("t/gelu/tune/lr=0.001/seed100", 100)
    assert first.folder == tmp_path / "out/t/gelu/tune/lr=0.001/seed100"

    best = {"gelu": "0.002", "la": "0.002", "moa": "0.004"}
    full = schedule(path, losses(best))
    finals = [run for run in full.runs() if run.setting is None]
    assert {(run.variant, run.seed): dict(run.options)[LR] for run in finals} == {
        (variant, seed): rate for variant, rate in best.items() for seed in (0, 1)
    }
    choice = full.choice(full.grid.tasks[0], full.grid.variants[2])
    assert choice is not None
    assert choice.edges == (LR,), "the best of moa is the last value"
    assert full.choice(full.grid.tasks[0], full.grid.variants[0]).edges == ()  # type: ignore[union-attr]

    one_missing = schedule(path, lambda run: None if "la/tune/lr=0.004/seed101" in run.name else losses(best)(run))
    assert {run.variant for run in one_missing.runs() if run.setting is None} == {"gelu", "moa"}


def test_diverged_settings_are_not_chosen(make_grid: MakeGrid, tmp_path: Path) -> None:
    path = make_grid(tasks={"t": task_of(tmp_path / "x", mode="max")}, tune=TUNE, seeds=[0], overrides={})

    def accuracy(run: Run) -> float:
        rate = dict(run.options)[LR]
        return math.nan if rate == "0.004" and run.seed == 101 else float(rate)

    chosen = schedule(path, accuracy).final_run(*pair(path))
    assert chosen is not None
    assert dict(chosen.options)[LR] == "0.002"


def pair(path: Path) -> tuple[GridTask, GridVariant, int]:
    grid = load_grid(path, Path)
    return grid.tasks[0], grid.variants[0], 0


def test_tuning_has_a_length_of_its_own(make_grid: MakeGrid, tmp_path: Path) -> None:
    tune = {**TUNE, "budget": {"tokens": 1280}, "overrides": {"a": 2}}
    path = make_grid(tasks={"t": task_of(tmp_path / "x")}, budget={"tokens": 12800}, tune=tune, overrides={"a": 1})
    plan = schedule(path, losses({"gelu": "0.002", "la": "0.002", "moa": "0.002"}))
    tuning, final = plan.tuning_runs()[0], plan.final_runs()[0]
    options = [{key: dict(run.options)[key] for key in ("trainer.max_steps", "a")} for run in (tuning, final)]
    assert options == [{"trainer.max_steps": "10", "a": "2"}, {"trainer.max_steps": "100", "a": "1"}]


def test_a_pilot_decides_the_number_of_seeds(make_grid: MakeGrid, tmp_path: Path) -> None:
    tasks = {name: task_of(tmp_path / "x", effect=effect) for name, effect in (("t", 0.05), ("u", 5.0))}
    path = make_grid(tasks=tasks, seeds={"pilot": [0, 1, 2], "most": 40})
    noise = {("gelu", 0): 0.01, ("gelu", 1): -0.02, ("la", 2): 0.03, ("moa", 1): 0.02, ("moa", 2): -0.01}

    def value(run: Run) -> float:
        return 1.0 + noise.get((run.variant, run.seed), 0.0)

    def seeds(plan: Schedule) -> dict[str, int]:
        return {task.name: len(plan.seeds(task)) for task in plan.grid.tasks}

    assert seeds(schedule(path)) == {"t": 3, "u": 3}, "no result yet"
    pilot = pilot_of_grid(
        {name: {seed: 1.0 + noise.get((name, seed), 0.0) for seed in (0, 1, 2)} for name in ("gelu", "la", "moa")}
    )
    needed = seeds_after_pilot(0.05, pilot, target=0.8, comparisons=4)  # 2 tasks x 2 variants against the baseline
    plan = schedule(path, value)
    assert 3 < needed < 40
    assert seeds(plan) == {"t": needed, "u": 3}
    finals = [run for run in plan.runs() if run.variant == "la"]
    assert sorted(run.seed for run in finals if run.task == "t") == list(range(needed))
    assert seeds(schedule(make_grid(tasks=tasks, seeds={"pilot": [0, 1, 2], "most": 4}), value)) == {"t": 4, "u": 3}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"budget": {"steps": 1, "tokens": 2}}, "a budget is one of steps, samples, .*; found steps, tokens"),
        ({"budget": {"tokens": 0}}, "tokens is 0; give a number above 0"),
        ({"budget": {"tokens": "many"}}, "tokens is 'many'"),
        ({"budget": {"steps": 5}, "overrides": {"trainer.max_steps": 5}}, "a budget and the option trainer.max_steps"),
        ({"tune": {"seeds": [2], "options": {LR: [1, 2]}}}, "seeds 2 would be used for tuning and for final runs"),
        ({"tune": {"seeds": [9], "options": {LR: [1]}}}, "two or more values"),
        ({"tune": {"seeds": [9], "options": {LR: [1, 1]}}}, "repeats a value"),
        ({"tune": {"options": {LR: [1, 2]}}}, "seeds is None"),
        ({"seeds": {"pilot": [0, 1], "most": 5}}, "a pilot of 2 seeds"),
        ({"seeds": {"pilot": [0, 1, 2], "most": 2}}, "most: 2"),
        ({"seeds": {"pilot": [0, 1, 2], "most": 9}}, "has no `effect`"),
        ({"seeds": {"pilot": [0, 1, 2], "most": 9, "power": 80}}, "power: 80"),
        ({"axes": {"size": {"a/b": None}}}, "letters, digits"),
        ({"axes": {"size": ["small"]}}, "axis size: expected"),
        ({"axes": {"size": {}}}, "axis size of task language has no values"),
        ({"overrides": {"note": datetime.date(2026, 1, 1)}}, "overrides: note is .*; put it in quotes"),
        ({"out": None}, "out is None; give the folder"),
        ({"tune": {"seeds": [9]}}, "no task has options to tune"),
        ({"tune": TUNE, "axes": {"rate": {"low": {"overrides": {LR: 1}}}}}, f"task language-low sets {LR}"),
        ({"tune": TUNE | {"overrides": {LR: 1}}}, f"sets {LR} .itself, by an axis, or by the overrides of tuning"),
        ({"axes": ["size"]}, "axes: expected"),
        ({"axes": {"a": {"x": None}, "b": {"y": {"steps": 3}}}}, "axis b, y: unknown key 'steps'"),
        ({"variants": {"gelu": None, "la": {"against": "relu"}}}, "'relu' is not a variant"),
        ({"cluster": {"kind": "moon"}}, "kind is 'moon'; choose from slurm, local"),
    ],
)
def test_mistakes_are_one_sentence(make_grid: MakeGrid, entries: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_grid(make_grid(**entries), Path)
    assert "\n" not in str(error.value)


def test_an_option_is_set_or_tuned(make_grid: MakeGrid) -> None:
    with pytest.raises(UserError, match=f"variant la sets {LR}, which is tuned"):
        load_grid(make_grid(variants={"gelu": None, "la": {"overrides": {LR: 1}}}, tune=TUNE), Path)


def test_claims_count_the_comparisons(make_grid: MakeGrid) -> None:
    variants = {"gelu": None, "swiglu": None, "both": {"against": "swiglu"}}
    grid: Grid = load_grid(make_grid(variants=variants), Path)
    assert [grid.against(variant) for variant in grid.variants] == ["gelu", "gelu", "swiglu"]
    assert grid.claims == 4  # two tasks
