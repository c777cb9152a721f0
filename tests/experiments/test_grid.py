"""The grid file: what its runs are, and that every mistake is one sentence before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.command import ablate_command
from moa_lightning.experiments.grid import Claim, Need, Outcome, Run
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.runner import make_schedule

MakeGrid = Callable[..., Path]
TUNE = {"seeds": [9], "options": {"rate": [1, 2]}}


def find(name: str) -> Path:
    if not Path(name).is_file():
        raise UserError(f"no config {name}")
    return Path(name)


def runs(path: Path) -> list[Run]:
    return make_schedule(load_grid(path, find)).runs()


def test_runs_have_seeds_outermost_and_all_combinations(make_grid: MakeGrid) -> None:
    names = [run.name for run in runs(make_grid(seeds=[4, 2]))]
    first = [f"{task}/{variant}/seed4" for task in ("language", "mae") for variant in ("gelu", "la", "moa")]
    assert names == first + [name.replace("seed4", "seed2") for name in first]


def test_command_of_a_run(make_grid: MakeGrid, tmp_path: Path) -> None:
    options = {"trainer.max_steps": 300, "a": None, "b": True, "c": [0.9, 0.95], "d": "1e-3", "e": -1}
    run = runs(make_grid(overrides=options))[1]
    assert run.arguments() == [
        *("fit", "-c", f"{tmp_path}/task.yaml", "-c", f"{tmp_path}/la.yaml"),
        *("--seed_everything", "0"),
        *("--trainer.max_steps=300", "--a=null", "--b=true", "--c=[0.9, 0.95]", "--d=1e-3", "--e=-1"),
        *("--run_dir", f"{tmp_path}/out/language/la/seed0", "--ckpt_path", "auto"),
    ]


def test_overrides_of_a_variant_win_over_the_task_and_the_grid(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "m", "mode": "max", "overrides": {"b": 2, "c": 2}}
    path = make_grid(overrides={"a": 1, "b": 1, "c": 1}, tasks={"t": task}, variants={"gelu": {"overrides": {"c": 3}}})
    assert dict(runs(path)[0].options) == {"a": "1", "b": "2", "c": "3"}


def test_fingerprint_follows_content_not_comments_nor_place(make_grid: MakeGrid, tmp_path: Path) -> None:
    def fingerprint(**entries: Any) -> dict[str, str]:
        return runs(make_grid(**entries))[1].fingerprint()

    first = fingerprint()
    assert fingerprint(out=str(tmp_path / "elsewhere"), jobs=1) == first
    assert fingerprint(overrides={"steps": 7}) != first
    path = make_grid()
    (tmp_path / "la.yaml").write_text("# a remark\nquality:   0.1\n")
    assert runs(path)[1].fingerprint() == first
    (tmp_path / "la.yaml").write_text("quality: 0.3\n")
    assert runs(path)[1].fingerprint() != first


def test_name_and_folder_have_defaults(make_grid: MakeGrid) -> None:
    path = make_grid()
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("name:", "out:", "jobs:"))]
    path.write_text("\n".join(lines))
    grid = load_grid(path, find)
    assert (grid.name, grid.out, grid.jobs) == ("grid", Path("runs/grid"), 1)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'"),
        ({"seeds": []}, "no `seeds`"),
        ({"seeds": [0, 0]}, "repeats a seed"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"seeds": [True]}, "whole numbers"),
        ({"baseline": "relu"}, "not a variant; choose one of gelu, la, moa"),
        ({"variants": {}}, "no `variants`"),
        ({"variants": {"gelu": {"config": ["absent.yaml"]}}}, "no config absent.yaml"),
        ({"variants": {"gelu": {"confg": []}}}, "variant gelu: unknown key 'confg'"),
        ({"variants": {"gelu": None, "../x": None}}, "letters, digits"),
        ({"variants": {"gelu": None, True: None}}, "put it in quotes"),
        ({"tasks": ["language"]}, "tasks: expected"),
        ({"tasks": {"t": {"metric": "m", "mode": "min"}}}, "task t names no config"),
        ({"jobs": 0}, "jobs is 0"),
        ({"overrides": {"seed_everything": 1}}, "set by the grid"),
    ],
)
def test_mistakes_are_one_sentence(make_grid: MakeGrid, entries: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        load_grid(make_grid(**entries), find)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"metric": None}, "has no metric"),
        ({"mode": "less"}, "min or max"),
        ({"variants": "gelu"}, "task t has variants 'gelu'; give a list"),
        ({"variants": []}, "give a list"),
        ({"variants": ["gelu", "gelu"]}, "each once"),
        ({"variants": ["gelu", "relu"]}, "task t has variant 'relu'; choose from gelu, la, moa"),
        ({"variants": ["la", "moa"]}, "task t has variant la, but not gelu, with which it is compared; add that one"),
        ({"judged": 0}, "judged 0; give true or false"),
        ({"tests": ["fog"]}, "task t: tests: expected `key: value` lines"),
        ({"tests": {"fog": {"metric": "test/loss"}}}, "test fog differs in nothing from `moa test`"),
        ({"tests": {"fog": {"overrides": {"fog": 1}}}}, "test fog has metric None; name what `moa test` reports"),
        ({"tests": {"fog": {"overrides": {"fog": 1}, "metric": "m", "mode": "up"}}}, "has mode 'up'"),
        ({"tests": {"fog": {"overrides": {"run_dir": "x"}}}}, "run_dir is set by the grid"),
        ({"tests": {"fog": {"overrides": {"fog": "{run:gelu}"}}}}, "fog names another run"),
        ({"tests": {"a b": {"overrides": {"fog": 1}}}}, "letters, digits"),
    ],
)
def test_mistakes_in_a_task(make_grid: MakeGrid, tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"} | entry
    with pytest.raises(UserError, match=words):
        load_grid(make_grid(tasks={"t": task}), find)


def test_a_repeated_variant_is_noticed(make_grid: MakeGrid) -> None:
    path = make_grid()
    path.write_text(path.read_text().replace("variants:\n", "variants:\n  la: {}\n"))
    with pytest.raises(UserError, match="'la' stands twice"):
        load_grid(path, find)


def test_broken_files_are_named(make_grid: MakeGrid, tmp_path: Path) -> None:
    path = make_grid()
    (tmp_path / "moa.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match=r"moa\.yaml is not valid YAML"):
        load_grid(path, find)
    with pytest.raises(UserError, match=r"cannot read .*absent\.yaml"):
        load_grid(tmp_path / "absent.yaml", find)


def test_a_grid_imports_only_what_the_command_line_names(make_grid: MakeGrid) -> None:
    path = make_grid(overrides={"import": "mine"})
    with pytest.raises(UserError, match="imports 'mine', which runs its code; if you trust it, add --import mine"):
        ablate_command([str(path), "--dry-run"], find)
    assert ablate_command([str(path), "--dry-run", "--import", "mine"], find) == 0


def test_options_may_name_the_seed_and_the_folder_of_a_run_before(make_grid: MakeGrid, tmp_path: Path) -> None:
    variants = {"gelu": {}, "la": {"overrides": {"start": "{run:gelu}", "split": "s{seed}"}}}
    path = make_grid(variants=variants, seeds=[3])
    run = runs(path)[1]
    assert f"--start={tmp_path}/out/language/gelu/seed3" in run.arguments()
    assert "--split=s3" in run.arguments()
    assert run.fingerprint()["start"] == "{run:gelu}"  # a finished grid may be moved


@pytest.mark.parametrize("name", ["la", "moa", "gelo", "mae/gelu", "language/gelu"])
def test_a_run_names_only_runs_before_it(make_grid: MakeGrid, name: str) -> None:
    variants = {"gelu": {}, "la": {"overrides": {"start": f"{{run:{name}}}"}}, "moa": {}}
    with pytest.raises(UserError, match=f"start is .*'{name}' is neither a variant listed before"):
        runs(make_grid(variants=variants))


def test_a_run_of_another_task(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min"}
    tasks = {"first": task, "second": {**task, "overrides": {"start": "{run:first/gelu}"}}}
    found = runs(make_grid(tasks=tasks, variants={"gelu": {}, "la": {}}, seeds=[0]))
    need = Need("{run:first/gelu}", "first", "gelu", tmp_path / "out/first/gelu/seed0", found[0].digest)
    assert [run.needs for run in found[2:]] == 2 * [(need,)]
    tasks["second"]["overrides"] = {"start": "{run:first/{variant}}"}
    found = runs(make_grid(tasks=tasks, variants={"gelu": {}, "la": {}}, seeds=[0]))
    assert [run.needs[0].folder for run in found[2:]] == [
        tmp_path / f"out/first/{name}/seed0" for name in ("gelu", "la")
    ]
    tasks["second"]["tune"] = {"rate": [1, 2]}
    with pytest.raises(UserError, match="task second is tuned, so start cannot name a run of another task"):
        runs(make_grid(tasks=tasks, variants={"gelu": {}}, seeds=[0], tune={"seeds": [9]}))


def test_a_task_has_only_its_variants(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min"}
    variants = {"gelu": {}, "la": {}, "moa": {"against": "la"}}
    tasks = {"all": task, "pair": {**task, "variants": ["moa", "la"]}, "alone": {**task, "variants": ["gelu"]}}
    with pytest.raises(UserError, match="variant la, but not gelu"):
        load_grid(make_grid(tasks=tasks, variants=variants), find)
    tasks["pair"]["variants"] = ["moa", "gelu", "la"]
    tasks["material"] = {**task, "variants": ["moa"], "judged": False}
    grid = load_grid(make_grid(tasks=tasks, variants=variants, seeds=[0]), find)
    assert [v.name for v in grid.variants_of(grid.tasks[1])] == ["gelu", "la", "moa"], "in the grid's order"
    loss = Outcome("val/loss", "min")
    assert list(grid.family().items()) == [
        (Claim("all", "la", loss), {"la": 1, "gelu": -1}),
        (Claim("all", "moa", loss), {"moa": 1, "la": -1}),
        (Claim("pair", "la", loss), {"la": 1, "gelu": -1}),
        (Claim("pair", "moa", loss), {"moa": 1, "la": -1}),
    ]
    assert grid.claims == 4
    found = make_schedule(grid)
    assert [run.name for run in found.runs()][-2:] == ["alone/gelu/seed0", "material/moa/seed0"]
    assert found.total() == len(found.runs()) == 3 + 3 + 1 + 1


def test_a_run_names_only_variants_that_its_task_has(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min"}
    tasks = {"first": {**task, "variants": ["gelu"]}, "second": {**task, "overrides": {"from": "{run:first/gelu}"}}}
    variants = {"gelu": {}, "la": {}}
    assert len(runs(make_grid(tasks=tasks, variants=variants, seeds=[0]))) == 3
    tasks["second"]["overrides"] = {"from": "{run:first/{variant}}"}
    with pytest.raises(UserError, match="'first/la' is neither"):
        runs(make_grid(tasks=tasks, variants=variants, seeds=[0]))
    tasks["second"]["variants"] = ["gelu"]
    assert len(runs(make_grid(tasks=tasks, variants=variants, seeds=[0]))) == 2
    here = {"first": {**task, "variants": ["la"], "judged": False}}
    variants["la"] = {"overrides": {"from": "{run:gelu}"}}
    with pytest.raises(UserError, match="'gelu' is neither"):
        runs(make_grid(tasks=here, variants=variants))


def test_commands_of_the_tests_of_a_task(make_grid: MakeGrid, tmp_path: Path) -> None:
    """They stand beside the run: its fingerprint and its tuning do not know of them."""
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min", "test_metric": "test/loss"}
    plain = runs(make_grid(tasks={"t": task}, seeds=[3]))
    fog = {"overrides": {"fog": 0.5, "part": "{variant}-{seed}"}}
    probe = {"config": str(tmp_path / "la.yaml"), "metric": "test/top1", "mode": "max"}
    tests = {"tests": {"fog": fog, "probe": probe}}
    path = make_grid(tasks={"t": task | tests}, seeds=[3], overrides={"import": "mine", "rate": 2})
    run = runs(path)[1]
    folder = tmp_path / "out/t/la/seed3"
    [_, (fog_result, fog_command), (_, probe_command)] = run.later_arguments().items()
    where = Path(fog_result).parent
    assert where.parent == Path("tests")
    assert where.name.startswith("fog-")
    trained = ["test", "--ckpt_path", f"{folder}/checkpoints/last.ckpt", "--import=mine"]
    assert fog_command == [*trained, "--fog=0.5", "--part=la-3", "--run_dir", f"{folder}/{where}"]
    assert probe_command[:-1] == [*trained, "-c", f"{tmp_path}/la.yaml", "--run_dir"]
    assert load_grid(path, find).tasks[0].outcomes == (
        Outcome("test/loss", "min"),
        Outcome("test/loss", "min", "fog"),
        Outcome("test/top1", "max", "probe"),
    )
    assert load_grid(path, find).claims == 6
    for each, before in zip(runs(make_grid(tasks={"t": task | tests}, seeds=[3])), plain, strict=True):
        assert (each.digest, each.arguments()) == (before.digest, before.arguments())
    tuned = make_schedule(load_grid(make_grid(tasks={"t": task | tests}, tune={**TUNE}), find)).tuning_runs()
    assert {test for run in tuned for test in run.tests} == set()


def test_a_module_that_only_tuning_imports_needs_leave_too(make_grid: MakeGrid) -> None:
    tune = {"seeds": [9], "options": {"rate": [1, 2]}, "overrides": {"import": "mine"}}
    with pytest.raises(UserError, match="imports 'mine', which runs its code"):
        ablate_command([str(make_grid(tune=tune)), "--dry-run"], find)


def test_a_module_that_only_a_test_imports_needs_leave_too(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "m", "mode": "min", "test_metric": "m"}
    task["tests"] = {"fog": {"overrides": {"import": "mine"}}}
    assert load_grid(make_grid(tasks={"t": task}), find).modules == {"mine"}


FOUR = {name: {} for name in ("gelu", "gelu_ticket", "moa", "moa_ticket")}
PRUNES = {"name": "prunes", "of": ["moa_ticket", "moa"], "against": ["gelu_ticket", "gelu"]}


def test_interactions_are_claims_of_judged_tasks_that_have_their_variants(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min"}
    tests = {"fog": {"overrides": {"fog": 1}, "metric": "test/loss"}}
    tasks = {
        "all": {**task, "tests": tests},
        "few": {**task, "variants": ["gelu", "moa", "moa_ticket"]},
        "material": {**task, "judged": False},
    }
    grid = load_grid(make_grid(tasks=tasks, variants=FOUR, interactions=[PRUNES]), find)
    found = {claim: weights for claim, weights in grid.family().items() if claim.name == "prunes"}
    weights = {"moa_ticket": 1, "moa": -1, "gelu_ticket": -1, "gelu": 1}
    assert found == {Claim("all", "prunes", Outcome("val/loss", "min")): weights}
    assert grid.claims == 3 + 3 + 1 + 2  # variants by the metric and the test, the interaction, variants of `few`


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "a b"}, "name is 'a b'; use letters"),
        ({"name": "moa"}, "interaction moa: a variant or another interaction is called so"),
        ({"of": ["moa_ticket", "la"]}, "interaction prunes: 'la' is not a variant"),
        ({"of": ["moa_ticket"]}, "prunes needs two variants in `of`"),
        ({"of": "moa"}, "prunes needs two variants in `of`"),
        ({"of": ["moa_ticket", "gelu"]}, "prunes is between four different variants"),
        ({"versus": 1}, "unknown key 'versus'"),
    ],
)
def test_mistakes_in_an_interaction(make_grid: MakeGrid, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_grid(make_grid(variants=FOUR, interactions=[PRUNES | entry]), find)


def test_an_interaction_needs_a_task_and_a_name_of_its_own(make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": str(tmp_path / "task.yaml"), "metric": "val/loss", "mode": "min", "variants": ["gelu", "moa"]}
    with pytest.raises(UserError, match="interaction prunes: no judged task has all of moa_ticket, moa, gelu_ticket"):
        load_grid(make_grid(tasks={"t": task}, variants=FOUR, interactions=[PRUNES]), find)
    with pytest.raises(UserError, match="another interaction is called so"):
        load_grid(make_grid(variants=FOUR, interactions=[PRUNES, PRUNES]), find)
    with pytest.raises(UserError, match="give a list such as"):
        load_grid(make_grid(variants=FOUR, interactions=PRUNES), find)
