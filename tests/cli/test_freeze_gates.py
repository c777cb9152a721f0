"""`moa validate --freeze_gates`: the trained result beside that with averaged gates, and LA begun at a run's means."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from moa_lightning.controls import read_means
from tests.cli.conftest import MAE, TEXT, Moa

RUN = " --model.gpt.dim 16 --model.gpt.num_heads 2 --trainer.max_steps 6 --trainer.val_check_interval 3"

VISION_METRICS = {"val/loss", "val/knn_top1", "val/feature_rank", "val/feature_spread"}


@pytest.mark.usefixtures("words")
def test_validation_with_averaged_gates_stands_beside_the_trained_one(moa: Moa) -> None:
    trained = moa(f"{TEXT} {RUN} -c configs/ffn/moa.yaml --model.optimizer.lr 0.05 --run_dir moa")
    assert trained.code == 0, trained.err
    before = torch.load("moa/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    outcome = moa("validate --ckpt_path moa/checkpoints/last.ckpt --freeze_gates 3")
    assert outcome.code == 0, outcome.err
    assert "held at their mean over 3 training batches" in outcome.out
    found = json.loads(Path("moa/held_gates.json").read_text())
    result = json.loads(Path("moa/result.json").read_text())["metrics"]["val/loss"]
    assert found["trained"]["val/loss"] == pytest.approx(result, rel=1e-5)
    assert found["held"]["val/loss"] != found["trained"]["val/loss"]
    assert found["held"]["val/loss"] == pytest.approx(result, rel=0.2)
    after = torch.load("moa/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)

    report = moa("report moa")
    assert report.code == 0, report.err
    page = Path("moa/report.html").read_text()
    for words_ in ("What the mix learned", "Gate entropy of each layer at step 6", "keywords", "gates held", "⟦"):
        assert words_ in page, words_

    la = f"{TEXT} {RUN} -c configs/ffn/la.yaml --run_dir la --model.ffn.base held --model.ffn.start_from"
    outcome = moa(f"{la} moa")
    assert outcome.code == 0, outcome.err
    state = torch.load("la/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    for name, mean in read_means(Path("moa/mixing.json")).items():
        torch.testing.assert_close(state[f"net.{name}.base"], mean.float())
    assert yaml.safe_load(Path("la/config.yaml").read_text())["model"]["init_args"]["ffn"]["start_from"] == "moa"
    Path("moa").rename("elsewhere")
    assert moa("validate --ckpt_path la/checkpoints/last.ckpt").code == 0  # the checkpoint has its values
    longer = "fit --run_dir la --ckpt_path last --trainer.max_steps 8"
    assert moa(longer).code == 0
    outcome = moa(f"{la.replace('--run_dir la', '--run_dir other')} moa")
    assert outcome.code == 2
    assert "moa/mixing.json" in outcome.err


def test_vision_has_averaged_gates_in_encoder_and_decoder(moa: Moa) -> None:
    options = "--model.backbone_args.embed_dim 16 --model.backbone_args.num_heads 2 --trainer.max_steps 3"
    assert moa(f"{MAE} {options} -c configs/ffn/moa.yaml --run_dir moa").code == 0
    outcome = moa("validate --ckpt_path moa/checkpoints/last.ckpt --freeze_gates 2")
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("moa/held_gates.json").read_text())
    assert set(found["trained"]) == set(found["held"]) == VISION_METRICS
    layers = json.loads(Path("moa/mixing.json").read_text())["layers"].values()
    assert {layer["module"].split(".")[0] for layer in layers} == {"encoder", "decoder"}
    assert all({"background", "foreground"} == set(layer["entropy_by_class"]) for layer in layers)
    assert list(Path("moa/pictures").glob("mixing-patches-step000003.png"))


@pytest.mark.usefixtures("words")
def test_averaging_what_is_no_mix_is_refused(moa: Moa) -> None:
    assert moa(f"{TEXT} {RUN} -c configs/ffn/gelu.yaml --run_dir gelu").code == 0
    outcome = moa("validate --ckpt_path gelu/checkpoints/last.ckpt --freeze_gates 1")
    assert outcome.code == 2
    assert "no learned mix" in outcome.err
    outcome = moa(f"{TEXT} {RUN} --freeze_gates 1")
    assert outcome.code == 2
    assert "moa validate" in outcome.err
