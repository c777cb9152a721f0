"""From the command line: a finished fixed net goes on as MoA, and what is not there is one sentence."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT, Moa

RUN = " --model.gpt.dim 16 --model.gpt.num_heads 2 --trainer.val_check_interval 3 --trainer.log_every_n_steps 1"


def first_loss(run: str) -> float:
    names, first, *_ = (line.split(",") for line in Path(run, "metrics.csv").read_text().splitlines())
    return float(first[names.index("train/loss")])


@pytest.mark.usefixtures("words")
def test_a_finished_net_goes_on_as_moa_from_its_loss(moa: Moa) -> None:
    base = moa(f"{TEXT} {RUN} -c configs/ffn/gelu.yaml --model.optimizer.lr 0.02 --trainer.max_steps 6 --run_dir base")
    assert base.code == 0, base.err
    fits = {
        ffn: f"{TEXT} {RUN} -c configs/ffn/{ffn}.yaml --trainer.max_steps 3 --run_dir {ffn}" for ffn in ("gelu", "moa")
    }
    for fit in fits.values():
        outcome = moa(f"{fit} --model.weights_from base")
        assert outcome.code == 0, outcome.err
        assert "start   weights from base" in outcome.out
    assert first_loss("moa") == pytest.approx(first_loss("gelu"), rel=1e-6)
    assert first_loss("moa") < first_loss("base") - 0.1
    assert json.loads(Path("moa/result.json").read_text())["steps"] == 3
    missing = moa(f"{TEXT} {RUN} --trainer.max_steps 3 --model.weights_from nowhere --run_dir c")
    assert missing.code == 2
    assert "model.weights_from: there is no nowhere" in missing.err
    Path("base").rename("elsewhere")
    assert moa("fit --run_dir moa --ckpt_path last --trainer.max_steps 4").code == 0  # the checkpoint has it all
