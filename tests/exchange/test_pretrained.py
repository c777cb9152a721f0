"""Encoders from files: of our own runs, of timm and of the official repositories, in whatever envelope they come."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from torch import Tensor

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.exchange.pretrained import load_encoder
from moa_lightning.exchange.timm_export import timm_state
from moa_lightning.models import ImageClassifier, MaskedAutoencoder, SelfDistillation
from moa_lightning.models.vit import build_vit
from tasks import DINO, MAE, Task
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


def same_form(net: torch.nn.Module, mixing: str) -> FFNConfig:
    """A layer of that kind in the place of timm's, which computes the same at the start."""
    gated = any(type(m).__name__ in ("SwiGLU", "GluMlp") for m in net.modules())
    return FFNConfig(mixing, "gated" if gated else "plain", "silu" if gated else "gelu")


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_every_family_are_read_and_given_back(name: str, tmp_path: Path) -> None:
    theirs = shake(timm.create_model(name, num_classes=7, img_size=IMAGE, **SMALL)).eval()
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "a.safetensors")
    for mixing in ("fixed", "moa"):
        ours = build_vit(name, same_form(theirs, mixing), IMAGE, 3, 0, **SMALL).eval()
        load_encoder(ours, str(tmp_path / "a.safetensors"))
        with torch.no_grad():
            assert torch.allclose(ours.forward_features(images()), theirs.forward_features(images()), atol=2e-6)
        state = timm_state(ours, timm.create_model(name, num_classes=0, img_size=IMAGE, **SMALL))
        if mixing == "moa":
            assert state is None, "timm has no such layer"
        else:
            assert state is not None
            assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in state.items())


def test_one_channel_gets_the_sum_of_three_and_patches_are_resized(tmp_path: Path) -> None:
    theirs = shake(timm.create_model(NAME, num_classes=3, img_size=IMAGE, **SMALL)).eval()
    path = saved(tmp_path / "theirs.pth", theirs.state_dict(), "", None)
    grey = build_vit(NAME, GELU, IMAGE, 1, 0, **SMALL).eval()
    load_encoder(grey, path)
    with torch.no_grad():
        expected = theirs.forward_features(images(channels=1).expand(-1, 3, -1, -1))
        assert torch.allclose(grey.forward_features(images(channels=1)), expected, atol=1e-5)
    coarse = build_vit(NAME, GELU, 2 * IMAGE, 3, 0, **{**SMALL, "patch_size": 8})
    load_encoder(coarse, path)
    expected = resample_patch_embed(theirs.patch_embed.proj.weight, [8, 8])
    assert torch.allclose(coarse.patch_embed.proj.weight, expected, atol=1e-6)


def test_a_net_that_pools_gives_its_last_norm(tmp_path: Path) -> None:
    name = "vit_medium_patch16_reg4_gap_256"
    theirs = shake(timm.create_model(name, img_size=IMAGE, **SMALL))
    net = build_vit(name, GELU, IMAGE, 3, 0, **SMALL, global_pool="")
    load_encoder(net, saved(tmp_path / "theirs.pth", theirs.state_dict(), "", None))
    assert torch.equal(net.norm.weight, theirs.fc_norm.weight)


@pytest.mark.parametrize("config", [FFNConfig(activation="relu2"), FFNConfig(form="gated", activation="silu")])
def test_other_layers_are_not_passed_off_as_timms(config: FFNConfig) -> None:
    ours = build_vit(NAME, config, IMAGE, 3, 0, **SMALL)
    assert timm_state(ours, timm.create_model(NAME, num_classes=0, img_size=IMAGE, **SMALL)) is None


@pytest.mark.parametrize("kind", [MAE, DINO])
def test_mae_and_dino_start_from_a_file(kind: type[Task], tmp_path: Path) -> None:
    """MAE keeps the positions of the file and does not train them; DINO's teacher starts from it too. A file that is
    gone stops a new run, not the reading of a checkpoint."""
    theirs = shake(timm.create_model(NAME, num_classes=3, img_size=IMAGE, **SMALL)).eval()
    path = saved(tmp_path / "theirs.pth", theirs.state_dict(), "", None)
    sizes = (
        {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
        if kind is MAE
        else {"out_dim": 8, "head_hidden_dim": 8}
    )
    task = kind(NAME, SMALL, MOA, image_size=IMAGE, channels=3, seed=0, backbone_weights=path, **sizes)
    task.configure_model()
    nets = [task.net.encoder] if kind is MAE else [task.net.student.backbone, task.net.teacher.backbone]
    with torch.no_grad():
        for net in nets:
            expected = theirs.forward_features(images())
            assert torch.allclose(net.eval().forward_features(images()), expected, atol=2e-6)
    if kind is MAE:
        assert torch.equal(task.net.encoder.pos_embed, theirs.pos_embed)
        assert not task.net.encoder.pos_embed.requires_grad
    gone = kind(NAME, SMALL, MOA, image_size=IMAGE, channels=3, seed=0, backbone_weights="gone.pth", **sizes)
    gone.configure_model()
    with pytest.raises(UserError, match=r"there is no 'gone\.pth'"):
        gone.on_train_start()


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


class Planted:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("planted"),)


