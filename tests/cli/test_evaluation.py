"""Evaluation on the command line: the official fine-tuning recipe, and probes of a finished run."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moa_lightning.optim import OptimizerConfig
from moa_lightning.result_files import changed_options, result_name
from tests.cli.conftest import MAE, SMALL, Moa

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
    found = json.loads(Path("run/test-test_fraction-0.02-bank_size-60.json").read_text())["metrics"]
    assert {f"test/{pixels}{name}" for pixels in ("", "pixels_") for name in ("knn20_top1", "probe_top1")} <= set(found)
    assert "raw pixels" in outcome.out
    assert not Path("run/test.json").exists()
    assert "test/feature_rank" in outcome.out

    tuned = moa(
        "fit -c configs/vision/finetune_tiny.yaml -c configs/data/mnist5k.yaml -c configs/trainer/cpu.yaml "
        "--model.backbone_weights run --model.backbone_args.depth 1 --data.batch_size 8 --data.max_val_samples 8 "
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


def pictures(folder: str, *names: str, count: int = 4) -> None:
    for name in names:
        for number in range(count):
            file = Path(folder, name, f"{number}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 44), (60 * number % 256, 10, 90)).save(file)


def test_a_run_is_judged_on_other_data_as_the_net_that_it_is(moa: Moa) -> None:
    """Size, channels, scale of pixels and classes are those of the run, and classes are matched by their names."""
    fit = f"fit -c configs/vision/finetune_tiny.yaml -c configs/data/mnist5k.yaml -c configs/trainer/cpu.yaml {SMALL}"
    assert moa(f"{fit} --trainer.max_steps 1 --trainer.val_check_interval 1 --run_dir run").code == 0
    pictures("shifted/test", "3", "7")
    pictures("shifted/train", "3", "7")
    pictures("strange", "3", "owl")
    checkpoint = "--ckpt_path run/checkpoints/last.ckpt"
    outcome = moa(f"test {checkpoint} --data.source shifted --run_dir judged")
    assert outcome.code == 0, outcome.err
    outcome = moa(f"predict {checkpoint} --data.source shifted --out a.npz")
    assert outcome.code == 0, outcome.err
    labelled = np.load("a.npz")
    assert sorted(labelled["label"]) == [3] * 4 + [7] * 4
    top1 = 100 * (labelled["logits"].argmax(1) == labelled["label"]).mean()
    judged = json.loads(Path("judged/test-source-shifted.json").read_text())
    assert judged["metrics"]["test/top1"] == pytest.approx(top1)
    outcome = moa(f"predict {checkpoint} --folder shifted/test --out b.npz")  # the run's own data are not read
    assert outcome.code == 0, outcome.err
    found = np.load("b.npz")
    assert (found["label"] == -1).all()
    assert np.allclose(found["logits"], labelled["logits"], atol=1e-5)
    for line, words in (
        ("--data.source strange", "the class 'owl', which the run does not know (0, 1, 2"),
        ("--data.source shifted --data.image_size 56", "trained with image_size 28, and data.image_size is 56"),
    ):
        outcome = moa(f"test {checkpoint} {line}")
        assert outcome.code == 2
        assert words in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1


PROBE = "-c configs/evaluation/probe.yaml"


@pytest.mark.parametrize("pruning", ["", "--pruning.sparsity 0.5"])
def test_a_classifier_is_probed_on_classes_that_it_does_not_know(moa: Moa, pruning: str, caplog) -> None:
    fit = f"fit -c configs/vision/finetune_tiny.yaml -c configs/data/mnist5k.yaml -c configs/trainer/cpu.yaml {SMALL}"
    own = "--data.per_class 6 --data.test_fraction 0.01 --data.val_fraction 0.01"
    assert moa(f"{fit} {own} --trainer.max_steps 1 --trainer.val_check_interval 1 {pruning} --run_dir run").code == 0
    for part in ("train", "test"):
        pictures(f"strange/{part}", "3", "owl", count=15)
    test = "test --ckpt_path run/checkpoints/last.ckpt"
    outcome = moa(f"{test} {PROBE} --data.source strange --data.per_class null")
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("run/test-source-strange-bank_size-None-per_class-None.json").read_text())["metrics"]
    names = [f"{pixels}{name}_top1" for pixels in ("", "pixels_") for name in ("knn10", "knn200", "probe")]
    assert {f"test/{name}" for name in names} <= found.keys()
    assert not {"test/top1", "test/loss"} & found.keys()  # of owls it has nothing to say
    assert "the class 'owl', which the run does not know" in caplog.text

    assert moa(f"{test} {PROBE} --data.bank_size 50").code == 0
    assert moa(test).code == 0
    probed, plain = (json.loads(Path(f"run/{name}.json").read_text()) for name in ("test-bank_size-50", "test"))
    assert {f"test/{name}" for name in names} <= probed["metrics"].keys()
    assert plain["metrics"].keys() == {"test/loss", "test/top1", "test/top5"}
    assert plain["metrics"] == pytest.approx({name: probed["metrics"][name] for name in plain["metrics"]}, rel=1e-6)

    outcome = moa("predict --ckpt_path run/checkpoints/last.ckpt --data.source strange --out a.npz")
    assert outcome.code == 0, outcome.err
    assert sorted(np.load("a.npz")["label"]) == [-1] * 15 + [3] * 15
    assert np.load("a.npz")["features"].shape == (30, 128)


def test_a_self_supervised_ticket_is_probed_on_another_source(moa: Moa) -> None:
    """With the command of docs/sparsity.md; without per_class null the run's own choice of images stays in force."""
    assert moa(f"{MAE} --data.per_class 6 --pruning.sparsity 0.5 --trainer.max_steps 1 --run_dir run").code == 0
    for part in ("train", "test"):
        pictures(f"strange/{part}", "hen", "owl", count=15)
    test = f"test --ckpt_path run/checkpoints/last.ckpt {PROBE} --data.source strange"
    outcome = moa(f"{test} --data.per_class null")
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("run/test-source-strange-bank_size-None-per_class-None.json").read_text())["metrics"]
    assert {"test/knn20_top1", "test/probe_top1", "test/pixels_probe_top1"} <= found.keys()
    outcome = moa(f"{test} --data.per_class 16")
    assert (outcome.code, "16" in outcome.err, outcome.err.count("\n")) == (2, True, 1)


