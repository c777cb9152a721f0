"""The configs for ImageNet against the numbers of the official recipes, and the nets they build, on the meta device.

MAE: facebookresearch/mae, PRETRAIN.md, main_pretrain.py and models_mae.py. DINO: facebookresearch/dino, main_dino.py
and the arguments of its published models (column "args" of the README's table). DINOv2: facebookresearch/dinov2,
configs/ssl_default_config.yaml and train/vitl16_short.yaml, train/train.py, utils/param_groups.py.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from data import MultiCrop, SingleView
from moa_lightning.configs import compose, load_config
from moa_lightning.optim import OptimizerConfig, learning_rate_factor
from moa_lightning.options import Option
from moa_lightning.planning.fake import NoValues
from moa_lightning.planning.settings import Settings, read_settings
from tests.cli.conftest import Moa, _alone, moa  # noqa: F401 - fixtures

IMAGES = 1_281_167
MAE = {"batch": 4096, "epochs": 800, "warmup_epochs": 40, "lr": 1.5e-4, "min_lr": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "mae_vit_s16": {**MAE, "width": 384, "depth": 12},
    "mae_vit_b16": {**MAE, "width": 768, "depth": 12},
    "mae_vit_l16": {**MAE, "width": 1024, "depth": 24},
    "dino_vit_s16": {
        **{"batch": 16 * 64, "epochs": 800, "warmup_epochs": 10, "lr": 5e-4, "min_lr": 1e-5},
        **{"warmup_teacher_temp_epochs": 30, "freeze_last_layer": 1, "norm_last_layer": False, "clip_grad": 0.0},
        **{"width": 384, "depth": 12},
    },
    "dino_vit_b16": {
        **{"batch": 32 * 32, "epochs": 400, "warmup_epochs": 10, "lr": 7.5e-4, "min_lr": 2e-6},
        **{"warmup_teacher_temp_epochs": 50, "freeze_last_layer": 3, "norm_last_layer": True, "clip_grad": 0.3},
        **{"width": 768, "depth": 12},
    },
}
MAE_TOTALS = {"mae_vit_b16": 111_907_840, "mae_vit_l16": 329_541_888}
"""parameters of mae_vit_base_patch16 and mae_vit_large_patch16, fixed positions among them"""
every_recipe = pytest.mark.parametrize("name", RECIPES)


@cache
def settings(name: str, *data: str) -> Settings:
    fragments = [load_config(f"configs/{path}.yaml") for path in (f"vision/{name}", *data)]
    config = compose(fragments)
    config["trainer"]["precision"] = "bf16-mixed"
    options = [Option("model.image_size", "224"), Option("model.channels", "3")]
    return read_settings(config, options, fragments)


def official_rate(recipe: dict[str, Any], epoch: int) -> float:
    """At the start of an epoch, counted from 0: main_pretrain.py's adjust_learning_rate, main_dino.py's schedule."""
    peak, warmup = recipe["lr"] * recipe["batch"] / 256, recipe["warmup_epochs"]
    if epoch < warmup:
        return peak * epoch / warmup
    half_cosine = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (recipe["epochs"] - warmup)))
    return recipe["min_lr"] + (peak - recipe["min_lr"]) * half_cosine


@every_recipe
def test_the_learning_rate_is_the_official_one_in_every_epoch(name: str) -> None:
    recipe, found = RECIPES[name], settings(name)
    assert found.data.batch_size * found.accumulate == recipe["batch"]
    assert (found.max_epochs, found.max_steps) == (recipe["epochs"], None)
    steps, an_epoch = found.steps(IMAGES), IMAGES // recipe["batch"]
    assert steps == recipe["epochs"] * an_epoch
    config: OptimizerConfig = found.new_task().optimizer_config.of_run(recipe["batch"], steps)
    for epoch in range(recipe["epochs"]):
        ours = config.lr * learning_rate_factor(epoch * an_epoch, steps, config)
        a_step = config.lr / config.warmup_steps  # by which ours is ahead while it rises, see test_schedules.py
        expected = official_rate(recipe, epoch) + (a_step if epoch < recipe["warmup_epochs"] else 0)
        assert ours == pytest.approx(expected, rel=2e-5, abs=1e-12), epoch


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("mae")])
def test_mae_is_the_official_one_otherwise(name: str) -> None:
    found = settings(name)
    task, view = found.new_task(), found.data.transform
    optimizer, h = task.optimizer_config, task.hparams
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas) == ("adamw", 0.05, (0.9, 0.95))
    assert (h["mask_ratio"], h["normalize_pixels"]) == (0.75, True)
    assert (h["decoder_dim"], h["decoder_depth"], h["decoder_heads"]) == (512, 8, 16)
    assert isinstance(view, SingleView)
    assert (tuple(view.scale), view.flip, view.crop) == ((0.2, 1.0), 0.5, True)
    assert found.clip["gradient_clip_val"] is None


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("dino")])
def test_dino_is_the_official_one_otherwise(name: str) -> None:
    recipe, found = RECIPES[name], settings(name)
    task, view = found.new_task(), found.data.transform
    optimizer, h = task.optimizer_config, task.hparams
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas) == ("adamw", 0.04, (0.9, 0.999))
    assert h["final_weight_decay"] == 0.4
    assert (h["out_dim"], h["head_hidden_dim"], h["head_bottleneck_dim"]) == (65536, 2048, 256)
    assert (h["norm_last_layer"], h["drop_path_rate"]) == (recipe["norm_last_layer"], 0.1)
    assert (h["teacher_momentum"], h["center_momentum"], h["student_temperature"]) == (0.996, 0.9, 0.1)
    assert (h["teacher_temperature_start"], h["teacher_temperature"], h["koleo_weight"]) == (0.04, 0.07, 0.0)
    epochs = recipe["epochs"]
    assert h["teacher_temperature_warmup"] * epochs == pytest.approx(recipe["warmup_teacher_temp_epochs"] - 1)
    assert h["freeze_last_layer"] * epochs == pytest.approx(recipe["freeze_last_layer"])
    assert (found.clip["gradient_clip_val"] or 0.0) == recipe["clip_grad"]
    assert h["clip_per_parameter"] or not recipe["clip_grad"]
    assert isinstance(view, MultiCrop)
    assert (view.local_crops, view.local_size) == (10, 96)
    assert (tuple(view.global_scale), tuple(view.local_scale)) == ((0.25, 1.0), (0.05, 0.25))
    assert (view.flip, view.jitter, view.grayscale, view.solarize) == (0.5, 0.8, 0.2, 0.2)
    assert (tuple(view.blur), tuple(view.blur_sigma)) == ((1.0, 0.1, 0.5), (0.1, 2.0))


def test_dinov2_is_the_official_one() -> None:
    """The schedules are counted in epochs of 1,250 steps, not in passes over the images."""
    found, epochs, base_lr = settings("dinov2_vit_l16"), 100, 0.004
    task, view = found.new_task(), found.data.transform
    optimizer, h = task.optimizer_config.of_run(2048, 125_000), task.hparams
    assert (found.data.batch_size * found.accumulate, found.max_steps) == (32 * 64, epochs * 1250)
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas) == ("adamw", 0.04, (0.9, 0.999))
    peak = base_lr * math.sqrt(2048 / 1024)
    for epoch in range(epochs):
        ours = optimizer.lr * learning_rate_factor(epoch * 1250, epochs * 1250, optimizer)
        half_cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (epochs - 10)))
        expected = peak * (epoch + 1 / 1250) / 10 if epoch < 10 else 1e-6 + (peak - 1e-6) * half_cosine
        assert ours == pytest.approx(expected, rel=2e-5), epoch
    assert h["final_weight_decay"] == 0.4
    assert (h["out_dim"], h["head_hidden_dim"], h["head_bottleneck_dim"]) == (65536, 2048, 256)
    assert (h["norm_last_layer"], h["drop_path_rate"], h["backbone_args"]) == (False, 0.3, {"init_values": 1e-5})
    assert (h["teacher_momentum"], h["center_momentum"], h["student_temperature"]) == (0.992, 0.9, 0.1)
    assert (h["teacher_temperature_start"], h["teacher_temperature"], h["koleo_weight"]) == (0.04, 0.07, 0.1)
    assert h["teacher_temperature_warmup"] * epochs == pytest.approx(30)
    assert h["freeze_last_layer"] * epochs == pytest.approx(1)
    assert (h["centering"], h["layer_decay"], h["patch_embed_rate"]) == ("mean", 0.9, 0.2)
    masked = task.ibot
    assert (masked.weight, masked.mask_probability, tuple(masked.mask_ratio)) == (1.0, 0.5, (0.1, 0.5))
    assert masked.out_dim is None
    assert found.clip["gradient_clip_val"] == 3.0
    assert (view.local_crops, view.local_size) == (8, 96)
    assert (tuple(view.global_scale), tuple(view.local_scale)) == ((0.32, 1.0), (0.05, 0.32))
    assert (view.flip, view.jitter, view.grayscale, view.solarize) == (0.5, 0.8, 0.2, 0.2)
    assert (tuple(view.blur), tuple(view.blur_sigma)) == ((1.0, 0.1, 0.5), (0.1, 2.0))


def test_dinov2_has_the_official_net_and_rates() -> None:
    task = settings("dinov2_vit_l16").new_task()
    with torch.device("meta"), NoValues():
        task.net = net = task.build(0)
    scales, head = 24 * 2 * 1024, (1024 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256 + 256 * 65536 + 65536
    assert count(net.teacher.backbone) == encoder_parameters(1024, 24) + scales
    assert count(net, trained=True) == encoder_parameters(1024, 24) + scales + head + 1024  # the mask token
    rates = task.learning_rates()
    assert rates.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    backbone, official = (
        "student.backbone.",
        {
            "patch_embed.proj.weight": 0.2 * 0.9**25,
            "cls_token": 0.9**25,
            "pos_embed": 0.9**25,
            "blocks.0.attn.qkv.weight": 0.9**24,
            "blocks.9.ls1.gamma": 0.9**15,
            "blocks.23.norm2.bias": 0.9,
            "norm.weight": 1.0,
        },
    )
    for name, rate in official.items():
        assert rates[backbone + name] == pytest.approx(rate, rel=1e-12), name
    assert rates["mask_token"] == pytest.approx(0.9**25, rel=1e-12)
    assert rates["student.head.mlp.0.weight"] == rates["student.head.last_layer.norm"] == 1.0


@pytest.mark.parametrize("place", ["data/imagenet_shards", "data/imagenet_folder"])
def test_imagenet_is_evaluated_as_usual(place: str) -> None:
    """The shorter side resized to 256 pixels, the centre 224 x 224, and the statistics of the official code."""
    data = settings("mae_vit_b16", place).data
    assert (data.image_size, round(data.image_size / data.crop_ratio)) == (224, 256)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert data.max_val_samples == 10000  # while pre-training goes on; a fine-tuned net is judged by all 50,000
    assert settings("finetune_vit_b16", place).data.max_val_samples is None


def encoder_parameters(width: int, depth: int) -> int:
    """Of a ViT/16 for 224 pixels with a class token, positions and a last norm, without a classifier."""
    block = 12 * width**2 + 13 * width  # qkv, projection and MLP with biases, two norms
    return 16 * 16 * 3 * width + width + width + 197 * width + depth * block + 2 * width


def count(module: nn.Module, trained: bool | None = None) -> int:
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad is trained)


@every_recipe
def test_the_nets_have_the_official_numbers_of_parameters(name: str) -> None:
    recipe = RECIPES[name]
    task = settings(name).new_task()
    with torch.device("meta"), NoValues():
        net: Any = task.build(0)
        theirs = timm.create_model(task.hparams["backbone"], num_classes=0)
    vit = encoder_parameters(recipe["width"], recipe["depth"])
    assert all(p.is_meta for p in net.parameters())
    if name.startswith("mae"):
        positions = 197 * recipe["width"]
        decoder = encoder_parameters(512, 8) - (16 * 16 * 3 + 1) * 512 - 197 * 512  # its mask token as a class token
        ends = (recipe["width"] + 1) * 512 + (512 + 1) * 16 * 16 * 3
        assert count(net.encoder) == count(theirs) == vit
        assert count(net, trained=True) == vit - positions + decoder + ends
        if name in MAE_TOTALS:
            assert count(net) + 197 * 512 == MAE_TOTALS[name]  # the positions of the decoder, a buffer here
    else:
        width = recipe["width"]
        head = (width + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256 + 256 * 65536
        norms = 0 if recipe["norm_last_layer"] else 65536
        assert count(net.teacher.backbone) == count(net.student.backbone) == count(theirs) == vit
        assert count(net.student, trained=True) == vit + head + norms
        assert count(net.teacher, trained=True) == 0


@pytest.mark.parametrize(("name", "devices"), [("mae_vit_l16", 64), ("dino_vit_b16", 16)])
def test_a_plan_of_the_real_run(moa: Moa, name: str, devices: int) -> None:  # noqa: F811
    files = f"-c configs/vision/{name}.yaml -c configs/data/imagenet_shards.yaml -c configs/trainer/ddp.yaml"
    outcome = moa(f"plan {files} --device h100 --devices {devices} --train_samples {IMAGES} --json")
    assert (outcome.code, outcome.err) == (0, "")
    plan, recipe = json.loads(outcome.out), RECIPES[name]
    assert plan["steps"] == recipe["epochs"] * (IMAGES // recipe["batch"])
    assert plan["samples"] == plan["steps"] * recipe["batch"]
    assert plan["plans"][0]["fits"]
    assert list(Path().iterdir()) == []
