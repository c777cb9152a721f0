"""Tiny data for the tasks, and a Trainer that writes nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest

import data
from moa_lightning import FFNConfig
from moa_lightning.models import GPTConfig
from moa_lightning.optim import OptimizerConfig
from tasks import DINO, MAE, ImageClassification, LanguageModeling, Task
from tests.models.nets import fragment

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 7}
TASKS = ("language", "mae", "dino")


def task(kind: str, ffn: str = "gelu", **options: Any) -> Task:
    """A tiny task; its sizes are taken from the data."""
    layer: FFNConfig = fragment(ffn)
    optimizer = options.pop("optimizer", OptimizerConfig(lr=3e-3, warmup_steps=2))
    if kind == "language":
        return LanguageModeling(GPTConfig(depth=2, dim=32, num_heads=2), layer, optimizer, **options)
    if kind == "mae":
        decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
        return MAE("vit_tiny_patch16_224", VIT, layer, optimizer=optimizer, **decoder, **options)
    if kind == "classification":
        return ImageClassification("vit_tiny_patch16_224", VIT, layer, optimizer=optimizer, **options)
    head = {"out_dim": 32, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0.0}
    return DINO("vit_tiny_patch16_224", VIT, layer, optimizer=optimizer, **{**head, **options})


def data_for(kind: str, text: Path) -> Any:
    """Sixteen samples a batch, of a page of text or of digits."""
    if kind == "language":
        return data.TextFiles(str(text), context_length=32, batch_size=16, val_fraction=0.2, max_val_samples=20)
    transform = data.MultiCrop(local_crops=2, local_size=14, flip=0.0) if kind == "dino" else data.SingleView(flip=0.0)
    return data.Images("mnist5k", transform=transform, batch_size=16, bank_size=64, max_val_samples=40)


def trainer(steps: int, folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **{**quiet, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options},
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 bytes with something to learn in them."""
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text("".join(f"{n} squared is {n * n}, é\n" for n in range(1000)))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
