"""DINO with DINOv2's parts: the whole loss from the net's outputs in NumPy, what is logged, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from moa_lightning.errors import UserError
from moa_lightning.losses import koleo_loss
from moa_lightning.masking import IBOTConfig
from tasks import DINO
from tests.tasks.conftest import data_for, task

OWN = IBOTConfig(weight=2.0, mask_probability=0.7, out_dim=24, hidden_dim=16, bottleneck_dim=8)


def built(**options: Any) -> tuple[DINO, dict[str, Any], dict[str, float]]:
    """A task outside of a Trainer, a batch as it reaches a training step, and the dictionary that it logs into."""
    model: Any = task("dino", seed=0, image_size=28, channels=1, **options)
    module = data_for("dino", None)
    module.setup()
    model.configure_model()
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    model.teacher_temperature = lambda: 0.05
    batch = next(iter(module.train_dataloader()))
    return model, model.on_before_batch_transfer(batch, 0), logged


def cross_entropy(q: np.ndarray, student: torch.Tensor) -> np.ndarray:
    s = student.detach().double().numpy() / 0.1
    return -(q * (s - np.log(np.exp(s).sum(-1, keepdims=True)))).sum(-1)


def targets(teacher: torch.Tensor) -> np.ndarray:
    """With a centre of zero, as in a first step."""
    e = np.exp(teacher.double().numpy() / 0.05)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("ibot", [OWN, IBOTConfig()], ids=["own head", "shared head"])
def test_the_loss_is_the_weighted_sum_of_its_parts(ibot: IBOTConfig) -> None:
    model, batch, logged = built(ibot=ibot, koleo_weight=0.5)
    loss = model.training_step(batch, 0)
    assert model.patch_loss.center.abs().max() == 0, "it moves with the optimiser's step"
    model.patch_loss.move_center()
    found = model.net.masked(batch["views"], batch["mask"], batch["masked"])
    student, q = found.student.unflatten(0, (4, 16)), targets(found.teacher).reshape(2, 16, -1)
    pairs = [(t, c) for t in range(2) for c in range(4) if t != c]
    dino = np.mean([cross_entropy(q[t], student[c]).mean() for t, c in pairs])
    owner = torch.arange(32).repeat_interleave(16)[batch["mask"].flatten()].numpy()  # the crop of each hidden patch
    patches = cross_entropy(targets(found.teacher_patches), found.student_patches)
    masked = set(owner.tolist())
    assert 8 <= len(masked) < 32
    patch_loss = sum(patches[owner == crop].mean() for crop in masked) / 32
    features = [model._student_features[crop * 16 : crop * 16 + 16] for crop in range(2)]
    koleo = float(sum(koleo_loss(crop) for crop in features))
    names = ("loss", "dino", "ibot", "koleo", "teacher_entropy", "prototype_entropy")
    assert logged.keys() == {f"train/{name}" for name in names}
    assert logged["train/dino"] == pytest.approx(dino, rel=1e-5)
    assert logged["train/ibot"] == pytest.approx(patch_loss, rel=1e-5)
    assert logged["train/koleo"] == pytest.approx(koleo, rel=1e-5)
    assert loss.item() == pytest.approx(dino + ibot.weight * patch_loss + 0.5 * koleo, rel=1e-5)
    centre = 0.1 * found.teacher_patches.mean(0)
    assert torch.allclose(model.patch_loss.center[0], centre, atol=1e-6)
    assert model.train_features.shape == (16, 32)
    with torch.no_grad():
        teacher = model.net.teacher.backbone(batch["views"][0])
    assert torch.allclose(model.train_features, teacher, atol=1e-5), "the first global crop's, as without masks"


def test_without_the_option_nothing_is_drawn_and_no_parts_are_logged() -> None:
    model, batch, logged = built()
    model.training_step(batch, 0)
    assert logged.keys() == {"train/loss", "train/teacher_entropy", "train/prototype_entropy"}
    assert not {"mask", "masked"} & batch.keys()
    assert model.net.mask_token is None
    assert not [name for name in model.state_dict() if "patch" in name and "patch_embed" not in name]


def test_the_last_layers_of_both_heads_stand_still_at_first() -> None:
    model, batch, _ = built(ibot=OWN, final_weight_decay=None)
    model.training_step(batch, 0).backward()
    trained = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    type(model).progress, before = 0.0, DINO.progress
    try:
        model.on_before_optimizer_step(torch.optim.SGD(trained.values(), 0.1))
    finally:
        type(model).progress = before
    assert [name for name, p in trained.items() if p.grad is None] == [
        "student.head.last_layer.weight",
        "student.patch_head.last_layer.weight",
    ]


def test_a_centring_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="'median'; choose from mean, sinkhorn_knopp"):
        task("dino", centering="median")
