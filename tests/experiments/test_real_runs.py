"""`moa ablate` on real runs of `moa fit`: tuning, tests, held gates, a run begun from another one, the report."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Moa
from tests.cli.conftest import _alone as _alone
from tests.cli.conftest import moa as moa  # the command in an empty folder

OPTIONS = {
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "data.source": "texts",
    "data.context_length": 16,
    "data.batch_size": 4,
    "data.max_val_samples": 8,
    "data.max_test_samples": 8,
    "model.gpt.dim": 16,
    "model.gpt.depth": 1,
    "model.gpt.num_heads": 2,
    "model.optimizer.warmup_steps": 1,
}
GRID = {
    "name": "real",
    "jobs": 2,
    "baseline": "gelu",
    "seeds": [0, 1],
    "tune": {"seeds": [100], "options": {"model.optimizer.lr": [0.001, 0.03]}},
    "budget": {"steps": 4, "validations": 2},
    "overrides": OPTIONS,
    "tasks": {
        "language": {
            "config": ["configs/language/gpt_tiny.yaml", "configs/data/text_files.yaml"],
            "metric": "val/loss",
            "test_metric": "test/loss",
            "mode": "min",
        }
    },
    "variants": {
        "gelu": {"config": "configs/ffn/gelu.yaml"},
        "moa": {"config": "configs/ffn/moa.yaml", "freeze_gates": 2},
        "la_at_mean": {
            "config": "configs/ffn/la.yaml",
            "overrides": {"model.ffn.start_from": "{run:moa}"},
            "against": "moa",
        },
    },
}
TUNING, FINAL = 3 * 2, 3 * 2
OUT = Path("runs/real")


@pytest.fixture
def grid() -> Path:
    """A grid file, and the texts that its runs read."""
    Path("texts").mkdir()
    for number in range(30):
        Path(f"texts/{number}.txt").write_text(f"the {number}. quick brown fox jumps over a lazy dog\n" * 8)
    Path("grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    return Path("grid.yaml")


def ablate(grid: Path) -> str:
    """What the command prints; in a process of its own, as this one may have forked other runs before."""
    command = [sys.executable, "-m", "moa_lightning.cli", "ablate", str(grid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(name: str) -> list[dict[str, str]]:
    with (OUT / name).open() as file:
        return list(csv.DictReader(file))


def metrics(folder: Path, name: str = "result.json") -> dict[str, float]:
    return json.loads((folder / name).read_text())["metrics"]


def test_a_grid_of_real_runs(moa: Moa, grid: Path) -> None:
    assert f"[{TUNING + FINAL}/{TUNING + FINAL}]" in ablate(grid)

    runs = {Path(row["folder"]): row for row in rows("runs.csv")}
    assert len(runs) == TUNING + FINAL
    assert {(row["state"], row["steps"]) for row in runs.values()} == {("finished", "4")}
    for folder, row in runs.items():
        assert float(row["val/loss"]) == metrics(folder)["val/loss"]
        assert math.isfinite(metrics(folder)["val/loss"])
        assert (folder / "test.json").is_file() == (not row["setting"]), "the test split is for final runs"
        held = row["variant"] == "moa" and not row["setting"]
        assert (folder / "held_gates.json").is_file() == held
    finals = {(row["variant"], row["seed"]): folder for folder, row in runs.items() if not row["setting"]}
    curve = list(csv.DictReader((finals["moa", "0"] / "metrics.csv").open()))
    assert [row["step"] for row in curve if row["val/loss"]] == ["2", "4"]

    table = {row["variant"]: row for row in rows("table.csv")}
    for name, row in table.items():
        tests = {seed: metrics(finals[name, seed], "test.json")["test/loss"] for seed in ("0", "1")}
        assert float(row["mean"]) == pytest.approx((tests["0"] + tests["1"]) / 2)
        tuning = [row for row in runs.values() if row["variant"] == name and row["setting"]]
        best = min(tuning, key=lambda row: float(row["val/loss"]))
        assert row["tuned"] == f"{best['setting']}*", "the better one of two, so at the edge"
    assert [row["verdict"] == "baseline" for row in table.values()] == [True, False, False]
    assert {row["pairs"] for row in table.values()} == {"", "2"}

    # the same runs begun by hand
    rate = float(table["moa"]["tuned"].partition("=")[2].rstrip("*"))
    words = " ".join(f"--{option} {value}" for option, value in OPTIONS.items())
    fit = "fit -c configs/language/gpt_tiny.yaml -c configs/data/text_files.yaml -c configs/ffn/moa.yaml"
    length = "--trainer.max_steps 4 --trainer.val_check_interval 2"
    done = moa(f"{fit} {words} {length} --model.optimizer.lr {rate} --seed_everything 1 --run_dir by_hand")
    assert done.code == 0, done.err
    assert metrics(Path("by_hand")) == pytest.approx(metrics(finals["moa", "1"]), rel=1e-5)
    assert moa("test --ckpt_path by_hand/checkpoints/last.ckpt").code == 0
    assert metrics(Path("by_hand"), "test.json") == pytest.approx(metrics(finals["moa", "1"], "test.json"), rel=1e-5)
    assert moa("validate --ckpt_path by_hand/checkpoints/last.ckpt --freeze_gates 2").code == 0
    held, by_hand = (json.loads((f / "held_gates.json").read_text()) for f in (finals["moa", "1"], Path("by_hand")))
    assert held["held"] == pytest.approx(by_hand["held"], rel=1e-5)

    files = {path: path.stat().st_mtime_ns for path in OUT.glob("language/**/*") if path.is_file()}
    assert f"{TUNING + FINAL} of {TUNING + FINAL} runs are finished already" in ablate(grid)
    assert files == {path: path.stat().st_mtime_ns for path in OUT.glob("language/**/*") if path.is_file()}

    assert moa(f"report {OUT}").code == 0
    page = (OUT / "report.md").read_text()
    for said in ("All runs have finished", "test/loss", table["moa"]["verdict"], "gates held", "la_at_mean"):
        assert said in page, said
