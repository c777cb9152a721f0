"""timm vision transformers by name, with swapped feed-forward layers."""

import math

import pytest
import timm
import torch

from moa_lightning import FeedForward, FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models.vit import build_vit, sincos_positions
from tests.models.families import FAMILIES, IMAGE, SMALL, images
from tests.models.nets import fragment, start
from tests.official import SINGLE, close, needs_official, official


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_timms_own_at_the_identity_start(name: str) -> None:
    """Same random numbers, the layers swapped for MoA at the identity start: the function is the same."""
    torch.manual_seed(7)
    theirs = timm.create_model(name, num_classes=0, img_size=IMAGE, in_chans=3, **SMALL).eval()
    kind = [m for m in theirs.modules() if type(m).__name__ in ("SwiGLU", "GluMlp")]
    ffn = FFNConfig("moa", "gated", "silu", branches="both") if kind else FFNConfig("moa")
    ours = build_vit(name, ffn, IMAGE, 3, 7, **SMALL).eval()
    assert sum(isinstance(m, FeedForward) for m in ours.modules()) == 2
    assert sum(isinstance(m, FeedForward) for m in theirs.modules()) == 0
    with torch.no_grad():
        expected = theirs.forward_features(images())
        assert close(ours.forward_features(images()), expected, 2e-6)
        assert close(ours(images()), theirs(images()), 2e-6)


@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (1, 8), (3, 8)])
def test_channels_and_patch_size_are_options(channels: int, patch: int) -> None:
    net = build_vit(FAMILIES[0], FFNConfig(), IMAGE, channels, 0, **{**SMALL, "patch_size": patch})
    assert net.patch_embed.proj.weight.shape == (48, channels, patch, patch)
    assert net.forward_features(images(channels=channels)).shape == (2, 1 + (IMAGE // patch) ** 2, 48)


def test_the_start_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = start(build_vit(FAMILIES[0], fragment("moa_paper"), IMAGE, 3, 0, **SMALL))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = start(build_vit(FAMILIES[0], fragment("moa_paper"), IMAGE, 3, 0, **SMALL))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert state.shape == torch.get_rng_state().shape


def test_unknown_names_are_refused_with_similar_ones() -> None:
    with pytest.raises(UserError, match=r"'vit_tinny'.*similar names: .*vit_"):
        build_vit("vit_tinny", FFNConfig(), IMAGE, 3, 0)


@pytest.mark.parametrize(
    "options",
    [{"embed_dims": 48}, {"embed_dim": 50, "num_heads": 4}, {"patch_size": 0}],
    ids=["name", "heads", "patch"],
)
def test_options_that_timm_does_not_take_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="cannot build 'vit_tiny_patch16_224'"):
        build_vit("vit_tiny_patch16_224", FFNConfig(), IMAGE, 3, 0, **{**SMALL, **options})


@needs_official
def test_positions_are_the_official_ones() -> None:
    assert close(sincos_positions(48, 8, 8, prefix=1), official("mae_sincos_dim48_grid8_cls"), SINGLE)


def test_positions_of_a_grid_that_is_not_square() -> None:
    """The first half of the channels tells the column, the second the row."""
    table = sincos_positions(8, 2, 3).unflatten(0, (2, 3))
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert table.flatten(0, 1).unique(dim=0).shape == (6, 8)
    expected = [f(p * w) for p in (2.0, 1.0) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table[1, 2].tolist() == pytest.approx(expected)


def test_positions_need_a_multiple_of_four() -> None:
    with pytest.raises(UserError, match="multiple of 4, not 10"):
        sincos_positions(10, 2, 2)
