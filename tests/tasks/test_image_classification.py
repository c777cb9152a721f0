"""Fine-tuning: what is trained on, what is measured, where it starts, and that it goes on exactly."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import data
from moa_lightning.errors import UserError
from moa_lightning.optim import OptimizerConfig, net_weights
from tasks import ImageClassification
from tests.models.nets import fragment
from tests.tasks.conftest import VIT, data_for, task, trainer
from tests.tasks.recorder import Recorder

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "random_erasing": 0.0, "drop_path_rate": 0.0}


def classification(ffn: str = "moa", **options: Any) -> ImageClassification:
    optimizer = options.pop("optimizer", OptimizerConfig(lr=5e-3, warmup_steps=2))
    return ImageClassification("vit_tiny_patch16_224", VIT, fragment(ffn), optimizer=optimizer, **options)


def digits(**options: Any) -> data.Images:
    shown = data.SingleView(scale=(0.8, 1.0), flip=0.0)
    return data.Images("mnist5k", transform=shown, **{"batch_size": 16, "max_val_samples": 40, **options})


def test_it_learns_and_measures_what_its_logits_say(tmp_path: Path) -> None:
    model, module, recorder = classification(layer_decay=1.0, **PLAIN), digits(batch_size=64), Recorder()
    run = trainer(40, tmp_path, callbacks=[recorder], limit_train_batches=40)
    run.fit(model, datamodule=module)
    assert sum(recorder.losses[-5:]) < 0.9 * sum(recorder.losses[:5])
    (query,) = module.val_dataloader()  # no bank of training images is read
    model.eval()
    with torch.no_grad():
        logits, labels = zip(*((model(batch["image"]), batch["label"]) for batch in query), strict=True)
    logits, labels = torch.cat(logits).double(), torch.cat(labels)
    assert len(labels) == 40
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {
        "val/loss": float(-logits.log_softmax(-1).gather(1, labels[:, None]).mean()),
        "val/top1": 100 * float((ranks < 1).double().mean()),
        "val/top5": 100 * float((ranks < 5).double().mean()),
    }
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["val/top5"] > expected["val/top1"]

    run.test(model, datamodule=module, verbose=False)
    assert {name for name in run.callback_metrics if name.startswith("test/")} == {
        "test/loss",
        "test/top1",
        "test/top5",
    }
    answers = run.predict(model, datamodule=module)[0]
    assert answers["logits"].shape == (64, 10)
    run.save_checkpoint(tmp_path / "task.ckpt")
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True).eval()
    images = next(iter(module.test_dataloader()[0]))["image"]
    with torch.no_grad():
        assert torch.allclose(loaded(images), answers["logits"], atol=1e-5)
        assert torch.allclose(loaded.net.vit.head(answers["features"]), answers["logits"], atol=1e-5)


def built(**options: Any) -> ImageClassification:
    model = classification(image_size=28, channels=1, num_classes=10, seed=0, **options)
    model.configure_model()
    return model


def test_the_loss_is_cross_entropy_with_smoothed_or_mixed_targets() -> None:
    logits, labels = torch.randn(6, 10), torch.arange(6)
    plain, smooth = built(**PLAIN), built(**{**PLAIN, "label_smoothing": 0.1})
    assert torch.allclose(plain.loss(logits, labels), F.cross_entropy(logits, labels))
    assert torch.allclose(smooth.loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    images = torch.randn(6, 1, 28, 28)
    assert smooth.regularised(images, labels) == (images, labels)

    mixed = built(**{**PLAIN, "mixup": 0.8, "label_smoothing": 0.1})
    mixed.on_train_batch_start(None, 0)
    shown, targets = mixed.regularised(images, labels)
    share = float((shown[0] - images[5]).flatten() @ (images[0] - images[5]).flatten()) / float(
        (images[0] - images[5]).square().sum()
    )
    assert 0 < share < 1
    assert torch.allclose(shown, share * images + (1 - share) * images.flip(0), atol=1e-5)
    one_hot = 0.9 * F.one_hot(labels, 10) + 0.01
    assert torch.allclose(targets, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-5)
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(mixed.loss(logits, targets), expected)

    cut = built(**{**PLAIN, "cutmix": 1.0})
    cut.on_train_batch_start(None, 0)
    shown, targets = cut.regularised(images, labels)
    own = (shown == images)[0, 0].double().mean()
    assert torch.equal(shown == images, shown != images.flip(0))
    assert float(targets[0, 0]) == pytest.approx(float(own), abs=1e-6)


def test_erasing_turns_a_rectangle_of_some_images_into_noise() -> None:
    model, images = built(**{**PLAIN, "random_erasing": 0.5}), torch.zeros(64, 1, 28, 28)
    model.on_train_batch_start(None, 0)
    shown, _ = model.regularised(images, torch.zeros(64, dtype=torch.long))
    assert not images.any()  # the batch itself is left alone
    erased = shown.flatten(1).any(1)
    assert 20 < int(erased.sum()) < 44
    for image in shown[erased, 0]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 0).all()
        assert 0.01 < box.numel() / 784 < 0.35
    assert 0.9 < float(shown[shown != 0].std()) < 1.1


class Rates(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        names = {id(p): name for name, p in pl_module.net.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.rates = {names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}
        self.decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_each_layer_learns_at_a_share_of_the_rate_above(tmp_path: Path) -> None:
    model, rates = classification("moa", layer_decay=0.5, **PLAIN), Rates()
    run = trainer(1, tmp_path, callbacks=[rates], limit_train_batches=1, limit_val_batches=0)
    run.fit(model, datamodule=digits())
    expected = {
        "vit.head.weight": 1,
        "vit.fc_norm.bias": 1,
        "vit.blocks.1.attn.qkv.weight": 0.5,
        "vit.blocks.1.mlp.up_mix.base": 0.5,
        "vit.blocks.0.mlp.up_proj.weight": 0.25,
        "vit.pos_embed": 0.125,
        "vit.patch_embed.proj.weight": 0.125,
    }
    assert {name: rates.rates[name] / 5e-3 for name in expected} == pytest.approx(expected)
    assert len(rates.rates) == len(list(model.net.parameters()))
    assert rates.decays["vit.head.weight"] == 0.1
    assert {rates.decays[name] for name in ("vit.blocks.1.mlp.up_mix.base", "vit.pos_embed", "vit.head.bias")} == {0.0}


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_it_starts_from_a_run_and_goes_on_without_it(kind: str, tmp_path: Path) -> None:
    pretrained = task(kind, "gelu")
    run = trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(pretrained, datamodule=data_for(kind, tmp_path))
    path = tmp_path / "pretrained.ckpt"
    run.save_checkpoint(path)
    model = classification("moa", backbone_weights=str(path), **PLAIN)  # a fixed activation goes on as MoA
    run = trainer(1, tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(model, datamodule=digits())
    start, encoder = model.net.vit.state_dict(), pretrained.evaluated_backbone().state_dict()
    same = [name for name in encoder if name.startswith(("blocks", "patch", "pos", "cls"))]
    assert len(same) > 20
    assert all(torch.equal(start[name], encoder[name]) for name in same)
    run.save_checkpoint(tmp_path / "tuned.ckpt")
    path.unlink()
    ImageClassification.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True).configure_model()
    with pytest.raises(UserError, match=r"model\.backbone_weights: there is no .*pretrained\.ckpt"):
        trainer(1, tmp_path).fit(classification(backbone_weights=str(path)), datamodule=digits())
    (tmp_path / "unsaved/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.backbone_weights: there is no .*unsaved"):
        trainer(1, tmp_path).fit(classification(backbone_weights=str(tmp_path / "unsaved")), datamodule=digits())


@pytest.mark.parametrize("kind", ["mae", "dino", "classification"])
@pytest.mark.parametrize("evaluate", ["average", "last"])
def test_of_a_run_with_an_average_it_takes_what_that_evaluates(kind: str, evaluate: Any, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=5e-3, average_decay=0.9, evaluate=evaluate)
    run = trainer(3, tmp_path, limit_train_batches=3, limit_val_batches=0)
    run.fit(task(kind, "gelu", optimizer=optimizer), datamodule=data_for(kind, tmp_path))
    path = tmp_path / "pretrained.ckpt"
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    model = classification("gelu", backbone_weights=str(path), image_size=28, channels=1, num_classes=10)
    model.configure_model()
    place = {"mae": "encoder.", "dino": "teacher.backbone.", "classification": "vit."}[kind]
    taken, apart = 0, 0
    for name, tensor in net_weights(content, evaluate).items():
        own = name.removeprefix(place)
        if name.startswith(place) and own.startswith(("blocks", "patch", "pos", "cls")):
            assert torch.equal(model.net.vit.state_dict()[own], tensor), name
            other = net_weights(content, "last" if evaluate == "average" else "average")[name]
            taken, apart = taken + 1, apart + (not torch.equal(other, tensor))
    assert taken > 20
    assert (apart > 20) == (kind != "dino")  # a teacher is the net's own, and no average of it is kept


def test_classes_without_names_are_not_taken_for_those_of_other_data(tmp_path: Path) -> None:
    """As after a fit on shards; test and validation refuse, predictions have no labels, and given names are matched."""
    for split, name in itertools.product(("train", "val", "test"), ("dog", "fox")):
        (tmp_path / "wild" / split / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "wild" / split / name / "a.png")
    wild = data.Images(str(tmp_path / "wild"), image_size=28, channels=1, batch_size=4)
    numbered = digits()
    numbered.setup()
    numbered.class_names = None
    model, run = classification(**PLAIN), trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(model, datamodule=numbered)
    run.test(model, datamodule=numbered, verbose=False)
    for judge in (run.validate, run.test):
        with pytest.raises(UserError, match=r"\(dog, fox\), and the run has numbers only.*give model\.class_names"):
            judge(model, datamodule=wild)
    assert model.hparams["class_names"] is None
    assert run.predict(model, datamodule=wild)[0]["label"].tolist() == [-1, -1]
    model.hparams["class_names"] = ["fox", "cat", "dog", *map(str, range(7))]
    run.test(model, datamodule=wild, verbose=False)
    assert run.predict(model, datamodule=wild)[0]["label"].tolist() == [2, 0]
    fresh = classification(**PLAIN)
    run.validate(fresh, datamodule=wild, verbose=False)  # a net that is made for these data
    assert fresh.hparams["class_names"] == ["dog", "fox"]


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """With drop path, mixup or cutmix, erasing and RandAugment, two micro-batches a step, from inside an epoch."""

    def fit(resume: Path | None = None) -> tuple[ImageClassification, list[float]]:
        recorder, half = Recorder(), ModelCheckpoint(tmp_path, "half", every_n_train_steps=3)
        torch.manual_seed(0 if resume else 1)
        module = data.Images("mnist5k", transform=data.RandAugment(flip=0.0), batch_size=16, val_fraction=0.8, seed=0)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "callbacks": [recorder, half]}
        model = classification(seed=1, drop_path_rate=0.3)
        run = trainer(5, tmp_path, limit_val_batches=0, **options)
        run.fit(model, datamodule=module, ckpt_path=resume, weights_only=True)
        return model, recorder.losses

    whole, losses = fit()
    resumed, later = fit(tmp_path / "half.ckpt")
    assert (len(losses), len(later)) == (10, 4)
    assert later == losses[6:]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"even data\.batch_size"):
        trainer(1, tmp_path, limit_val_batches=0).fit(classification(), datamodule=digits(batch_size=15))
    module = digits()
    module.setup()
    module.splits["train"].labels[5:] = -1
    with pytest.raises(UserError, match="have none, the first of them image 5"):
        trainer(1, tmp_path, limit_val_batches=0).fit(classification(), datamodule=module)
    module = digits()
    module.setup()
    for split in ("val", "test"):
        module.splits[split].labels[:] = -1
    run = trainer(1, tmp_path)
    for judge, name in ((run.fit, "validation"), (run.validate, "validation"), (run.test, "test")):
        with pytest.raises(UserError, match=f"none of the [0-9]+ {name} images has one: give labelled data"):
            judge(classification(), datamodule=module)
    for options in ({"mixup": -1.0}, {"layer_decay": 0.0}, {"label_smoothing": 1.0}, {"random_erasing": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            classification(**options)
