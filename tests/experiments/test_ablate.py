"""`moa ablate` as a user meets it: run, interrupt, kill, continue, change a config, fail. Runs are fakes (fake_moa)."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments import state
from tests.experiments import fake_moa
from tests.experiments.conftest import Ablate

MakeGrid = Callable[..., Path]


def begun(folder: Path) -> list[str]:
    """The starts of runs so far, such as `language/la/seed0 from 4`."""
    journal = folder / "journal.txt"
    return journal.read_text().splitlines() if journal.is_file() else []


def finished(folder: Path) -> set[str]:
    return {"/".join(path.parts[-4:-1]) for path in folder.glob("out/*/*/*/result.json")}


def half_way(folder: Path) -> bool:
    """Some unfinished run has a checkpoint, and steps to go."""
    checkpoints = folder.glob("out/*/*/*/checkpoints/last.ckpt")
    return any(int(path.read_text()) < 20 for path in checkpoints if not (path.parents[1] / "result.json").is_file())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited two minutes in vain"
        time.sleep(0.02)


def results(folder: Path) -> dict[str, str]:
    return {name: (folder / "out" / name).read_text() for name in ("table.md", "table.csv", "runs.csv")}


def test_a_grid_ends_with_table_pictures_and_the_tensorboard_line(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    done = ablate(make_grid())
    assert done.status == 0, done.output
    assert "[18/18]" in done.output
    assert done.output.splitlines()[-1] == f"tensorboard --logdir {tmp_path}/out"
    for name in ("table.md", "table.csv", "runs.csv", "language.png", "mae.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert f"{tmp_path}/out/{name}" in done.output
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["verdict"] for row in rows] == 2 * ["baseline", "better", "better"]
    # the fake's la is better by 0.1, 0.12 and 0.14 on the seeds 0, 1 and 2
    assert float(rows[1]["difference_mean"]) == pytest.approx(-0.12)
    assert len(list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))) == 18
    assert (tmp_path / "out/mae/la/seed2/log.txt").read_text() == "a first line\n"

    again = ablate(tmp_path / "grid.yaml")
    assert "18 of 18 runs are finished already" in again.output
    assert len(begun(tmp_path)) == 18


def test_tasks_with_variants_of_their_own_and_tasks_that_are_not_judged(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    tasks = {
        "first": {**task, "variants": ["moa"], "judged": False, "target": 2.0},
        "second": {**task, "variants": ["gelu", "moa"], "overrides": {"after": "{run:first/moa}"}},
    }
    done = ablate(make_grid(tasks=tasks))
    assert done.status == 0, done.output
    assert "[9/9]" in done.output
    assert {"/".join(line.split()[0].split("/")[:2]) for line in begun(tmp_path)} == {
        *("first/moa", "second/gelu", "second/moa"),
    }
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["task"], row["variant"], row["family"], row["verdict"]) for row in rows] == [
        ("first", "moa", "", "not judged"),
        ("second", "gelu", "", "baseline"),
        ("second", "moa", "1", "better"),
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "of 1 comparisons: 1 better" in report
    assert "no run yet" not in report, "of variants that the task does not have"


def test_interactions_are_in_table_and_report(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    """Of la_moa's quality, 0.1 is more than those of la and moa together."""
    (tmp_path / "la_moa.yaml").write_text("quality: 0.4\n")
    variants = {name: {"config": [str(tmp_path / f"{name}.yaml")]} for name in ("gelu", "la", "moa", "la_moa")}
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    crossed = {"name": "crossed", "of": ["la_moa", "la"], "against": ["moa", "gelu"]}
    done = ablate(make_grid(tasks={"t": task}, variants=variants, interactions=[crossed], seeds=[0, 1, 2, 3, 4]))
    assert done.status == 0, done.output
    row = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))[-1]
    # 0.4 - 0.1 - 0.2, times 1, 1.2, 1.4, 1 and 1.2
    assert float(row["difference_mean"]) == pytest.approx(-0.1 * 1.16)
    assert (row["variant"], row["family"], row["verdict"]) == ("crossed", "4", "better")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "of 4 comparisons: 4 better" in report
    assert "crossed" in done.output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_continued_is_the_same_as_never_stopped(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path, number: signal.Signals
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    slow = {"steps": 40, "step_seconds": 0.05, "journal": str(tmp_path / "journal.txt")}
    path = make_grid(tasks={"t": task}, overrides=slow, seeds=[0], jobs=1)
    with subprocess.Popen([sys.executable, fake_moa.__file__, path], stdout=subprocess.PIPE, text=True) as grid:
        try:
            wait_for(lambda: len(finished(tmp_path)) == 1 and half_way(tmp_path))
            grid.send_signal(number)
            output, _ = grid.communicate(timeout=60)
        finally:
            grid.kill()
    assert grid.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "the same command continues" in output
    time.sleep(0.5)
    curves = {curve: curve.read_text() for curve in tmp_path.rglob("metrics.csv")}
    time.sleep(0.3)
    assert curves == {curve: curve.read_text() for curve in tmp_path.rglob("metrics.csv")}, "a run outlived its grid"
    assert finished(tmp_path) == {"t/gelu/seed0"}

    done = ablate(path)
    assert done.status == 0, done.output
    first, second, again, third = begun(tmp_path)
    assert (first, second, third) == ("t/gelu/seed0 from 0", "t/la/seed0 from 0", "t/moa/seed0 from 0")
    assert again.startswith("t/la/seed0 from ")
    assert int(again.split()[-1]) >= 1, "the run did not continue from its checkpoint"

    continued = results(tmp_path)
    (tmp_path / "out").rename(tmp_path / "continued")
    assert ablate(make_grid(tasks={"t": task}, overrides=slow | {"step_seconds": 0}, seeds=[0])).status == 0
    assert results(tmp_path) == continued


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LOCK_PATIENCE_SECONDS", 0.2)
    claim = state.lock(tmp_path)
    with pytest.raises(UserError, match="another `moa ablate` is at work"):
        state.lock(tmp_path)
    os.close(claim)
    os.close(state.lock(tmp_path))


def test_a_changed_config_is_refused_and_repeated_on_request(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    path = make_grid(seeds=[0])
    assert ablate(path).status == 0
    (tmp_path / "la.yaml").write_text("quality: 0.15\n")
    before = results(tmp_path)
    for words in ((), ("--table-only",), ("--dry-run",)):
        refused = ablate(path, *words)
        assert refused.status == 2
        assert "2 of 6 runs" in refused.output
        assert "la.yaml" in refused.output
        assert "--restart-changed" in refused.output
    assert results(tmp_path) == before

    assert ablate(path, "--restart-changed").status == 0
    starts = Counter(line.split()[0] for line in begun(tmp_path))
    assert {run for run, count in starts.items() if count == 2} == {"language/la/seed0", "mae/la/seed0"}
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert float(rows[1]["difference_mean"]) == pytest.approx(-0.15)


def test_a_failed_run_stops_no_other_and_is_reported(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    variants = {
        "gelu": {"config": [str(tmp_path / "gelu.yaml")]},
        "raises": {"overrides": {"fail": "the loss is [nan]"}},
        "killed": {"overrides": {"die": True}},
        "silent": {"overrides": {"silent": True}},
    }
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    done = ablate(make_grid(variants=variants, tasks={"language": task}, seeds=[0, 1]))
    assert done.status == 1
    log = tmp_path / "out/language/raises/seed1/log.txt"
    assert f"FAILED language/raises/seed1: RuntimeError: the loss is [nan] ({log})" in done.output
    assert "FAILED language/killed/seed0: ended by SIGKILL; last line: a first line" in done.output
    assert "FAILED language/silent/seed0: ended without a result" in done.output
    assert set(re.findall(r"^\[\d+/(\d+)\]", done.output, re.MULTILINE)) == {"8"}, "a failed run counts once"
    assert finished(tmp_path) == {"language/gelu/seed0", "language/gelu/seed1"}
    table = (tmp_path / "out/table.md").read_text()
    assert "not decided: 0 of 2 pairs |  |  | 0 of 2 |" in table


def test_a_metric_that_the_task_does_not_report_stops_the_grid(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/acc", "mode": "max"}
    path = make_grid(tasks={"t": task})
    for _ in range(2):  # while running, and on the result of the first attempt
        done = ablate(path)
        assert done.status == 2
        assert "reports no val/acc" in done.output
        assert "choose from val/loss" in done.output
    assert len(begun(tmp_path)) < 5


def test_files_of_others_are_left_alone(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    mine = tmp_path / "out/language/la/seed0/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = ablate(make_grid())
    assert done.status == 2
    assert "no grid wrote" in done.output
    assert mine.read_text() == "mine"
    assert begun(tmp_path) == []


def test_options_of_the_command(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    path = make_grid()
    dry = ablate(path, "--dry-run", "--seeds", "5,7", "--out", tmp_path / "other")
    assert dry.status == 0
    assert len(dry.output.splitlines()) == 12
    assert dry.output.startswith(
        f"to run: moa fit -c {tmp_path}/task.yaml -c {tmp_path}/gelu.yaml --seed_everything 5 "
    )
    assert not (tmp_path / "other").exists()
    empty = ablate(path, "--table-only")
    assert "No finished run" in empty.output
    for words in (("--seeds", "0,x"), ("--jobs", "0")):
        assert ablate(path, *words).status == 2


def test_runs_that_name_others_wait_for_them(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    chain = {
        "gelu": {},
        "la": {"overrides": {"after": "{run:gelu}"}},
        "moa": {"overrides": {"after": "{run:la}"}},
        "other": {},
    }
    done = ablate(make_grid(tasks={"t": task}, variants=chain, seeds=[0, 1], jobs=3))
    assert done.status == 0, done.output
    starts = [line.split()[0] for line in begun(tmp_path)]
    assert sorted(starts) == sorted(f"t/{name}/seed{seed}" for name in chain for seed in (0, 1))
    for seed in (0, 1):
        order = [starts.index(f"t/{name}/seed{seed}") for name in ("gelu", "la", "moa")]
        assert order == sorted(order)


def test_runs_that_name_a_failed_one_are_not_begun(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    chain = {"gelu": {}, "la": {"overrides": {"fail": "no"}}, "moa": {"overrides": {"after": "{run:la}"}}}
    done = ablate(make_grid(tasks={"t": task}, variants=chain, seeds=[0], jobs=1))  # one at a time: the order is known
    assert done.status == 1
    assert "not begun: it needs" in done.output
    assert [line.split()[0] for line in begun(tmp_path)] == ["t/gelu/seed0", "t/la/seed0"]
