"""What the tasks measure, show and write, recomputed from the net's own outputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from moa_lightning.evaluation import knn_votes
from moa_lightning.models.mae import random_mask
from moa_lightning.random import uniform
from tests.tasks.conftest import data_for, task, trainer
from tests.tasks.recorder import Recorder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """(task, data module, Trainer, last validation batch) after three steps and a validation."""
    runs = {}

    def get(kind: str):
        if kind not in runs:
            model, module, recorder = task(kind, "moa"), data_for(kind, text), Recorder()
            run = trainer(3, tmp_path_factory.mktemp(kind), callbacks=[recorder], limit_train_batches=3)
            run.fit(model, datamodule=module)
            model.eval()
            runs[kind] = model, module, run, recorder.batch
        return runs[kind]

    return get


def test_language_is_judged_by_the_mean_loss_of_a_byte(trained) -> None:
    model, module, run, _ = trained("language")
    total, count = 0.0, 0
    for batch in module.val_dataloader():
        with torch.no_grad():
            log_p = model(batch["tokens"]).double().log_softmax(-1)
        for row, targets in zip(log_p, batch["targets"], strict=True):
            for position, target in enumerate(targets.tolist()):
                if target != -100:
                    total, count = total - float(row[position, target]), count + 1
    loss = total / count
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(run.callback_metrics["val/perplexity"]) == pytest.approx(math.exp(loss), rel=1e-4)
    assert float(run.callback_metrics["val/bits_per_byte"]) == pytest.approx(loss / math.log(2), rel=1e-5)


def test_training_predicts_the_next_token(trained) -> None:
    model, module, _, _ = trained("language")
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    logits = model(batch["tokens"]).detach()
    expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    model.log = lambda *args, **kwargs: None
    try:
        assert model.training_step(batch, 0).item() == pytest.approx(float(expected), rel=1e-5)
        hidden = {**batch, "targets": batch["targets"].clone()}
        hidden["targets"][:, ::2] = -100
        expected = F.cross_entropy(logits[:, 1::2].flatten(0, 1), batch["targets"][:, 1::2].flatten())
        assert model.training_step(hidden, 0).item() == pytest.approx(float(expected), rel=1e-5)
    finally:
        del model.log


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_vision_is_judged_by_the_nearest_labelled_images(trained, kind: str) -> None:
    model, module, run, _ = trained(kind)
    found = []
    with torch.no_grad():
        for loader in module.val_dataloader():
            batches = list(loader)
            found.append([torch.cat([model(b["image"]) for b in batches]), torch.cat([b["label"] for b in batches])])
    (bank, bank_labels), (queries, labels) = found
    assert (len(bank), len(queries)) == (64, 40)
    votes = knn_votes(bank, bank_labels, queries, 10)
    expected = 100 * (votes.argmax(1) == labels).double().mean()
    accuracy = float(run.callback_metrics["val/knn_top1"])
    assert 0 <= accuracy <= 100
    assert accuracy == pytest.approx(float(expected), abs=1e-4)


def test_mae_validates_on_the_removed_patches_of_every_query(trained) -> None:
    model, module, run, _ = trained("mae")
    _, query = module.val_dataloader()
    total = 0.0
    with torch.no_grad():
        for batch in query:
            predicted, mask = model.net(batch["image"], uniform(batch["seed"], 16, 1))
            target = model.net.patchify(batch["image"]).double()
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            error = (predicted - target).square().mean(-1)
            total += float(error[mask == 1].mean()) * len(mask)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(total / 40, rel=1e-4)


@pytest.mark.parametrize("ffn", ["moa", "moa_shuffled_gates"])
def test_visible_patches_are_predicted_where_mixes_are_looked_at_or_give_their_gates_away(ffn: str) -> None:
    model = task("mae", ffn, image_size=28, channels=1, seed=0)
    model.configure_model()
    for training in (True, False):
        model.train(training)
        _, predicted, mask = model.reconstruct(torch.rand(2, 1, 28, 28), torch.arange(2))
        assert bool((predicted[mask == 0] == 0).all()) == (training and ffn == "moa")


def test_a_mask_depends_on_the_seed_of_its_sample_alone(trained) -> None:
    model, _, _, batch = trained("mae")
    order = torch.arange(len(batch["seed"])).flip(0)
    with torch.no_grad():
        _, predicted, mask = model.reconstruct(batch["image"], batch["seed"])
        torch.manual_seed(123)
        _, predicted_again, mask_again = model.reconstruct(batch["image"][order], batch["seed"][order])
        _, _, other = model.reconstruct(batch["image"], batch["seed"] + 1)
    assert torch.equal(mask_again, mask[order])
    assert torch.allclose(predicted_again, predicted[order], atol=1e-5)
    assert (other != mask).any(1).all()
    assert mask.sum(1).tolist() == [12.0] * len(mask)


def test_masks_of_many_seeds_hide_every_patch_alike() -> None:
    _, mask, _ = random_mask(uniform(torch.arange(20_000), 16, 1), 0.75)
    assert (mask.mean(0) - 0.75).abs().max() < 0.02  # six standard deviations


def test_language_writes_the_same_sample_every_time(trained) -> None:
    model, *_ = trained("language")
    texts = model.texts()
    assert texts.keys() == {"sample"}
    assert isinstance(texts["sample"], str)
    assert len(texts["sample"].encode()) >= 200  # bytes that are no text turn into longer replacement characters
    torch.manual_seed(5)
    assert model.texts() == texts
    assert model.pictures({}) == {}


def cell(shown: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The picture of 28 pixels in a cell of 84, of a grid with lines of two pixels: (3, 28, 28)."""
    y, x = 2 + 86 * row, 2 + 86 * column
    return shown[:, y : y + 84 : 3, x : x + 84 : 3]


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_pictures_are_rows_of_eight_images(trained, kind: str) -> None:
    model, _, _, batch = trained(kind)
    shown = model.pictures(batch)
    rows = {"attention": 1 + 2, "patches": 2, "neighbours": 8, **({"reconstruction": 3} if kind == "mae" else {})}
    assert shown.keys() == rows.keys()
    for name, picture in shown.items():
        columns = 1 + 5 if name == "neighbours" else 8
        assert picture.shape == (3, rows[name] * 86 + 2, columns * 86 + 2)
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert model.texts() == {}


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_neighbours_are_the_nearest_images_of_the_bank(trained, kind: str) -> None:
    model, module, _, batch = trained(kind)
    with torch.no_grad():
        bank = list(module.val_dataloader()[0])
        features = F.normalize(torch.cat([model(b["image"]) for b in bank]), dim=1)
        similarity = F.normalize(model(batch["image"][:8]), dim=1) @ features.T
    images, labels = torch.cat([b["image"] for b in bank]), torch.cat([b["label"] for b in bank])
    shown = model.pictures(batch)["neighbours"]
    for row, found in enumerate(similarity.topk(5).indices):
        for column, index in enumerate(found.tolist(), start=1):
            expected = (images[index, 0] * module.std[0] + module.mean[0]).clamp(0, 1)
            inside = cell(shown, row, column)[0, 2:-2, 2:-2]
            assert torch.allclose(inside, expected[2:-2, 2:-2], atol=1e-5), (row, column)
            green = cell(shown, row, column)[1, 0, 0] > cell(shown, row, column)[0, 0, 0]
            assert bool(green) == bool(labels[index] == batch["label"][row])


