"""Evaluation on the command line: the official fine-tuning recipe, and probes of a finished run."""

import json
from pathlib import Path

import pytest
import yaml

from moa_lightning.optim import OptimizerConfig
from tests.cli.conftest import MAE, Moa

DATA = "-c configs/data/imagenet_folder.yaml --data.source x -c configs/trainer/cpu.yaml"


def test_the_fine_tuning_of_vit_b_is_the_official_one(moa: Moa) -> None:
    """facebookresearch/mae, FINETUNE.md and the defaults of main_finetune.py; steps of drop_last epochs."""
    config = yaml.safe_load(moa(f"fit -c configs/vision/finetune_vit_b16.yaml {DATA} --print_config").out)
    model, trainer, images = (config[key] for key in ("model", "trainer", "data"))
    expected = {
        "backbone": "vit_base_patch16_224",
        "pool": "avg",
        "drop_path_rate": 0.1,
        "layer_decay": 0.65,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "random_erasing": 0.25,
    }
    assert {name: model["init_args"][name] for name in expected} == expected
    optimizer = model["init_args"]["optimizer"]
    batch = images["init_args"]["batch_size"]
    assert batch == 32 * 32
    run = OptimizerConfig(**optimizer).of_run(batch, 100 * (1_281_167 // batch))
    assert run.lr == pytest.approx(5e-4 * batch / 256)
    assert run.warmup_steps == 5 * (1_281_167 // batch)
    assert run.lr * run.final_lr_factor == pytest.approx(1e-6)
    assert (optimizer["name"], optimizer["schedule"], optimizer["weight_decay"]) == ("adamw", "cosine", 0.05)
    assert (optimizer["betas"], optimizer["eps"]) == ([0.9, 0.999], 1e-8)
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (100, None)
    view = images["init_args"]["transform"]
    assert view["class_path"] == "data.RandAugment"
    assert view["init_args"] == {"policy": "rand-m9-mstd0.5-inc1", "scale": [0.08, 1.0], "flip": 0.5}
    assert 224 / images["init_args"]["crop_ratio"] == 256


def test_a_run_is_probed_and_fine_tuned(moa: Moa) -> None:
    """moa test lays a file without a model over the run's own settings; the encoder goes on in another task."""
    assert moa(f"{MAE} --trainer.max_steps 3 --run_dir run").code == 0
    last = "run/checkpoints/last.ckpt"
    options = "--data.bank_size 60 --data.test_fraction 0.02"
    outcome = moa(f"test --ckpt_path {last} -c configs/evaluation/probe.yaml {options}")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(Path("run/test.json").read_text())["metrics"]
    assert {f"test/{pixels}{name}" for pixels in ("", "pixels_") for name in ("knn20_top1", "probe_top1")} <= set(found)
    assert "raw pixels" in outcome.out
    assert "test/feature_rank" in outcome.out

    tuned = moa(
        f"fit -c configs/vision/finetune_tiny.yaml -c configs/data/mnist5k.yaml -c configs/trainer/cpu.yaml "
        f"--model.backbone_weights {last} --model.backbone_args.depth 1 --data.batch_size 8 --data.max_val_samples 8 "
        "--trainer.max_steps 2 --run_dir tuned"
    )
    assert (tuned.code, tuned.err) == (0, "")
    assert {"val/loss", "val/top1", "val/top5"} <= set(json.loads(Path("tuned/result.json").read_text())["metrics"])
    assert "val/top5" in tuned.out


def test_a_fine_tuning_with_mistakes_says_them(moa: Moa) -> None:
    vision = "-c configs/vision/finetune_tiny.yaml -c configs/trainer/cpu.yaml"
    text = moa("fit --model ImageClassification -c configs/data/stdlib.yaml --trainer.max_steps 1")
    assert text.code == 2
    assert "trains on images" in text.err
    missing = moa(
        f"fit {vision} -c configs/data/mnist5k.yaml --model.backbone_weights nowhere.ckpt --trainer.max_steps 1"
    )
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "nowhere.ckpt" in missing.err
