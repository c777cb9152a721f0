"""Masks that a run takes from one of another objective: a sparse backbone stays sparse when it is fine-tuned."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from moa_lightning.callbacks.pruning import Pruning
from moa_lightning.errors import UserError
from moa_lightning.pruning import sparsity_of
from tasks import MAE
from tests.tasks.conftest import VIT, data_for, task, trainer

SPARSITY = 0.6


def fit(kind: str, folder: Path, pruning: Pruning, **options: Any) -> L.LightningModule:
    """Two steps; <folder>/<kind>.ckpt is left."""
    model = task(kind, "gelu", **options)
    run = trainer(2, folder, limit_train_batches=2, limit_val_batches=0, callbacks=[pruning])
    run.fit(model, datamodule=data_for(kind, folder))
    run.save_checkpoint(folder / f"{kind}.ckpt")
    return model


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_a_sparse_backbone_stays_sparse_in_fine_tuning(kind: str, tmp_path: Path, caplog) -> None:
    found = Pruning(SPARSITY)
    backbone = fit(kind, tmp_path, found).evaluated_backbone()
    source = str(tmp_path / f"{kind}.ckpt")
    place = {"mae": "net.encoder.", "dino": "net.student.backbone."}[kind]
    encoder = {name.removeprefix(place): mask for name, mask in found.masks.items() if name.startswith(place)}
    decoder = len(found.masks) - len(encoder)
    assert (len(encoder), decoder) == (8, {"mae": 4, "dino": 0}[kind])

    kept = Pruning(SPARSITY, mask_from=source)
    tuned = fit("classification", tmp_path, kept, backbone_weights=source)
    assert kept.masks.keys() == {f"net.vit.{name}" for name in encoder}
    weights, start = dict(tuned.net.vit.named_parameters()), dict(backbone.named_parameters())
    for name, mask in encoder.items():
        assert torch.equal(kept.masks[f"net.vit.{name}"], mask), name  # also where the encoder's own share differs
        assert (start[name][~mask] == 0).all()
        assert (weights[name][~mask] == 0).all()
        assert not torch.equal(weights[name][mask], start[name][mask])
    said = f"8 layers of the vision transformer are matched with those of '{source}'"
    assert f"{said}; without a counterpart are 0 here, which stay dense, and {decoder} there" in caplog.text

    further = Pruning(0.8, mask_from=source)
    fit("classification", tmp_path, further)
    assert sparsity_of(further.masks) == pytest.approx(0.8, abs=1e-4)
    assert not any((further.masks[f"net.vit.{name}"] & ~mask).any() for name, mask in encoder.items())
    with pytest.raises(UserError, match=r"pruning\.sparsity is 0\.5, and .* has 0\.6; give that to take its masks"):
        fit("classification", tmp_path, Pruning(0.5, mask_from=source))
    with pytest.raises(UserError, match="is pruned in 8 layers and this run would be in 4"):
        fit("classification", tmp_path, Pruning(SPARSITY, mask_from=source, dense_blocks=1))


def test_what_has_no_counterpart_stays_dense(tmp_path: Path, caplog) -> None:
    source = tmp_path / "classification.ckpt"
    fit("classification", tmp_path, Pruning(SPARSITY))
    carried = Pruning(SPARSITY, mask_from=str(source))
    fit("mae", tmp_path, carried)
    assert all(name.startswith("net.encoder.blocks.") for name in carried.masks)
    assert "without a counterpart are 4 here, which stay dense, and 0 there" in caplog.text
    deep = MAE("vit_tiny_patch16_224", {**VIT, "depth": 3}, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    run = trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[carried])
    with pytest.raises(UserError, match=r"has no net\.vit\.blocks\.2\.attn\.qkv\.weight of shape"):
        run.fit(deep, datamodule=data_for("mae", tmp_path))


def test_a_dense_backbone_is_pruned_by_its_own_weights(tmp_path: Path) -> None:
    encoder = fit("mae", tmp_path, Pruning()).net.encoder
    pruned = Pruning(SPARSITY, "layer", mask_from=str(tmp_path / "mae.ckpt"))
    fit("classification", tmp_path, pruned)
    for name, mask in pruned.masks.items():
        size = encoder.get_parameter(name.removeprefix("net.vit.")).abs()
        assert int(mask.sum()) == mask.numel() - round(SPARSITY * mask.numel())
        assert size[mask].min() >= size[~mask].max()