def test_a_reconstruction_shows_the_image_below_and_what_was_visible_above(trained) -> None:
    model, module, _, batch = trained("mae")
    shown = model.pictures(batch)["reconstruction"]
    rows = [cell(shown, row, 0)[0] for row in range(3)]
    image = batch["image"][0, 0] * module.std[0] + module.mean[0]
    assert torch.allclose(rows[2], image.clamp(0, 1), atol=1e-5)
    _, mask, _ = random_mask(uniform(batch["seed"][:1], 16, 1), 0.75)
    hidden = mask.view(4, 4).repeat_interleave(7, 0).repeat_interleave(7, 1) == 1
    for row in rows[:2]:
        assert torch.allclose(row[~hidden], rows[2][~hidden], atol=1e-5)
    assert rows[0][hidden].unique().numel() == 1
    assert rows[1][hidden].unique().numel() > 20


@pytest.mark.parametrize(("kind", "samples", "tokens"), [("language", 16, 512), ("mae", 16, None), ("dino", 16, None)])
def test_samples_and_tokens_of_a_batch(trained, kind: str, samples: int, tokens: int | None) -> None:
    model, module, _, _ = trained(kind)
    batch = next(iter(module.train_dataloader()))
    assert model.samples_per_batch(batch) == samples
    assert model.tokens_per_batch(batch) == tokens


def test_training_flops_are_three_forward_passes_and_one_of_the_teacher(trained) -> None:
    language, mae, dino = (trained(kind)[0] for kind in ("language", "mae", "dino"))
    assert language.flops_per_sample() == 3 * 32 * language.net.flops_per_token()
    assert mae.flops_per_sample() == 3 * mae.net.flops_per_image()
    student, teacher = dino.net.flops_per_image([28, 28, 14, 14])
    assert dino.flops_per_sample() == 3 * student + teacher


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_without_labels_no_accuracy_is_reported(kind: str, text, tmp_path) -> None:
    module = data_for(kind, text)
    module.setup()
    for split in module.splits.values():
        split.labels.fill_(-1)
    run = trainer(1, tmp_path, limit_train_batches=1)
    run.fit(task(kind), datamodule=module)
    assert "val/knn_top1" not in run.callback_metrics
