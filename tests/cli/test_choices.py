"""--choices: a language model answers questions at validations and tests; mistakes in one sentence."""

import csv
import json
from pathlib import Path

import pytest

from tests.cli.conftest import MAE, TEXT, Moa

QUESTION = {"ctx": "the quick brown", "endings": ["fox jumps", "xzqzx"], "label": 0}


@pytest.mark.usefixtures("words")
def test_questions_are_answered_at_every_validation_and_test(moa: Moa) -> None:
    Path("easy.jsonl").write_text(json.dumps(QUESTION) + "\n")
    Path("odd.jsonl").write_text(json.dumps({**QUESTION, "label": 1}) + "\n")
    steps = "--trainer.max_steps 20 --trainer.val_check_interval 10 --model.optimizer.lr 0.01"
    fit = moa(f"{TEXT} {steps} -c configs/ffn/swiglu.yaml --choices easy.jsonl --run_dir run")
    assert fit.code == 0, fit.err
    with open("run/metrics.csv", newline="") as file:
        rows = [row["val/easy_acc"] for row in csv.DictReader(file) if row.get("val/loss")]
    assert len(rows) == 2
    assert float(rows[-1]) == 1
    assert json.loads(Path("run/result.json").read_text())["metrics"]["val/easy_acc_norm"] == 1

    again = moa("validate --ckpt_path run/checkpoints/last.ckpt")
    assert "val/easy_acc_bytes" in again.out
    other = moa("test --ckpt_path run/checkpoints/last.ckpt --choices [easy.jsonl,odd.jsonl]")
    assert other.code == 0, other.err
    found = json.loads(Path("run/test.json").read_text())["metrics"]
    assert (found["test/easy_acc"], found["test/odd_acc"]) == (1, 0)
    assert moa("predict --ckpt_path run/checkpoints/last.ckpt").code == 0

    Path("bad.jsonl").write_text(json.dumps(QUESTION) + "\n\nno question\n")
    for line, told in (
        ("validate --ckpt_path run/checkpoints/last.ckpt --choices bad.jsonl", "'bad.jsonl', line 3"),
        (f"{TEXT} {steps} --choices absent.jsonl --run_dir none", "'absent.jsonl' cannot be read"),
        (f"{MAE} --choices easy.jsonl --run_dir none", "language model"),
        (f"{TEXT} {steps} --data.val_fraction 0 --choices easy.jsonl --run_dir none", "no val split"),
    ):
        outcome = moa(line)
        assert outcome.code == 2, line
        assert outcome.err.count("\n") == 1
        assert told in outcome.err
        assert not Path("none").exists()
