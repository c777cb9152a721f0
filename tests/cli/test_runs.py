"""Runs by the command: their folder, what they validate and save, how they go on, what is said."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moa_lightning.callbacks.predictions import write_table
from moa_lightning.cli import main
from tests.cli.conftest import MAE, TEXT, Moa


def validated_steps(run: str) -> list[int]:
    """Optimiser steps after which a run has validated."""
    with open(f"{run}/metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("val/loss")]


def events(run: str, tag: str) -> list[tuple[int, float]]:
    """(step, value) in the order of writing; event files of one second have no order of their own."""
    accumulator = EventAccumulator(run, purge_orphaned_data=False)
    accumulator.Reload()
    return [(e.step, e.value) for e in sorted(accumulator.Scalars(tag), key=lambda event: event.wall_time)]


def saved_step(run: str) -> int:
    return int(torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["global_step"])


def test_a_run_writes_its_folder_and_says_what_it_does(moa: Moa) -> None:
    outcome = moa(f"{MAE} -c configs/ffn/moa.yaml --trainer.max_steps 4 --run_dir run")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "MAE" in lines[0]
    assert "moa plain, 7 activations from gelu, sigmoid gates" in lines[0]
    assert "mnist5k: 3,500 train, 8 val, 750 test" in lines[1]
    assert "4 steps of 8 samples" in lines[2]
    assert "precision 32-true" in lines[3]
    assert lines[4].endswith("run")
    assert lines[5].startswith("step 1/4  ")
    end = next(number for number, line in enumerate(lines) if line.startswith("finished step 4 after"))
    assert any("val/loss" in line for line in lines[end:])  # a table
    assert lines[-1] == "tensorboard --logdir run"
    assert {"config.yaml", "metrics.csv", "result.json", "checkpoints"} <= {p.name for p in Path("run").iterdir()}
    assert json.loads(Path("run/result.json").read_text())["steps"] == 4
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["init_args"]["ffn"]["mixing"] == "moa"
    assert not {"run_dir", "ckpt_path"} & set(saved)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--trainer.max_steps 7", [3, 6, 7]),
        ("--trainer.max_steps 6", [3, 6]),
        ("--trainer.max_steps 5 --trainer.val_check_interval null", [1, 2, 3, 4, 5]),
        ("--trainer.max_steps 5 --trainer.accumulate_grad_batches 2 --trainer.limit_train_batches 5", [3, 5]),
        ("--trainer.max_steps 4 --trainer.limit_train_batches 6 --trainer.val_check_interval 0.5", [3, 4]),
        ("--trainer.max_steps -1 --trainer.max_epochs 2 --trainer.limit_train_batches 4", [3, 6, 8]),
        (
            "--trainer.max_steps -1 --trainer.max_epochs 2 --trainer.limit_train_batches 2 "
            "--trainer.val_check_interval null",
            [2, 4],
        ),
    ],
)
def test_validation_comes_every_so_many_optimiser_steps_and_once_at_the_end(
    moa: Moa, options: str, steps: list[int]
) -> None:
    assert moa(f"{MAE} --run_dir run {options}").code == 0
    assert validated_steps("run") == steps
    assert saved_step("run") == steps[-1]


def test_a_resumed_run_gives_one_clean_curve(moa: Moa) -> None:
    whole = f"{MAE} --trainer.max_steps 7 --model.optimizer.schedule constant"
    assert moa(f"{whole} --run_dir whole").code == 0
    assert moa(f"{whole} --run_dir parts --trainer.max_steps 4").code == 0
    outcome = moa("fit --run_dir parts --ckpt_path last --trainer.max_steps 7")
    assert (outcome.code, outcome.err) == (0, "")
    assert "going on after step 4" in outcome.out
    for tag in ("train/loss", "train/loss_vs_samples"):
        assert [step for step, _ in events("parts", tag)] == [step for step, _ in events("whole", tag)]
        values = [[value for _, value in events(run, tag)] for run in ("parts", "whole")]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert [step for step, _ in events("parts", "train/loss")] == list(range(7))
    assert [step for step, _ in events("parts", "val/loss")] == [2, 3, 5, 6]
    assert validated_steps("parts") == [3, 4, 6, 7]
    assert saved_step("parts") == 7
    assert "nothing to do: step 7 is reached" in moa("fit --run_dir parts --ckpt_path last").out


def test_without_validation_data_the_last_step_is_saved_and_a_run_goes_on(moa: Moa, words: None) -> None:
    line = f"{TEXT} --data.val_fraction 0 --run_dir run --trainer.val_check_interval 3"
    assert moa(f"{line} --trainer.max_steps 4").code == 0
    assert saved_step("run") == 4
    outcome = moa("fit --run_dir run --ckpt_path last --trainer.max_steps 6")
    assert (outcome.code, saved_step("run")) == (0, 6)
    assert [step for step, _ in events("run", "train/loss")] == list(range(6))


@pytest.fixture
def stumbling() -> str:
    """Options of a run that crashes when it has taken five steps."""
    Path("stumble.py").write_text(
        "import lightning as L\n"
        "class Stumble(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 5:\n"
        "            raise ZeroDivisionError\n"
    )
    return "--import stumble --trainer.callbacks+ stumble.Stumble --trainer.max_steps 9 --trainer.val_check_interval 2"


@pytest.mark.parametrize(
    ("number", "code", "saved"), [(signal.SIGINT, 130, 3), (signal.SIGTERM, 75, 5), (signal.SIGUSR1, 75, 5)]
)
def test_a_stopped_run_says_how_it_goes_on(moa: Moa, number: signal.Signals, code: int, saved: int) -> None:
    name = f"stop_{number.name.lower()}"  # modules stay imported from test to test
    Path(f"{name}.py").write_text(
        "import lightning as L, os\n"
        "class Stop(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 4:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
    )
    outcome = moa(f"{MAE} --import {name} --trainer.callbacks+ {name}.Stop --trainer.max_steps 9 --run_dir run")
    assert (outcome.code, outcome.err) == (code, "")
    assert "the last checkpoint goes on with: moa fit --run_dir run --ckpt_path last" in outcome.out.splitlines()[-1]
    assert saved_step("run") == saved  # Ctrl-C leaves at once, the others finish the step and save it
    assert not Path("run/result.json").exists()


def test_a_crash_leaves_the_last_validated_step_also_where_it_is_not_the_best(stumbling: str) -> None:
    with pytest.raises(ZeroDivisionError):
        main(f"{MAE} {stumbling} --run_dir run --checkpoint.monitor val/loss --checkpoint.mode max".split())
    assert saved_step("run") == 4
    assert Path("run/checkpoints/step0000002.ckpt").exists()


def test_a_crash_leaves_the_last_scheduled_step_without_validation_data(stumbling: str, words: None) -> None:
    with pytest.raises(ZeroDivisionError):
        main(f"{TEXT} {stumbling} --run_dir run --data.val_fraction 0".split())
    assert saved_step("run") == 4


def test_the_last_checkpoint_is_the_last_step_also_where_it_is_not_the_best(moa: Moa) -> None:
    line = f"{MAE} --run_dir run --trainer.max_steps 5 --checkpoint.monitor val/loss --checkpoint.mode max"
    assert moa(line).code == 0
    assert saved_step("run") == 5
    assert Path("run/checkpoints/step0000003.ckpt").exists()  # the loss falls, so the first is the largest


def test_the_command_line_wins_over_the_checkpoint(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 2 --model.optimizer.lr 1e-3").code == 0
    other = f"{MAE} --run_dir run --ckpt_path last --trainer.max_steps 3"
    assert moa(f"{other} --model.optimizer.lr 5e-4 --model.mask_ratio 0.5").code == 0
    hyper_parameters = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert (hyper_parameters["optimizer"]["lr"], hyper_parameters["mask_ratio"]) == (5e-4, 0.5)
    outcome = moa(f"{other} --model.ffn.mixing la")
    assert outcome.code == 2
    assert "the checkpoint does not fit this MAE" in outcome.err
    outcome = moa(f"{other} --model DINO --data.transform MultiCrop --data.transform.local_size 16")
    assert outcome.code == 2
    assert "the checkpoint does not fit this DINO" in outcome.err


def test_evaluation_takes_the_settings_of_the_run(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 3 --model.mask_ratio 0.5").code == 0
    last = json.loads(Path("run/result.json").read_text())["metrics"]["val/loss"]
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    os.rename("run", "moved")
    for checkpoint in ("moved/checkpoints/last.ckpt", "last --run_dir moved"):
        outcome = moa(f"validate --ckpt_path {checkpoint}")
        assert (outcome.code, outcome.err) == (0, "")
        assert f"{last:.5g}" in next(line for line in outcome.out.splitlines() if "val/loss" in line)
    outcome = moa("test --ckpt_path moved/checkpoints/last.ckpt --trainer.limit_test_batches 2")
    assert "test/loss" in outcome.out
    after = {path: path.stat().st_mtime_ns for path in Path("moved").rglob("*") if path.is_file()}
    reported = json.loads(Path("moved/test.json").read_text())["metrics"]
    assert "test/loss" in reported
    assert {path.name for path in after} - {path.name for path in before} == {"test.json"}
    kept = [changed for path, changed in after.items() if path.name != "test.json"]
    assert kept == [*before.values()]  # evaluation writes nothing else into the run


def test_predictions_are_one_row_a_sample(moa: Moa, words: None) -> None:
    assert moa(f"{MAE} --run_dir images --trainer.max_steps 1").code == 0
    outcome = moa("predict --ckpt_path images/checkpoints/last.ckpt --data.test_fraction 0.01 --data.batch_size 16")
    assert (outcome.code, outcome.err) == (0, "")
    assert "images/predictions.npz: id (50,), label (50,), features (50, 128)" in outcome.out
    predictions = np.load("images/predictions.npz")
    assert predictions["id"].tolist() == list(range(50))
    assert np.isfinite(predictions["features"]).all()
    assert moa(f"{TEXT} --run_dir text --trainer.max_steps 1").code == 0
    assert "text/predictions.npz: id (20,), loss (20,)" in moa("predict --run_dir text --ckpt_path last").out


def test_the_images_of_any_folder_have_features_with_their_names(moa: Moa) -> None:
    """Without the run's own data, in another order of folders than of names, and unlike ones beside each other."""
    assert moa(f"{MAE} --run_dir images --trainer.max_steps 1").code == 0
    names = ["b.png", "a/z.png", "a/y/x.jpg", "c.png"]
    for number, name in enumerate(names):
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40 + number, 30), 60 * number, np.uint8)
        Image.fromarray(pixels).save(Path("pictures", name))
    line = "predict --ckpt_path images/checkpoints/last.ckpt --folder pictures --data.batch_size 3"
    outcome = moa(f"{line} --out new/features.npz")
    assert (outcome.code, outcome.err) == (0, "")
    assert "new/features.npz: id (4,), label (4,), features (4, 128), path (4,)" in outcome.out
    table = np.load("new/features.npz")
    assert table["path"].tolist() == [f"pictures/{name}" for name in sorted(names)]
    assert len(np.unique(table["features"].round(4), axis=0)) == 4
    single = moa(f"{line.replace('--folder pictures', '--folder pictures/a')} --out a.npz")
    assert (single.code, np.load("a.npz")["path"].tolist()) == (0, ["pictures/a/y/x.jpg", "pictures/a/z.png"])
    assert np.allclose(np.load("a.npz")["features"], table["features"][:2], atol=1e-5)
    for command, words in {
        f"{line} --out features.csv": "ends in .npz or .parquet",
        line.replace("pictures", "nowhere"): "'nowhere' is no folder",
        line.replace("predict", "validate"): "belong to moa predict",
    }.items():
        outcome = moa(command)
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err


