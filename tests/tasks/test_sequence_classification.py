"""Judging texts: what is measured, the loss, where it starts, and that it goes on exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

import data
from moa_lightning.errors import UserError
from moa_lightning.models import GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import OptimizerConfig
from tasks import LanguageModeling, SequenceClassification
from tests.models.nets import fragment
from tests.tasks.conftest import trainer
from tests.tasks.recorder import Recorder

SIZE = GPTConfig(depth=2, dim=32, num_heads=2)
EXPERTS = MoEConfig(4, router="expert_choice", capacity_factor=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and val.jsonl: words of 3 to 20 letters a or b; which is more frequent, and the share of a."""
    place, generator = tmp_path_factory.mktemp("words"), torch.Generator().manual_seed(0)
    for name, count in (("train", 160), ("val", 50)):
        rows = []
        for _ in range(count):
            length = int(torch.randint(3, 20, (), generator=generator))
            share = float(torch.rand((), generator=generator))
            letters = torch.rand(length, generator=generator) < share
            text, more = "".join("ba"[int(letter)] for letter in letters), int(letters.sum() * 2 > length)
            rows.append({"text": text, "more": "ab"[1 - more], "share": 10 + letters.double().mean().item()})
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def words(folder: Path, numbers: bool = False, **options: Any) -> data.LabelledFiles:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "val")}
    how = {"label": "share", "numbers": True} if numbers else {"label": "more", "metrics": ["accuracy", "f1"]}
    return data.LabelledFiles(**files, **how, **{"context_length": 32, "batch_size": 16, "seed": 0, **options})


def judge(ffn: str = "moa", **options: Any) -> SequenceClassification:
    optimizer = options.pop("optimizer", OptimizerConfig(lr=5e-3, warmup_steps=5))
    return SequenceClassification(SIZE, fragment(ffn), optimizer, **options)