def test_a_test_on_other_data_leaves_the_clean_result(moa: Moa) -> None:
    assert moa(f"{MAE} --data.test_fraction 0.02 --trainer.max_steps 1 --run_dir run").code == 0
    test = "test --ckpt_path run/checkpoints/last.ckpt"
    for options in (
        "--data.batch_size 16",
        "--data.corruption fog --data.severity 5",
        "-c configs/evaluation/probe.yaml --data.bank_size 60",
    ):
        assert moa(f"{test} {options}").code == 0
    names = ("test", "test-fog-5", "test-bank_size-60")
    clean, corrupted, probed = (json.loads(Path(f"run/{name}.json").read_text()) for name in names)
    assert clean.keys() == {"metrics"}  # grids judge by this file
    assert not any("probe" in name for name in clean["metrics"])
    assert probed["data"] == {"bank_size": 60}
    assert corrupted["data"] == {"corruption": "fog", "severity": 5}
    assert clean["metrics"]["test/loss"] != corrupted["metrics"]["test/loss"]


def test_the_name_of_a_result_says_what_differs() -> None:
    def name(**changes: object) -> str:
        own = {"class_path": "data.Images", "init_args": {"source": "mnist5k", "mean": [0.5], "severity": 3}}
        used = {"class_path": "data.Images", "init_args": {**own["init_args"], "corruption": None, **changes}}
        return result_name(changed_options(used, own))

    assert name() == name(mean=(0.5,), severity=4, new=1) == "test.json"
    assert name(source="cifar10") == "test-source-cifar10.json"
    assert name(corruption="all", severity=3, mean=(0.1,)) == "test-mean-_0.1_-all-3.json"
    folders = {name(source=f"{place}/images") for place in ("a", "b")}
    assert len(folders) == 2
    assert all(each.startswith("test-source-images-") for each in folders)
    assert len(name(source="x" * 300)) < 100
