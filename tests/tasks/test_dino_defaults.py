"""What DINO chooses where an option is left open, and KoLeo in its loss."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moa_lightning.callbacks.report import RunReport
from moa_lightning.errors import UserError
from moa_lightning.losses import koleo_loss
from moa_lightning.matching import check_share
from tasks import DINO
from tasks.dino import default_momentum, default_out_dim
from tests.tasks.conftest import VIT, data_for, task, trainer


@pytest.mark.parametrize(
    ("images", "prototypes"), [(1, 256), (3_500, 256), (60_000, 4096), (1_281_167, 65536), (10**9, 65536)]
)
def test_prototypes_are_one_for_twenty_images(images: int, prototypes: int) -> None:
    assert default_out_dim(images) == prototypes


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.9), (400, 0.95), (5_000, 0.996), (125_000, 0.996)])
def test_the_teacher_averages_over_a_twentieth_of_the_run(steps: int, momentum: float) -> None:
    assert default_momentum(steps) == pytest.approx(momentum)


def test_open_options_are_chosen_said_and_kept_in_the_checkpoint(text, tmp_path) -> None:
    """A bare DINO fits what it is given: nothing of the recipe for ImageNet is left."""
    small = {"head_hidden_dim": 32, "head_bottleneck_dim": 16}
    model = DINO("vit_tiny_patch16_224", VIT, **small)
    shown = io.StringIO()
    run = trainer(8, tmp_path, callbacks=[RunReport(None, [], console=Console(file=shown, soft_wrap=True))])
    run.fit(model, datamodule=data_for("dino", text))
    chosen = "chosen  out_dim 256, teacher_momentum 0.9, teacher_temperature 0.04, warmup_steps 1 to fit data and steps"
    assert chosen in shown.getvalue()
    assert model.loss.center.shape == (1, 256)
    assert model.teacher_temperature() == pytest.approx(0.04)
    run.save_checkpoint(tmp_path / "task.ckpt")
    loaded = DINO.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    assert loaded.hparams["out_dim"] == 256
    assert torch.equal(loaded.loss.center, model.loss.center)


def test_without_data_the_number_of_prototypes_must_be_given() -> None:
    with pytest.raises(UserError, match="out_dim is open"):
        task("dino", out_dim=None, image_size=28, channels=1).configure_model()


def test_koleo_is_added_for_the_students_global_crops(text, tmp_path) -> None:
    losses, model = {}, None
    for weight in (0.0, 0.5):
        model = task("dino", seed=0, koleo_weight=weight)
        trainer(1, tmp_path, limit_val_batches=0, limit_train_batches=1).fit(model, datamodule=data_for("dino", text))
        batch = next(iter(model.trainer.datamodule.train_dataloader()))
        fresh = task("dino", seed=0, koleo_weight=weight, image_size=28, channels=1)
        fresh.configure_model()
        fresh.log = lambda *args, **kwargs: None
        fresh.teacher_temperature = lambda: 0.04
        losses[weight] = fresh.training_step(batch, 0)
        features = [fresh.net.student.backbone(view) for view in batch["views"][:2]]
        assert fresh._student_features is None
    expected = 0.5 * sum(koleo_loss(crop) for crop in features)
    assert (losses[0.5] - losses[0.0]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_was_left_open_is_taken_from_the_run_that_is_judged(tmp_path: Path) -> None:
    model, module = task("dino", out_dim=None, seed=0), data_for("dino", tmp_path)
    assert model.fill_open({"out_dim": 64, "image_size": 28, "drop_path_rate": 0.5})["out_dim"] == 64
    trainer(1, tmp_path).validate(model, datamodule=module, verbose=False)
    assert model.net.student.head.last_layer.out_features == 64
    assert model.hparams["drop_path_rate"] == 0.0


def test_a_teacher_in_bfloat16_is_refused_for_training_only(tmp_path: Path) -> None:
    for judge in (False, True):
        model, run = task("dino", seed=0), trainer(1, tmp_path, precision="bf16-true", limit_val_batches=1)
        if judge:
            run.validate(model, datamodule=data_for("dino", tmp_path), verbose=False)
        else:
            with pytest.raises(UserError, match=r"set trainer\.precision to bf16-mixed"):
                run.fit(model, datamodule=data_for("dino", tmp_path))


def test_koleo_needs_two_images_a_process() -> None:
    model, module = task("dino", koleo_weight=0.1), data_for("dino", Path())  # 16 a batch
    check_share(model, module, 8)
    check_share(task("dino"), module, 16)
    with pytest.raises(UserError, match="leaves no two"):
        check_share(model, module, 16)


def test_a_diverged_net_is_drawn_without_the_colours_of_its_patches(tmp_path: Path) -> None:
    model, module, run = task("dino", seed=0), data_for("dino", tmp_path), trainer(1, tmp_path)
    run.fit(model, datamodule=module)
    batch = next(iter(module.val_dataloader()[1]))
    model.trainer = run
    assert "patches" in model.pictures(batch)
    model.net.teacher.backbone.patch_embed.proj.bias.data[0] = torch.nan
    assert "patches" not in model.pictures(batch)
