"""timm models of every family keep their outputs, and their other MLPs are left alone."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, Mlp
from timm.models.mlp_mixer import ResBlock
from torch import nn

from moa_lightning import FeedForward, FFNConfig
from moa_lightning.injection import inject
from tests.injection.nets import BLOCKS, GATED_MOA, MOA, STAGES, WIDE, difference, image, mixer, swin, vit


def channel_mixing(i: int) -> str:
    return f"blocks.{i}.mlp_channels"


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, FFNConfig, list[str]]] = {
    "vit": (vit, 32, MOA, BLOCKS),
    "deit3": (partial(vit, "deit3_small_patch16_224"), 32, MOA, BLOCKS),
    "clip_quick_gelu": (partial(vit, "vit_base_patch16_clip_quickgelu_224"), 32, MOA, BLOCKS),
    "siglip": (partial(vit, "vit_base_patch16_siglip_224"), 32, MOA, BLOCKS),
    "relative_positions": (partial(vit, "vit_relpos_small_patch16_224"), 32, MOA, BLOCKS),
    "post_norm": (partial(vit, "vit_relpos_small_patch16_rpn_224"), 32, MOA, BLOCKS),
    "dinov2": (partial(vit, "vit_small_patch14_dinov2"), 28, MOA, BLOCKS),
    "dinov2_registers": (partial(vit, "vit_small_patch14_reg4_dinov2"), 28, MOA, BLOCKS),
    "dinov2_giant_packed": (partial(vit, "vit_giant_patch14_dinov2"), 28, GATED_MOA, BLOCKS),
    "dinov3": (partial(vit, "vit_small_patch16_dinov3"), 32, MOA, BLOCKS),
    "dinov3_plus_swiglu": (partial(vit, "vit_small_plus_patch16_dinov3"), 32, GATED_MOA, BLOCKS),
    "dinov3_7b": (partial(vit, "vit_7b_patch16_dinov3"), 32, GATED_MOA, BLOCKS),
    "eva02_swiglu": (partial(vit, "eva02_tiny_patch14_224"), 28, GATED_MOA, BLOCKS),
    "eva02_norm_inside": (partial(vit, "eva02_base_patch14_224"), 28, GATED_MOA, BLOCKS),
    "beit": (partial(vit, "beit_base_patch16_224"), 32, MOA, BLOCKS),
    "beitv2": (partial(vit, "beitv2_base_patch16_224"), 32, MOA, BLOCKS),
    "swin": (partial(swin, "swin_tiny_patch4_window7_224", 56), 56, MOA, STAGES),
    "swinv2": (partial(swin, "swinv2_tiny_window8_256", 64), 64, MOA, STAGES),
    "swinv2_cr": (partial(swin, "swinv2_cr_tiny_224", 64), 64, MOA, [n.replace("layers", "stages") for n in STAGES]),
    "cait": (partial(vit, "cait_xxs24_224"), 32, MOA, [*BLOCKS, *(f"blocks_token_only.{i}.mlp" for i in range(2))]),
    "mixer": (mixer, 32, MOA, [channel_mixing(0), channel_mixing(1)]),
    "resmlp": (partial(mixer, block_layer=ResBlock, mlp_ratio=4), 32, MOA, [channel_mixing(0), channel_mixing(1)]),
    "gmixer_packed": (
        partial(mixer, mlp_layer=partial(GluMlp, act_layer=nn.SiLU, gate_last=True)),
        32,
        GATED_MOA,
        [channel_mixing(0), channel_mixing(1)],
    ),
    "parallel": (
        partial(vit, "vit_small_patch16_18x2_224"),
        32,
        MOA,
        [f"blocks.{i}.ffns.{j}.mlp" for i in range(2) for j in range(2)],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_start_keeps_the_outputs(family: str) -> None:
    build, size, moa, names = FAMILIES[family]
    model, x = build(), image(size)
    before = model(x)
    features = model.forward_intermediates(x, intermediates_only=True)
    for config in (moa, FFNConfig(mixing="la", form=moa.form, dictionary=WIDE)):
        swapped = copy.deepcopy(model)
        report = inject(swapped, config)
        assert report.replaced == names
        assert report.reinitialized == []
        assert [n for n, m in swapped.named_modules() if isinstance(m, FeedForward)] == names
        assert difference(swapped(x), before) <= 1e-6
        for after, expected in zip(swapped.forward_intermediates(x, intermediates_only=True), features, strict=True):
            assert difference(after, expected) <= 1e-6
        last = swapped.get_submodule(names[-1])
        last.down_proj.weight.mul_(2)
        assert difference(swapped(x), before) > 1e-4, "the swapped layer does not take part in the output"


LEFT_ALONE = {
    "siglip": ("attn_pool.mlp", "attention pool"),
    "relative_positions": ("blocks.0.attn.rel_pos.mlp", "maps 2 numbers to 3"),
    "swinv2_cr": ("stages.0.blocks.0.attn.meta_mlp", "maps 2 numbers to 3"),
    "mixer": ("blocks.1.mlp_tokens", "mixes tokens"),
}


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_other_mlps_are_left_alone(family: str) -> None:
    build, _, config, _ = FAMILIES[family]
    model = build()
    name, reason = LEFT_ALONE[family]
    mlp = model.get_submodule(name)
    report = inject(model, config)
    assert reason in report.skipped[name]
    assert model.get_submodule(name) is mlp
    assert name in str(report) or "..." in str(report)


def test_token_mixing_is_told_by_its_role_not_its_width() -> None:
    model = mixer(dim=16)  # as wide as there are tokens
    assert inject(model, MOA).replaced == [channel_mixing(0), channel_mixing(1)]
    model, x = mixer(dim=16), image()
    before = model(x)
    assert inject(model, MOA, match=r"mlp_tokens").replaced == ["blocks.0.mlp_tokens", "blocks.1.mlp_tokens"]
    assert difference(model(x), before) <= 1e-6


def test_a_head_beside_blocks_is_left_alone() -> None:
    model = vit()
    model.head = Mlp(48, 96, 48)
    report = inject(model, MOA)
    assert report.replaced == BLOCKS
    assert "beside whole blocks" in report.skipped["head"]
