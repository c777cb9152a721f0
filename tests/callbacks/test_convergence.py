"""Convergence: the counts beside each metric, the run's files, and a resumed run without a seam."""

import csv
import json
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moa_lightning.callbacks import Convergence, Throughput

from .toy import BATCH, FLOPS, TOKENS, ToyTask, events, fit, toy_loader


def points(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TimedTask(ToyTask):
    """A training batch takes 2 seconds, a validation batch 100, by the fake clock."""

    def __init__(self, clock, **options):
        super().__init__(**options)
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock[0] += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock[0] += 100
        super().validation_step(batch, batch_idx)


class FailingTask(ToyTask):
    def training_step(self, batch, batch_idx):
        if self.global_step == 9:
            raise RuntimeError("power cut")
        return super().training_step(batch, batch_idx)


def test_metrics_stand_against_samples_tokens_flops_and_seconds(tmp_path, fake_time, monkeypatch):
    monkeypatch.setattr(TimedTask, "flops_per_sample", lambda self: 3e6)
    fit(TimedTask(fake_time), tmp_path / "run", [Convergence()])
    steps = [2, 4, 6, 8, 10]
    losses = [value for _, value in points(tmp_path / "run", "train/loss")]
    assert len(losses) == 5
    for axis, per_step in (("samples", BATCH), ("tokens", BATCH * TOKENS), ("megaflops", BATCH * 3), ("seconds", 2)):
        assert points(tmp_path / "run", f"train/loss_vs_{axis}") == [
            (step * per_step, loss) for step, loss in zip(steps, losses, strict=True)
        ]
        assert [step for step, _ in points(tmp_path / "run", f"val/loss_vs_{axis}")] == [4 * per_step, 8 * per_step]


def test_metrics_csv_has_a_row_for_each_logging_point(tmp_path, fake_time):
    fit(TimedTask(fake_time), tmp_path / "run", [Convergence()])
    table = rows(tmp_path / "run")
    assert list(table[0]) == ["step", "samples", "tokens", "flops", "seconds", "train/loss", "val/loss"]
    train = [row for row in table if row["train/loss"]]
    assert [(r["step"], r["samples"], r["tokens"], float(r["flops"]), float(r["seconds"])) for r in train] == [
        (str(s), str(s * BATCH), str(s * BATCH * TOKENS), s * BATCH * FLOPS, s * 2.0) for s in (2, 4, 6, 8, 10)
    ]
    assert [float(r["train/loss"]) for r in train] == [v for _, v in points(tmp_path / "run", "train/loss")]
    assert [r["step"] for r in table if r["val/loss"]] == ["4", "8"]


def test_curves_begin_before_the_first_step_where_asked(tmp_path, fake_time):
    """Lightning's check of the whole validation set, which leaves training as it is."""
    started, plain, untrained = TimedTask(fake_time), TimedTask(fake_time), ToyTask()
    plain.load_state_dict(started.state_dict())
    untrained.load_state_dict(started.state_dict())
    fit(plain, tmp_path / "plain", [Convergence()])
    fit(started, tmp_path / "run", [Convergence()], num_sanity_val_steps=-1)
    first, *others = rows(tmp_path / "run")
    loss = float(L.Trainer(accelerator="cpu", logger=False).validate(untrained, toy_loader(8, seed=1))[0]["val/loss"])
    counts = [first[name] for name in ("step", "samples", "tokens", "flops", "seconds")]
    assert list(map(float, counts)) == [0, 0, 0, 0, 0]
    assert float(first["val/loss"]) == loss
    assert others == rows(tmp_path / "plain")
    for tag in ("val/loss", "val/loss_vs_samples", "val/loss_vs_tokens"):
        assert points(tmp_path / "run", tag)[0] == (0, pytest.approx(loss, rel=1e-6)), tag
    assert points(tmp_path / "run", "val/loss")[1:] == points(tmp_path / "plain", "val/loss")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result == json.loads((tmp_path / "plain/result.json").read_text())


def test_a_task_without_tokens_has_no_token_axis(tmp_path):
    fit(ToyTask(tokens=False), tmp_path / "run", [Convergence()])
    tags = events(tmp_path / "run").Tags()["scalars"]
    assert "train/loss_vs_samples" in tags
    assert not [tag for tag in tags if tag.endswith("_vs_tokens")]
    assert {row["tokens"] for row in rows(tmp_path / "run")} == {""}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["tokens"] is None


def test_accumulated_batches_all_count(tmp_path):
    fit(ToyTask(), tmp_path / "run", [Convergence()], accumulate_grad_batches=3, max_steps=4)
    assert [step for step, _ in points(tmp_path / "run", "train/loss_vs_samples")] == [6 * BATCH, 12 * BATCH]


def test_counts_are_of_all_processes_that_see_different_data(tmp_path, fake_time, monkeypatch):
    monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0})
    fit(TimedTask(fake_time), tmp_path / "run", [Throughput(), Convergence()])
    last = [row for row in rows(tmp_path / "run") if row["train/loss"]][-1]
    assert (last["samples"], last["tokens"]) == (str(3 * 10 * BATCH), str(3 * 10 * BATCH * TOKENS))
    assert float(last["perf/tokens_per_second"]) == 3 * BATCH * TOKENS / 2