def test_features_as_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_table(tmp_path / "a.parquet", {"file": np.array(["x", "ü", "z"]), "features": features})
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["file"].to_pylist() == ["x", "ü", "z"]
    assert table["features"].type.list_size == 2
    assert table["features"].to_pylist() == features.tolist()


@pytest.mark.parametrize(
    ("ending", "writer"), [(".npz", "numpy.lib.format.write_array"), (".parquet", "pyarrow.parquet.write_table")]
)
def test_a_table_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, writer: str
) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow.parquet")
    file, columns = tmp_path / f"a{ending}", {"id": np.arange(3)}
    write_table(file, columns)
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(writer, full)
    with pytest.raises(OSError, match="no room"):
        write_table(file, columns)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {file: before}


def test_runs_without_a_name_are_numbered_and_can_be_repeated(moa: Moa) -> None:
    for _ in range(2):
        assert moa(f"{MAE} --trainer.max_steps 1").code == 0
    assert sorted(path.name for path in Path("runs/mae").iterdir()) == ["version_0", "version_1"]
    assert moa("fit -c runs/mae/version_0/config.yaml").code == 0
    assert events("runs/mae/version_2", "train/loss") == events("runs/mae/version_0", "train/loss")


def test_callbacks_of_a_config_join_the_own_ones(moa: Moa) -> None:
    Path("more.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: LearningRateMonitor\n"
        "    - class_path: OnExceptionCheckpoint\n      init_args: {dirpath: run}\n"
    )
    line = f"{MAE} --trainer.max_steps 2 --run_dir run -c more.yaml --trainer.callbacks+ TQDMProgressBar"
    outcome = moa(line)
    assert outcome.code == 0
    assert saved_step("run") == 2  # the ModelCheckpoint is there
    assert Path("run/result.json").exists()  # and Convergence
    assert "tensorboard --logdir run" in outcome.out
    callbacks = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["callbacks"]
    assert len(callbacks) == 3