def test_official_checkpoints_hold_their_arguments_which_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = shake(timm.create_model(NAME, num_classes=0, img_size=IMAGE, **SMALL)).eval()
    arguments = argparse.Namespace(lr=0.1, output_dir="x", betas=(0.9, 0.95))
    torch.save({"model": theirs.state_dict(), "args": arguments, "epoch": 3}, "theirs.pth")
    net = classifier()
    load_encoder(net.vit, "theirs.pth")
    assert_same_encoder(net, theirs)
    arguments.resume = Planted()
    torch.save({"model": theirs.state_dict(), "args": arguments}, "planted.pth")
    with pytest.raises(UserError, match="could run code"):
        load_encoder(net.vit, "planted.pth")
    assert not Path("planted").exists()


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


RELU2 = FFNConfig(activation="relu2")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (RELU2, GELU, r"compute relu2, and here gelu: match ffn\.activation"),
        (RELU2, MOA, r"compute relu2, which the mixes here do not start as; set .*ffn\.activation to relu2"),
        (GELU, FFNConfig("moa", init="paper"), "compute gelu, which the mixes here do not start as"),
        (MOA, FFNConfig("moa", gate="tanh"), r"are sigmoid, and here tanh: match ffn\.gate"),
        (FFNConfig("la"), FFNConfig("la", dictionary=tuple(reversed(MOA.dictionary))), r"match ffn\.dictionary"),
    ],
)
@pytest.mark.parametrize("form", ["run", "joint", "export", "timm"])
def test_weights_of_another_function_are_refused(
    source: FFNConfig, target: FFNConfig, words: str, form: str, tmp_path: Path
) -> None:
    net, path = classifier(target), str(tmp_path / "a.safetensors")
    if form in ("run", "joint"):
        settings: Any = {"ffn": source.as_dict()}
        settings = settings if form == "run" else {"ffn": None, "vision": {"task": "MAE", "options": settings}}
        state = {f"net.encoder.{name}": value for name, value in build(source).items()}
        path = str(tmp_path / "a.ckpt")
        torch.save({"state_dict": state, "hyper_parameters": settings}, path)
    else:
        key = "encoder" if form == "timm" else "hyper_parameters"
        save_file(build(source), path, {key: json.dumps({"ffn": source.as_dict()})})
    with pytest.raises(UserError, match=words):
        load_encoder(net.vit, path)


def build(ffn: FFNConfig) -> dict[str, Tensor]:
    return build_vit(NAME, ffn, IMAGE, 3, 0, **SMALL).state_dict()


def test_the_named_activation_goes_on_as_moa_and_what_is_assumed_is_said(tmp_path: Path) -> None:
    source = shake(build_vit(NAME, RELU2, IMAGE, 3, 0, **SMALL)).eval()
    path = str(tmp_path / "a.ckpt")
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": {"ffn": RELU2.as_dict()}}, path)
    net = build_vit(NAME, FFNConfig("moa", activation="relu2"), IMAGE, 3, 0, **SMALL).eval()
    assert load_encoder(net, path) == f"encoder from {path}"
    with torch.no_grad():
        assert torch.allclose(net.forward_features(images()), source.forward_features(images()), atol=1e-5)
    theirs = timm.create_model(NAME, num_classes=0, img_size=IMAGE, **SMALL)
    path = saved(tmp_path / "theirs.pth", theirs.state_dict(), "", None)
    said = load_encoder(classifier().vit, path)
    assert said.endswith("does not say its activation: gelu is assumed, as timm's model has it")
    with pytest.raises(UserError, match="compute gelu, and here relu2"):
        load_encoder(classifier(RELU2).vit, path)


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
