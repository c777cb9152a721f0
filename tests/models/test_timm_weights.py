"""Weights of timm in, weights for timm out: the same features either way, and sentences for files that do not fit."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import MaskedAutoencoder, SelfDistillation
from moa_lightning.models.timm_weights import timm_state
from moa_lightning.models.vit import build_vit
from tests.models.families import FAMILIES, IMAGE, SMALL, images
from tests.models.nets import shake

GATED = ("SwiGLU", "GluMlp")
NAME = FAMILIES[0]


def timm_net(name: str = NAME, **options):
    return shake(timm.create_model(name, **{"img_size": IMAGE, **SMALL, **options})).eval()


def saved(net, folder, name: str = "weights.safetensors") -> str:
    """A file of a net's weights, as timm publishes them."""
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    file = str(folder / name)
    save_file(state, file) if name.endswith("safetensors") else torch.save({"state_dict": state}, file)
    return file


def same_form(net, mixing: str) -> FFNConfig:
    """A layer of that kind in the place of timm's, which computes the same at the start."""
    gated = any(type(m).__name__ in GATED for m in net.modules())
    return FFNConfig(mixing, "gated" if gated else "plain", "silu" if gated else "gelu")


@pytest.mark.parametrize("mixing", ["fixed", "moa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_net_starts_from_the_weights_of_any_family_and_gives_them_back(name: str, mixing: str, tmp_path) -> None:
    theirs = timm_net(name, num_classes=7, drop_path_rate=0.0)
    file = saved(theirs, tmp_path)
    ours = build_vit(name, same_form(theirs, mixing), IMAGE, 3, 0, file, **SMALL).eval()
    with torch.no_grad():
        assert torch.allclose(ours.forward_features(images()), theirs.forward_features(images()), atol=2e-6)
    again = timm.create_model(name, num_classes=0, img_size=IMAGE, **SMALL).eval()
    state = timm_state(ours, again)
    if mixing == "moa":
        assert state is None, "timm has no such layer"
        return
    assert state is not None
    again.load_state_dict(state)
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    with torch.no_grad():
        assert torch.allclose(again(images()), ours(images()), atol=2e-6)


@pytest.mark.parametrize("config", [FFNConfig(activation="relu2"), FFNConfig(form="gated", activation="silu")])
def test_other_layers_are_not_passed_off_as_timms(config: FFNConfig) -> None:
    ours = build_vit(NAME, config, IMAGE, 3, 0, **SMALL)
    assert timm_state(ours, timm_net(num_classes=0)) is None


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_mae_and_dino_start_from_a_file(suffix: str, tmp_path) -> None:
    """MAE keeps the positions of the file and does not train them; DINO's teacher starts from them too."""
    theirs = timm_net(num_classes=3)
    file = saved(theirs, tmp_path, f"weights.{suffix}")
    ffn = FFNConfig("moa")
    mae = MaskedAutoencoder(
        NAME, SMALL, ffn, ffn, IMAGE, 3, decoder_dim=16, decoder_depth=1, decoder_heads=2, weights=file
    )
    dino = SelfDistillation(NAME, SMALL, ffn, IMAGE, 3, out_dim=8, hidden_dim=8, bottleneck_dim=4, weights=file).eval()
    assert torch.equal(mae.encoder.pos_embed, theirs.pos_embed)
    assert not mae.encoder.pos_embed.requires_grad
    with torch.no_grad():
        expected = theirs.forward_features(images())
        for net in (mae.encoder.eval(), dino.student.backbone, dino.teacher.backbone):
            assert torch.allclose(net.forward_features(images()), expected, atol=2e-6)


def test_sizes_and_channels_may_differ(tmp_path) -> None:
    """Grey images: the sum of the three channels, so that a grey image as RGB gives the same. Positions are resized."""
    theirs = timm_net(num_classes=3)
    file = saved(theirs, tmp_path)
    grey = build_vit(NAME, FFNConfig(), IMAGE, 1, 0, file, **SMALL).eval()
    with torch.no_grad():
        expected = theirs.forward_features(images(channels=1).expand(-1, 3, -1, -1))
        assert torch.allclose(grey.forward_features(images(channels=1)), expected, atol=1e-5)
    large = build_vit(NAME, FFNConfig(), 2 * IMAGE, 3, 0, file, **SMALL)
    assert large.pos_embed.shape == (1, 1 + 64, 48)
    assert torch.equal(large.pos_embed[:, :1], theirs.pos_embed[:, :1])


def test_a_pooling_net_gives_its_last_norm(tmp_path) -> None:
    """Weights of a net that pools first and norms then, for one that gives all its tokens."""
    name = "vit_medium_patch16_reg4_gap_256"
    theirs = timm_net(name)
    assert isinstance(theirs.norm, torch.nn.Identity)
    net = build_vit(name, FFNConfig(), IMAGE, 3, 0, saved(theirs, tmp_path), **SMALL, global_pool="")
    assert torch.equal(net.norm.weight, theirs.fc_norm.weight)


def test_files_that_do_not_fit_are_one_sentence(tmp_path) -> None:
    wide = saved(timm_net(embed_dim=64), tmp_path, "wide.safetensors")
    deep = saved(timm_net(depth=3), tmp_path, "deep.safetensors")
    flat = saved(timm_net(depth=1), tmp_path, "flat.safetensors")
    code = str(tmp_path / "code.pth")
    torch.save({"state_dict": timm_net().state_dict(), "run": print}, code)
    (tmp_path / "text.safetensors").write_text("no weights")
    for file, words in [
        (str(tmp_path / "none.safetensors"), "does not exist"),
        (str(tmp_path / "text.safetensors"), "cannot be read as weights of"),
        (code, "cannot be read as weights of"),
        (wide, r"other shapes, .*\(1, 1, 64\) and \(1, 1, 48\)"),
        (deep, r"12 tensors more, blocks\.2"),
        (flat, r"lacks 12 tensors, blocks\.1"),
    ]:
        with pytest.raises(UserError, match=words):
            build_vit(NAME, FFNConfig(), IMAGE, 3, 0, file, **SMALL)
