"""Faults in data as the command shows them: counted in a file, or one sentence and an end, with one process and two."""

import csv
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Moa
from tests.cli.test_processes import LATE, command
from tests.data.conftest import write_pictures

LINE = (
    "fit -c configs/vision/mae_tiny.yaml -c configs/data/image_folder.yaml -c configs/trainer/cpu.yaml "
    "--trainer.precision 32-true --data.source set --data.image_size 16 --data.batch_size 8 --data.bank_size 8 "
    "--model.backbone_args.depth 1 --trainer.max_steps 4 --run_dir run --data.num_workers 1"
)
TWO = f"{LINE} --trainer.strategy ddp --trainer.devices 2"


@pytest.fixture(autouse=True)
def bad() -> list[str]:
    """A folder of 32 images for training and 4 for validation; three of the former are cut off."""
    write_pictures(Path("set/train/cat"), 32)
    write_pictures(Path("set/val/cat"), 4)
    write_pictures(Path("set/test/cat"), 4)
    bad = [f"set/train/cat/{name}" for name in ("5.JPG", "12.png", "31.JPG")]
    for path in map(Path, bad):
        path.write_bytes(path.read_bytes()[:200])
    return sorted(bad)


def counted() -> list[tuple[str, str, str]]:
    with Path("run/bad_samples.csv").open(newline="") as file:
        header, *rows = [tuple(row) for row in csv.reader(file)]
    assert header == ("file", "bad", "slow")
    return rows


def expected(bad: list[str]) -> list[tuple[str, str, str]]:
    return [(path, "1", "0") for path in bad]  # four steps are an epoch; the bank's bad samples depend on its draw


def test_skipped_samples_are_reported(moa: Moa, bad: list[str], caplog: pytest.LogCaptureFixture) -> None:
    outcome = moa(f"{LINE} --data.on_bad_sample skip --trainer.limit_val_batches 0")
    assert outcome.code == 0, outcome.err
    assert counted() == expected(bad)
    assert "3 samples that could not be read, in 3 files" in caplog.text + outcome.err


def test_a_bad_sample_is_one_sentence(moa: Moa, bad: list[str]) -> None:
    outcome = moa(LINE)
    assert (outcome.code, outcome.err.count("moa: ")) == (2, 1)
    assert any(f"{path} (200 bytes) cannot be decoded as an image" in outcome.err for path in bad)


def test_two_processes_count_together(bad: list[str]) -> None:
    outcome = command(f"{TWO} --data.on_bad_sample skip --trainer.limit_val_batches 0")
    assert outcome.returncode == 0, outcome.stderr
    assert counted() == expected(bad)
    assert outcome.stderr.count("3 samples that could not be read") == 1
    assert "faults" not in torch.load("run/checkpoints/last.ckpt", weights_only=True)


def test_a_bad_sample_of_one_process_ends_both(bad: list[str]) -> None:
    Path("sitecustomize.py").write_text(LATE)
    outcome = command(TWO, PYTHONPATH=str(Path.cwd()))
    assert outcome.returncode != 0
    assert sum("cannot be decoded as an image" in line for line in outcome.stderr.splitlines()) == 1
    assert "Traceback" not in outcome.stderr
    assert all(line.startswith("moa") for line in outcome.stderr.splitlines() if "other" in line)