@torch.no_grad()
def answers(model: SequenceClassification, module: data.LabelledFiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation texts, each text by itself."""
    rows = module.splits["val"]
    samples = [rows[0, index] for index in range(len(rows))]
    logits = [model.eval()(sample["tokens"][None], torch.tensor([len(sample["tokens"])])) for sample in samples]
    return torch.cat(logits).double(), rows.labels


@pytest.mark.parametrize("kind", ["classes", "numbers", "experts"])
def test_it_learns_and_measures_what_its_logits_say(kind: str, folder: Path, tmp_path: Path) -> None:
    model = judge("gelu", moe=EXPERTS if kind == "experts" else MoEConfig(), layer_decay=0.9)
    module, recorder = words(folder, kind == "numbers"), Recorder()
    run = trainer(40, tmp_path, callbacks=[recorder])
    run.fit(model, datamodule=module)
    assert sum(recorder.losses[-5:]) < 0.8 * sum(recorder.losses[:5])
    logits, labels = answers(model, module)
    if kind == "numbers":
        given = module.splits["train"].labels.double()
        mean, deviation = given.mean(), given.std(correction=0)
        answer = mean + deviation * logits[:, 0]
        scores = {"pearson": pearsonr(answer, labels)[0], "spearman": spearmanr(answer, labels)[0]}
        expected = {"loss": float(((answer - labels) / deviation).square().mean()), "score": 100 * scores["spearman"]}
    else:
        answer = logits.argmax(1)
        right = float((answer == labels).double().mean())
        f1 = f1_score(labels, answer)
        scores = {"accuracy": right, "f1": f1, "macro_f1": f1_score(labels, answer, average="macro")}
        scores["matthews"] = matthews_corrcoef(labels, answer)
        expected = {"loss": float(F.cross_entropy(logits, labels)), "score": 50 * (right + f1)}
    expected |= {name: 100 * value for name, value in scores.items()}
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert found == pytest.approx({f"val/{name}": value for name, value in expected.items()}, rel=1e-4, abs=1e-3)

    run.save_checkpoint(tmp_path / "task.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    assert torch.equal(answers(loaded, module)[0], logits)
    module.splits["test"] = module.splits["val"]
    predicted = torch.cat([batch["prediction"] for batch in run.predict(model, datamodule=module)])
    torch.testing.assert_close(predicted.double(), answer.double(), rtol=1e-4, atol=1e-4)


def test_labels_may_be_smoothed(folder: Path) -> None:
    model = judge(num_classes=3, vocab_size=256, context_length=8, metrics=["accuracy"], seed=0)
    model.configure_model()
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.allclose(
        model.losses(logits, labels, 0.1).mean(), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )


def test_it_starts_from_a_language_model_and_goes_on_without_it(folder: Path, text: Path, tmp_path: Path) -> None:
    """Token choice goes on as expert choice: both have the same weights."""
    pretrained = LanguageModeling(SIZE, fragment("gelu"), OptimizerConfig(warmup_steps=1), moe=MoEConfig(4, 2))
    run = trainer(2, tmp_path, limit_val_batches=0)
    run.fit(pretrained, datamodule=data.TextFiles(str(text), context_length=24, batch_size=16))
    path = tmp_path / "language.ckpt"
    run.save_checkpoint(path)
    model = judge("gelu", moe=EXPERTS, weights_from=str(path))
    run = trainer(1, tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(model, datamodule=words(folder))
    start, language = model.net.state_dict(), pretrained.net.state_dict()
    assert {name for name in language if torch.equal(start[name], language[name])} == language.keys() - {"head.weight"}
    run.save_checkpoint(tmp_path / "judge.ckpt")
    path.unlink()
    again = judge("gelu", moe=EXPERTS, weights_from=str(tmp_path / "judge.ckpt"), num_classes=1)  # another head
    run = trainer(1, tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(again, datamodule=words(folder, numbers=True))
    assert torch.equal(again.net.embed.weight, language["embed.weight"])
    assert again.net.head.out_features == 1
    with pytest.raises(UserError, match=r"model\.weights_from: there is no .*language\.ckpt"):
        trainer(1, tmp_path).fit(judge(weights_from=str(path)), datamodule=words(folder))


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Experts that tokens choose, with a capacity and biases, two micro-batches a step, from inside an epoch."""

    def fit(resume: Path | None = None) -> tuple[SequenceClassification, list[float]]:
        recorder, half = Recorder(), ModelCheckpoint(tmp_path, "half", every_n_train_steps=3)
        moe = MoEConfig(4, 2, capacity_factor=0.8, balance="bias", balance_bias_rate=0.01)
        model = judge(seed=1, moe=moe, layer_decay=0.8)
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "callbacks": [recorder, half]}
        run = trainer(5, tmp_path, limit_val_batches=0, **options)
        run.fit(model, datamodule=words(folder, batch_size=20), ckpt_path=resume, weights_only=True)
        return model, recorder.losses

    whole, losses = fit()
    resumed, later = fit(tmp_path / "half.ckpt")
    assert (len(losses), later) == (10, losses[6:])
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert any(value.abs().max() > 0 for name, value in expected.items() if name.endswith("router.bias"))


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    for options in ({"layer_decay": 0.0}, {"label_smoothing": 1.0}, {"num_classes": 0}, {"target_scale": (0.0, 0.0)}):
        with pytest.raises(UserError, match=next(iter(options))):
            judge(**options)
    with pytest.raises(UserError, match=r"model\.metrics is \['f1'\]; give one or more of pearson, spearman"):
        trainer(1, tmp_path).fit(judge(metrics=["f1"]), datamodule=words(folder, numbers=True))
    module = words(folder)
    module.setup()
    module.splits["train"].labels[3] = -1
    with pytest.raises(UserError, match="1 training texts have none, the first of them text 3"):
        trainer(1, tmp_path).fit(judge(), datamodule=module)
    module.splits["test"] = module.splits["val"]
    module.splits["test"].labels[:] = -1
    with pytest.raises(UserError, match="none of the 50 test texts has one: give labelled data"):
        trainer(1, tmp_path).test(judge(), datamodule=module, verbose=False)


@pytest.mark.parametrize("numbers", [False, True])
def test_texts_to_be_judged_have_labels(numbers: bool, folder: Path, tmp_path: Path) -> None:
    """Said before the first step; some labels are enough, and where nothing is judged none are needed."""
    module, recorder = words(folder, numbers), Recorder()
    module.setup()
    labels = module.splits["val"].labels
    module.splits["test"], hidden = module.splits["val"], module.splits["val"].hidden
    labels[1:] = hidden
    run = trainer(1, tmp_path)
    run.fit(judge(), datamodule=module)
    run.test(run.model, datamodule=module, verbose=False)
    labels[:] = hidden
    run = trainer(1, tmp_path, callbacks=[recorder])
    with pytest.raises(UserError, match="none of the 50 validation texts has one: give labelled data"):
        run.fit(judge(), datamodule=module)
    assert not recorder.losses
    with pytest.raises(UserError, match="none of the 50 validation texts has one: give labelled data"):
        run.validate(judge(), datamodule=module, verbose=False)
    run = trainer(1, tmp_path, limit_val_batches=0)
    run.fit(judge(), datamodule=module)
    assert len(run.predict(run.model, datamodule=module)) == 4