def test_result_holds_the_last_validation_and_the_counts(tmp_path, fake_time, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    task = TimedTask(fake_time, teacher=True)
    fit(task, tmp_path / "run", [Convergence()])
    trained = 2 * (2 * 6 * 24 + 24 + 6)  # two blocks of two projections with biases; the teacher is not trained
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {
        "metrics": {"val/loss": points(tmp_path / "run", "val/loss")[-1][1]},
        "validation_step": 8,
        "parameters": trained,
        "steps": 10,
        "samples": 10 * BATCH,
        "tokens": 10 * BATCH * TOKENS,
        "flops": 10.0 * BATCH * FLOPS,
        "seconds": 20.0,
        "task": "TimedTask",
        "seed": 17,
    }


def checkpoints(folder):
    return ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=5, save_top_k=-1)


@pytest.fixture
def broken_run(tmp_path):
    """A run of 20 steps that failed in its tenth; the last checkpoint is from step 5, the last log from step 8."""
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(FailingTask(), folder, [Convergence(), checkpoints(folder)], max_steps=20)
    for path in folder.glob("events.out.tfevents.*"):  # TensorBoard reads by name: .10 of a second before its .9
        path.rename(folder / re.sub(r"tfevents\.\d+", "tfevents.1000000000", path.name))
    return folder


def test_a_run_that_failed_has_no_result(broken_run):
    assert [row["step"] for row in rows(broken_run)] == ["2", "4", "4", "6", "8", "8"]
    assert not (broken_run / "result.json").exists()


def test_resuming_leaves_no_seam(broken_run):
    fit(
        ToyTask(),
        broken_run,
        [Convergence(), checkpoints(broken_run)],
        max_steps=20,
        ckpt_path=broken_run / "checkpoints" / "step=5.ckpt",
    )
    steps = list(range(2, 21, 2))
    assert [step for step, _ in points(broken_run, "train/loss")] == [step - 1 for step in steps]  # Lightning's axis
    for axis, per_step in (("samples", BATCH), ("tokens", BATCH * TOKENS)):
        assert [step for step, _ in points(broken_run, f"train/loss_vs_{axis}")] == [s * per_step for s in steps]
    assert len(points(broken_run, "train/loss_vs_seconds")) == len(steps)
    validations = [int(row["step"]) for row in rows(broken_run) if row["val/loss"]]
    assert validations[0] == 4
    assert sorted(set(validations)) == validations
    assert [step for step, _ in points(broken_run, "val/loss_vs_samples")] == [s * BATCH for s in validations]
    table = [row for row in rows(broken_run) if row["train/loss"]]
    assert [int(row["step"]) for row in table] == steps
    seconds = [float(row["seconds"]) for row in rows(broken_run)]
    assert seconds == sorted(seconds)
    assert json.loads((broken_run / "result.json").read_text())["samples"] == 20 * BATCH


def test_a_finished_run_resumed_again_keeps_its_result(tmp_path):
    folder = tmp_path / "run"
    fit(ToyTask(), folder, [Convergence(), checkpoints(folder)])
    before = json.loads((folder / "result.json").read_text())
    table = (folder / "metrics.csv").read_text()
    (folder / "result.json").unlink()  # as if the process had died between its last checkpoint and its result
    fit(ToyTask(), folder, [Convergence()], ckpt_path=folder / "checkpoints" / "step=10.ckpt")
    after = json.loads((folder / "result.json").read_text())
    assert math.isclose(after.pop("seconds"), before.pop("seconds"), abs_tol=1.0)
    assert after == before
    assert (folder / "metrics.csv").read_text() == table


def test_a_finished_run_that_goes_on_is_no_longer_finished(tmp_path):
    folder = tmp_path / "run"
    fit(ToyTask(), folder, [Convergence(), checkpoints(folder)], max_steps=5)
    assert (folder / "result.json").exists()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(FailingTask(), folder, [Convergence()], ckpt_path=folder / "checkpoints" / "step=5.ckpt", max_steps=20)
    assert not (folder / "result.json").exists()


def test_training_is_the_same_without_it(tmp_path):
    torch.manual_seed(3)
    plain = ToyTask()
    torch.manual_seed(3)
    counted = ToyTask()
    fit(plain, tmp_path / "a", [])
    fit(counted, tmp_path / "b", [Convergence()])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), counted.parameters(), strict=True))
