"""Weights that fit a net but would compute something else in it are refused before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import data
from moa_lightning import FFNConfig, UserError
from moa_lightning.models import GPTConfig
from moa_lightning.moe import MoEConfig
from tasks import DINO, MAE, LanguageModeling, SequenceClassification, Task
from tests.tasks.conftest import VIT, data_for, trainer

GPT = {"depth": 1, "dim": 32, "num_heads": 4, "num_kv_heads": 4, "qk_norm": False}
EXPERTS = {"experts": 4, "top_k": 2}


def task(kind: str, **options: Any) -> Task:
    """A tiny task, with options of its size."""
    source = {"weights_from": options.pop("weights_from", None)}
    if kind == "language":
        moe = MoEConfig(**EXPERTS | options.pop("moe", {}))
        return LanguageModeling(GPTConfig(**GPT | options), FFNConfig(), moe=moe, **source)
    vit = {**VIT, "num_heads": options.pop("num_heads", 2)}
    if kind == "dino":
        return DINO("vit_tiny_patch16_224", vit, out_dim=8, head_hidden_dim=8, head_bottleneck_dim=4, **source)
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2} | options
    return MAE("vit_tiny_patch16_224", vit, **decoder, **source)


def begin(model: Task, module: Any, folder: Path) -> Path:
    """A checkpoint from before the first step."""
    run = trainer(1, folder, limit_train_batches=0, limit_val_batches=0)
    run.fit(model, datamodule=module)
    run.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("language", {"num_heads": 2, "num_kv_heads": None}, "gpt.num_heads 4, and here it is 2; match it"),
        ("language", {"rope_theta": 500_000.0}, None),  # for a longer context
        ("language", {"moe": {"top_k": 1}}, "moe.top_k 2, and here it is 1"),
        ("language", {"num_kv_heads": None}, None),  # as many as query heads
        ("language", {"moe": {"capacity_factor": 2.0, "z_loss_weight": 0.0}}, None),
        ("mae", {"num_heads": 4}, "backbone_args.num_heads 2, and here it is 4"),
        ("mae", {"decoder_heads": 4}, "decoder_heads 2, and here it is 4"),
        ("dino", {"num_heads": 4}, "backbone_args.num_heads 2, and here it is 4"),
        ("dino", {}, None),
    ],
)
def test_options_that_change_the_function_but_no_shape_must_match(
    kind: str, options: dict, message: str | None, text: Path, tmp_path: Path
) -> None:
    path = begin(task(kind), data_for(kind, text), tmp_path)
    model = task(kind, weights_from=str(path), **options)
    if message is None:
        begin(model, data_for(kind, text), tmp_path)
        assert model.starts == [f"weights from {path}"]
        return
    with pytest.raises(UserError, match=f"the weights of '.*first.ckpt' were trained with {message}"):
        begin(model, data_for(kind, text), tmp_path)


@pytest.mark.parametrize("kind", ["language", "classes"])
def test_weights_of_another_tokenizer_are_refused(kind: str, text: Path, tmp_path: Path) -> None:
    path = begin(task("language"), data_for("language", text), tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["tokenizer_sha256"] == "bytes"
    torch.save({**content, "tokenizer_sha256": "of another one"}, path)
    if kind == "language":
        model, module = task(kind, weights_from=str(path)), data_for(kind, text)
    else:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"text": letter * 9, "label": letter}) for letter in "ab" * 20))
        module = data.LabelledFiles(train=str(rows), val=str(rows), context_length=32, batch_size=4, seed=0)
        model = SequenceClassification(GPTConfig(**GPT), moe=MoEConfig(**EXPERTS), weights_from=str(path))
    with pytest.raises(UserError, match=r"tokenizer \(bytes\) is not the one that the weights of '.*first.ckpt' were"):
        begin(model, module, tmp_path)
