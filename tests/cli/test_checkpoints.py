"""Which checkpoints a run leaves, and that a run goes on whatever became of its folder."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import MAE, Moa


def names(run: str = "run") -> list[str]:
    return sorted(path.name for path in Path(run, "checkpoints").iterdir())


def test_the_latest_one_is_kept_and_last_links_to_it(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 5").code == 0
    assert names() == ["last.ckpt", "step0000005.ckpt"]
    assert os.readlink("run/checkpoints/last.ckpt") == "step0000005.ckpt"


def test_the_latest_ones_and_the_best_are_kept_over_a_resume(moa: Moa) -> None:
    line = f"{MAE} --run_dir run --trainer.val_check_interval 1 --checkpoint.monitor val/loss --checkpoint.mode max"
    assert moa(f"{line} --checkpoint.keep_last 2 --trainer.max_steps 4").code == 0
    assert names() == ["last.ckpt", "step0000001.ckpt", "step0000003.ckpt", "step0000004.ckpt"]  # the loss falls
    assert moa(f"{line} --checkpoint.keep_last 2 --trainer.max_steps 6 --ckpt_path last").code == 0
    assert names() == ["last.ckpt", "step0000001.ckpt", "step0000005.ckpt", "step0000006.ckpt"]


def test_all_are_kept_where_asked(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 7 --checkpoint.save_top_k -1").code == 0
    assert names() == ["last.ckpt", "step0000003.ckpt", "step0000006.ckpt", "step0000007.ckpt"]


def test_auto_begins_then_goes_on_then_finds_nothing_to_do(moa: Moa) -> None:
    line = f"{MAE} --run_dir run --ckpt_path auto"
    assert moa(f"{line} --trainer.max_steps 3").code == 0
    outcome = moa(f"{line} --trainer.max_steps 5")
    assert (outcome.code, "going on after step 3" in outcome.out) == (0, True)
    assert "nothing to do" in moa(f"{line} --trainer.max_steps 5").out
    assert json.loads(Path("run/result.json").read_text())["steps"] == 5


def test_auto_begins_anew_after_an_attempt_that_saved_nothing(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 2").code == 0
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    assert moa("fit --run_dir run --ckpt_path auto --trainer.max_steps 3").code == 0  # the config of the attempt
    assert len([*Path("run").glob("events.out.tfevents.*")]) == 1
    assert [line.split(",")[0] for line in Path("run/metrics.csv").read_text().splitlines()[1:4]] == ["1", "2", "3"]


HOLDER = "import sys; from pathlib import Path; from moa_lightning.run_folder import FolderLock\n"
HOLDER += "lock = FolderLock(Path('run')); print('held', flush=True); sys.stdin.read()"


def test_a_second_run_into_a_folder_in_use_is_refused(moa: Moa) -> None:
    assert moa(f"{MAE} --run_dir run --trainer.max_steps 2").code == 0
    gc.collect()  # the lock lives as long as the fit's objects, which refer to each other
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        outcome = moa(f"{MAE} --run_dir run --ckpt_path last --trainer.max_steps 3")
        assert (outcome.code, outcome.err) == (
            2,
            "moa: another process is training into 'run'; choose another --run_dir\n",
        )
        holder.communicate()
    assert moa(f"{MAE} --run_dir run --ckpt_path last --trainer.max_steps 3").code == 0


def test_a_checkpoint_plugin_of_the_users_own_is_refused(moa: Moa) -> None:
    plugin = "lightning.pytorch.plugins.io.TorchCheckpointIO"
    outcome = moa(f"{MAE} --run_dir run --trainer.max_steps 2 --trainer.plugins+ {plugin}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_a_run_does_not_finish_without_its_last_checkpoint(moa: Moa, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moa_lightning.checkpoints._save", full)
    outcome = moa(f"{MAE} --run_dir run --trainer.max_steps 2")
    assert outcome.code == 2
    assert "could not be written (No space left on device)" in outcome.err
    assert not Path("run/result.json").exists()
