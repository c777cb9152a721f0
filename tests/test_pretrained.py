"""Encoders from files: of our own runs, of timm and of the official repositories, in whatever envelope they come."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import ImageClassifier, MaskedAutoencoder, SelfDistillation
from moa_lightning.pretrained import load_encoder
from tests.models.families import FAMILIES, IMAGE, SMALL, images
from tests.models.nets import shake

NAME = FAMILIES[0]
GELU, MOA = FFNConfig(), FFNConfig("moa")


def classifier(ffn: FFNConfig = GELU, size: int = IMAGE, **options: Any) -> ImageClassifier:
    return ImageClassifier(NAME, {**SMALL, **options}, ffn, size, 3, 7, pool="token", seed=9).eval()


def saved(path: Path, tensors: dict[str, Tensor], prefix: str = "net.", envelope: str | None = "state_dict") -> str:
    content = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save({envelope: content, "epoch": 3} if envelope else content, path)
    return str(path)


@torch.no_grad()
def assert_same_encoder(net: ImageClassifier, encoder: Any) -> None:
    assert torch.allclose(net.vit.forward_features(images()), encoder.forward_features(images()), atol=1e-5)


@pytest.mark.parametrize("ffn", [GELU, MOA], ids=["gelu", "moa"])
def test_runs_of_mae_give_their_encoder(ffn: FFNConfig, tmp_path: Path) -> None:
    mae = shake(MaskedAutoencoder(NAME, SMALL, ffn, ffn, IMAGE, 3, decoder_dim=8, decoder_depth=1, decoder_heads=2))
    net = classifier(ffn)
    load_encoder(net.vit, saved(tmp_path / "mae.ckpt", mae.state_dict()))
    assert_same_encoder(net, mae.eval().encoder)


def test_runs_of_dino_give_their_teacher(tmp_path: Path) -> None:
    dino = shake(SelfDistillation(NAME, SMALL, MOA, IMAGE, 3, 8, 8, 4))
    shake(dino.teacher.requires_grad_(True), seed=1)
    net = classifier(MOA)
    load_encoder(net.vit, saved(tmp_path / "dino.ckpt", dino.state_dict()))
    assert_same_encoder(net, dino.eval().teacher.backbone)
    with torch.no_grad():
        student = dino.student.backbone.forward_features(images())
        assert not torch.allclose(net.vit.forward_features(images()), student, atol=1e-2)


@pytest.mark.parametrize(
    ("prefix", "envelope"),
    [("", None), ("", "model"), ("module.backbone.", "teacher"), ("backbone.", "state_dict")],
    ids=["flat", "mae", "dino", "other"],
)
def test_files_of_others_name_their_layers_as_timm_does(prefix: str, envelope: str | None, tmp_path: Path) -> None:
    theirs = shake(timm.create_model(NAME, num_classes=11, img_size=IMAGE, **SMALL)).eval()
    for ffn in (GELU, MOA):  # with the identity start MoA is the same function
        net = classifier(ffn)
        before = net.vit.head.weight.clone()
        load_encoder(net.vit, saved(tmp_path / "theirs.pth", theirs.state_dict(), prefix, envelope))
        assert_same_encoder(net, theirs)
        assert torch.equal(net.vit.head.weight, before)


def test_safetensors_are_read(tmp_path: Path) -> None:
    theirs = shake(timm.create_model(NAME, num_classes=0, img_size=IMAGE, **SMALL)).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    net = classifier()
    load_encoder(net.vit, str(tmp_path / "theirs.safetensors"))
    assert_same_encoder(net, theirs)


def test_positions_of_another_grid_are_timms_own_interpolation(tmp_path: Path) -> None:
    theirs = shake(timm.create_model(NAME, num_classes=0, img_size=IMAGE, **SMALL)).eval()
    path = saved(tmp_path / "theirs.pth", theirs.state_dict(), "", None)
    net = classifier(size=2 * IMAGE)
    load_encoder(net.vit, path)
    theirs.set_input_size(2 * IMAGE)
    assert torch.allclose(net.vit.pos_embed, theirs.pos_embed, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "moa.ckpt", classifier(MOA).state_dict())
    for net, word in (
        (classifier(GELU), "up_mix"),
        (classifier(MOA, depth=1), r"blocks\.1"),
        (classifier(MOA, depth=3), r"no blocks\.2"),
        (classifier(MOA, embed_dim=32), r"shape .*48"),
    ):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(UserError, match=word):
            load_encoder(net.vit, path)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    net = classifier()
    with pytest.raises(UserError, match="no vision transformer"):
        load_encoder(net.vit, saved(tmp_path / "a.ckpt", {"weight": torch.ones(2)}))
    (tmp_path / "b.safetensors").write_text("nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(net.vit, str(tmp_path / "b.safetensors"))
    (tmp_path / "c.ckpt").write_text("nothing")
    with pytest.raises(UserError, match="not read"):
        load_encoder(net.vit, str(tmp_path / "c.ckpt"))
