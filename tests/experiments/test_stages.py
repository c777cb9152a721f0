"""Grids whose runs follow from results: tuning first, the test split once, divergence as a result, ten kills."""

import csv
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import fake_moa
from tests.experiments.conftest import Ablate
from tests.experiments.test_ablate import begun, results, wait_for

MakeGrid = Callable[..., Path]
TUNE = {"seeds": [100], "options": {"rate": [0.005, 0.01, 0.02]}}


def tuned_grid(make_grid: MakeGrid, folder: Path, seconds: float = 0.0, **entries: Any) -> Path:
    path = make_grid(
        tasks={"t": {"config": [str(folder / "task.yaml")], "metric": "val/loss", "mode": "min"}},
        overrides={"steps": 4, "step_seconds": seconds, "journal": str(folder / "journal.txt")},
        tune=TUNE,
        **entries,
    )
    (folder / "moa.yaml").write_text("quality: 0.2\nbest_rate: 0.02\n")
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "out/table.csv").open()))


def test_each_variant_trains_at_its_own_best_rate(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    done = ablate(tuned_grid(make_grid, tmp_path, jobs=1))  # one at a time: the order is known
    assert done.status == 0, done.output
    assert "[18/18]" in done.output
    starts = begun(tmp_path)
    assert all("/seed100" in line for line in starts[:9]), "tuning comes first"
    assert [row["tuned"] for row in rows(tmp_path)] == ["rate=0.01", "rate=0.01", "rate=0.02*"]
    assert "* at the edge" in (tmp_path / "out/table.md").read_text()
    assert {row["n"] for row in rows(tmp_path)} == {"3"}, "tuning runs are not counted"
    again = ablate(tmp_path / "grid.yaml")
    assert "18 of 18 runs are finished already" in again.output


def test_another_best_rate_changes_the_final_runs(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    path = tuned_grid(make_grid, tmp_path)
    assert ablate(path).status == 0
    path.write_text(path.read_text().replace("- 0.02\n", "- 0.03\n"))  # now 0.01 is nearer to moa's 0.02
    refused = ablate(path)
    assert refused.status == 2
    assert "different in rate" in refused.output
    assert ablate(path, "--restart-changed").status == 0
    assert rows(tmp_path)[2]["tuned"] == "rate=0.03*"
    starts = Counter(line.split()[0] for line in begun(tmp_path))
    assert {run for run, count in starts.items() if count == 2} == {f"t/moa/seed{seed}" for seed in (0, 1, 2)}


def test_the_test_split_is_read_once_and_only_by_final_runs(
    ablate: Ablate,
    make_grid: MakeGrid,
    tmp_path: Path,
) -> None:
    path = tuned_grid(make_grid, tmp_path, seeds=[0])
    path.write_text(path.read_text().replace("    mode: min\n", "    mode: min\n    test_metric: test/loss\n"))
    for _ in range(2):
        done = ablate(path)
        assert done.status == 0, done.output
    tested = {journal.parent for journal in (tmp_path / "out").rglob("journal.txt")}
    assert tested == {tmp_path / "out/t" / variant / "seed0" for variant in ("gelu", "la", "moa")}
    assert all((folder / "journal.txt").read_text().count("tested") == 1 for folder in tested)
    assert {row["metric"] for row in rows(tmp_path)} == {"test/loss"}
    finished = tmp_path / "out/t/la/seed0/test.json"
    finished.unlink()  # killed between training and testing
    assert ablate(path).status == 0
    assert finished.is_file()
    assert Counter(begun(tmp_path))["t/la/seed0 from 0"] == 1, "it was not trained again"


def test_a_test_metric_that_is_added_later_is_only_measured(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    path = make_grid(seeds=[0])
    assert ablate(path).status == 0
    path.write_text(path.read_text().replace("    mode: min\n", "    mode: min\n    test_metric: test/loss\n"))
    done = ablate(path)
    assert done.status == 0, done.output
    assert {row["metric"] for row in rows(tmp_path)} == {"test/loss"}
    assert len(begun(tmp_path)) == 6, "no run was trained again"


def test_tests_are_made_once_and_compared_on_their_own(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    fog = {"overrides": {"fog": 0.5}, "metric": "test/top1", "mode": "max"}
    tasks = {"t": {**task, "tests": {"fog": fog, "haze": {"overrides": {"fog": 0.1}, "metric": "test/loss"}}}}
    path = make_grid(tasks=tasks, seeds=[0, 1, 2, 3, 4], overrides={"steps": 2})
    for _ in range(2):
        done = ablate(path)
        assert done.status == 0, done.output
    journals = [journal.read_text() for journal in (tmp_path / "out").rglob("journal.txt")]
    assert len(journals) == 15
    for journal in journals:
        assert [line.split(maxsplit=1)[1] for line in journal.splitlines()] == ["tested 0.5", "tested 0.1"]
    found = {(row["test"], row["variant"]): row for row in rows(tmp_path)}
    assert list(found) == [(test, name) for test in ("", "fog", "haze") for name in ("gelu", "la", "moa")]
    assert [row["verdict"] for row in found.values()] == [
        *("baseline", "better", "better"),
        *("baseline", "worse", "worse"),
        *("baseline", "better", "better"),
    ]
    assert {row["family"] for row in found.values()} == {"", "6"}
    # la is better by 0.1, 0.12, 0.14, 0.1 and 0.12 in loss, and top1 is 50 times the loss
    assert float(found["fog", "la"]["difference_mean"]) == pytest.approx(-50 * 0.116)
    assert (found["fog", "la"]["metric"], found["fog", "la"]["mode"]) == ("test/top1", "max")
    records = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    one = next(row for row in records if (row["variant"], row["seed"]) == ("la", "2"))
    assert float(one["haze/test/loss"]) == pytest.approx(float(one["val/loss"]) + 1 + 0.2)
    assert float(one["fog/test/top1"]) == pytest.approx(50 * (float(one["val/loss"]) + 1) + 1)
    for text in ((tmp_path / "out/report.md").read_text(), done.output):
        assert "t: val/loss ↓" in text
        assert "t, fog: test/top1 ↑" in text
    assert "| t, fog | la | test/top1 ↑ |" in (tmp_path / "out/table.md").read_text()


def test_a_test_that_fails_or_changes_is_made_again_without_training(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min", "variants": ["gelu"]}
    (tmp_path / "foggy.yaml").write_text("a: 1\n")

    def grid(fog: str, metric: str = "test/loss") -> Path:
        test = {"overrides": {"fog": fog}, "metric": metric, "config": [str(tmp_path / "foggy.yaml")]}
        return make_grid(tasks={"t": {**task, "tests": {"fog": test}}}, seeds=[0], jobs=1)

    failed = ablate(grid("lost"))
    assert failed.status == 1
    assert "no fog at hand" in failed.output
    assert ablate(grid("0.5")).status == 0
    (tmp_path / "foggy.yaml").write_text("a: 2\n")
    assert ablate(grid("0.5")).status == 0
    journal = (tmp_path / "out/t/gelu/seed0/journal.txt").read_text()
    assert [line.split()[-1] for line in journal.splitlines()] == ["lost", "0.5", "0.5"]
    assert begun(tmp_path) == ["t/gelu/seed0 from 0"], "trained once"
    unknown = ablate(grid("0.5", "test/top2"))
    assert unknown.status == 2
    assert "t/gelu/seed0 reports no fog/test/top2" in unknown.output


def test_a_diverged_run_is_lost_to_the_tests_as_well(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    variants = {"gelu": {"config": [str(tmp_path / "gelu.yaml")]}, "wild": {"overrides": {"diverge": True}}}
    fog = {"overrides": {"fog": 0.5}, "metric": "test/loss"}
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min", "tests": {"fog": fog}}
    done = ablate(make_grid(variants=variants, tasks={"t": task}, seeds=[0, 1]))
    assert done.status == 0, done.output
    assert [row["verdict"] for row in rows(tmp_path)][3] == "not finite on 2 of 2 seeds"


def test_a_run_that_several_tasks_have_is_made_once(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    fog = {"fog": {"overrides": {"fog": 0.5}, "metric": "test/loss"}}
    tasks = {
        "first": {**task, "tests": fog},
        "again": {**task, "mode": "max"},
        "tested": {**task, "test_metric": "test/loss", "variants": ["gelu", "moa"]},
        "longer": {**task, "overrides": {"steps": 8}, "variants": ["gelu"]},
        "on_top": {**task, "overrides": {"after": "{run:again/la}"}, "variants": ["gelu"]},
    }
    variants = {name: {"config": [str(tmp_path / f"{name}.yaml")]} for name in ("gelu", "la", "moa")}
    variants["moa"]["freeze_gates"] = 4
    path = make_grid(tasks=tasks, seeds=[0, 1], variants=variants)
    done = ablate(path)
    assert done.status == 0, done.output
    starts = Counter(line.split()[0].split("/")[0] for line in begun(tmp_path))
    assert starts == {"first": 6, "longer": 2, "on_top": 2}
    assert "again/la/seed1 is a copy of first/la/seed1" in done.output
    out = tmp_path / "out"
    for name in ("gelu", "la", "moa"):
        first, again = (out / task / name / "seed1" for task in ("first", "again"))
        for file in ("result.json", "metrics.csv"):
            assert (first / file).read_bytes() == (again / file).read_bytes()
        assert (first / "checkpoints/last.ckpt").samefile(again / "checkpoints/last.ckpt")
        assert not (first / "result.json").samefile(again / "result.json")
        assert (again / "log.txt").read_text() == f"a copy of first/{name}/seed1, a run with the same fingerprint\n"
    moa = (out / "tested/moa/seed1/journal.txt").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in moa if line.startswith("tested/")] == ["tested"]
    assert len(moa) == 3, "first's two measurements were not repeated"
    assert (out / "tested/moa/seed1/test.json").is_file()
    assert not (out / "first/moa/seed1/test.json").exists()
    found = {(row["task"], row["variant"], row["test"]): row for row in rows(tmp_path)}
    assert found["first", "la", ""]["mean"] == found["again", "la", ""]["mean"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    assert "20 of 20 runs are finished already" in ablate(path).output
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}


def test_variants_of_a_task_that_are_configured_alike_are_both_trained(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    variants = {name: {"config": [str(tmp_path / "gelu.yaml")]} for name in ("gelu", "once_more")}
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    assert ablate(make_grid(tasks={"t": task}, variants=variants, seeds=[0])).status == 0
    assert sorted(begun(tmp_path)) == ["t/gelu/seed0 from 0", "t/once_more/seed0 from 0"]


def test_what_would_have_been_copied_from_a_run_that_failed_or_diverged(
    ablate: Ablate, make_grid: MakeGrid, tmp_path: Path
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    tasks = {"first": task, "again": dict(task)}
    failing = {"gelu": {"overrides": {"fail": "no disk"}}}
    failed = ablate(make_grid(tasks=tasks, variants=failing, seeds=[0], jobs=2))
    assert failed.status == 1
    assert failed.output.count("RuntimeError: no disk") >= 2, "each says why"
    wild = {"gelu": {"overrides": {"diverge": True}}}
    done = ablate(make_grid(tasks=tasks, variants=wild, seeds=[0], out=str(tmp_path / "wild")))
    assert done.status == 0, done.output
    assert Counter(begun(tmp_path))["first/gelu/seed0 from 0"] == 2
    assert Counter(begun(tmp_path))["again/gelu/seed0 from 0"] == 1, "of the failing ones"
    assert (tmp_path / "wild/again/gelu/seed0/diverged.json").is_file()


def test_gates_are_averaged_once(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    variants = {"gelu": {}, "moa": {"config": [str(tmp_path / "moa.yaml")], "freeze_gates": 64}}
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    path = make_grid(variants=variants, tasks={"t": task})
    for _ in range(2):
        done = ablate(path)
        assert done.status == 0, done.output
    journals = {journal.parent.parent.name: journal.read_text() for journal in (tmp_path / "out").rglob("journal.txt")}
    assert list(journals) == ["moa"]
    assert journals["moa"].split(maxsplit=1)[1] == "held over 64\n"
    report = (tmp_path / "out/report.md").read_text()
    assert r"+0.260 \[+0.235, +0.285\]" in report, "0.25, 0.26 and 0.27"


def test_a_diverged_run_is_a_result(ablate: Ablate, make_grid: MakeGrid, tmp_path: Path) -> None:
    variants = {"gelu": {"config": [str(tmp_path / "gelu.yaml")]}, "wild": {"overrides": {"diverge": True}}}
    path = make_grid(variants=variants, seeds=[0, 1])
    for _ in range(2):
        done = ablate(path)
        assert done.status == 0, done.output
    assert Counter(begun(tmp_path))["language/wild/seed0 from 0"] == 1, "it is not repeated"
    table = (tmp_path / "out/table.md").read_text()
    assert "not finite on 2 of 2 seeds" in table


def test_a_grid_killed_ten_times_ends_with_the_same_table(
    ablate: Ablate,
    make_grid: MakeGrid,
    tmp_path: Path,
) -> None:
    path = tuned_grid(make_grid, tmp_path, seconds=0.4)
    draw = random.Random(0)
    for attempt in range(10):
        before = len(begun(tmp_path))
        with subprocess.Popen([sys.executable, fake_moa.__file__, path], stdout=subprocess.DEVNULL) as grid:
            if attempt % 3:  # after a run has begun; else at any time of the start as well
                wait_for(lambda: len(begun(tmp_path)) > before)  # noqa: B023 - called here
            time.sleep(draw.uniform(0.0, 1.5))
            grid.send_signal(signal.SIGKILL)
            assert grid.wait() == -signal.SIGKILL, "it had ended before it was killed"
    done = ablate(path)
    assert done.status == 0, done.output
    assert len(begun(tmp_path)) > 18, "some runs went on"
    killed = results(tmp_path)
    (tmp_path / "out").rename(tmp_path / "killed")
    assert ablate(tuned_grid(make_grid, tmp_path)).status == 0
    assert results(tmp_path) == killed