def test_a_registered_activation_is_an_option(moa: Moa) -> None:
    Path("my_activation.py").write_text(
        "import torch\nfrom moa_lightning import register_activation\nregister_activation('my_sine', torch.sin)\n"
    )
    line = f"{MAE} --trainer.max_steps 1 --run_dir run --model.ffn.activation my_sine --import my_activation"
    outcome = moa(line)
    assert outcome.code == 0
    assert "plain my_sine" in outcome.out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["import"] == ["my_activation"]
    validate = "validate --ckpt_path run/checkpoints/last.ckpt"
    assert "add --import my_activation" in moa(validate).err  # a config alone imports nothing
    assert moa(f"{validate} --import my_activation").code == 0


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_auto_says_what_it_chose(moa: Moa, monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr("moa_lightning.configs.cpu_has_bf16", lambda: has_bf16)
    chosen = "bf16-mixed" if has_bf16 else "32-true"
    line = MAE.replace("--trainer.precision 32-true", "--trainer.precision auto")
    outcome = moa(f"{line} --trainer.max_steps 1 --run_dir run")
    assert f"precision auto is {chosen}" in outcome.out
    assert f"SingleDevice, precision {chosen}" in outcome.out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["precision"] == chosen


@pytest.mark.usefixtures("words")
def test_without_a_word_about_precision_it_is_bfloat16_where_the_processor_has_it(moa: Moa, monkeypatch) -> None:
    monkeypatch.setattr("moa_lightning.configs.cpu_has_bf16", lambda: True)
    large = TEXT.replace("gpt_tiny", "gpt_124m")  # the tiny one asks for float32
    small = "--model.gpt.dim 32 --model.gpt.num_heads 2 --model.compile false --trainer.accumulate_grad_batches 1"
    outcome = moa(f"{large} {small} --data.num_workers 0 --trainer.max_steps 1 --run_dir run")
    assert "SingleDevice, precision bf16-mixed" in outcome.out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


def test_a_trial_run_leaves_nothing(moa: Moa) -> None:
    assert moa(f"{MAE} --trainer.max_steps 3 --trainer.fast_dev_run true").code == 0
    assert list(Path().iterdir()) == []


def test_parts_can_be_switched_off(moa: Moa) -> None:
    off = "--trainer.logger false --trainer.enable_checkpointing false --trainer.enable_progress_bar false"
    outcome = moa(f"{MAE} --trainer.max_steps 2 --run_dir run {off}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "step 1/2" not in outcome.out
    assert Path("run/result.json").exists()
    assert not Path("run/checkpoints").exists()
    assert not list(Path("run").glob("events*"))
