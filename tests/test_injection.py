"""Injection into real models of every family, small and with random weights everywhere.

The yardstick is the model itself before the swap, or the same model with its activation modules exchanged by hand.
Expected names are written out; tolerances are norm of the difference over norm in float32.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GELU, GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU, SwiGLUPacked
from timm.layers.activations_me import SwishMe
from timm.models.mlp_mixer import MlpMixer, ResBlock
from torch import Tensor, nn

from moa_lightning import FeedForward, FFNConfig, UserError
from moa_lightning.activations import DICTIONARY
from moa_lightning.injection import inject
from moa_lightning.injection_adapters import activation_name
from moa_lightning.models.gpt import GPT, GPTConfig

WIDE = (*DICTIONARY, "gelu_tanh", "quick_gelu")
MOA = FFNConfig(mixing="moa", dictionary=WIDE)
GATED_MOA = FFNConfig(mixing="moa", form="gated", branches="both", dictionary=WIDE)
BLOCKS = ["blocks.0.mlp", "blocks.1.mlp"]
STAGES = [f"layers.{i}.blocks.0.mlp" for i in range(4)]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in every parameter: layer scales, biases and norms as well, so that every part shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * noise).to(parameter.dtype))
    return model


def timm_model(name: str, **options: Any) -> nn.Module:
    return randomize(timm.create_model(name, pretrained=False, num_classes=7, **options)).eval()


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    size = 28 if "patch14" in name else 32
    return timm_model(name, **{"img_size": size, "depth": 2, "embed_dim": 48, "num_heads": 3, **options})


def swin(name: str, size: int) -> nn.Module:
    return timm_model(name, img_size=size, embed_dim=24, depths=(1, 1, 1, 1))


def mixer(dim: int = 24, **options: Any) -> nn.Module:
    """16 tokens."""
    return randomize(MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=dim, num_classes=7, **options)).eval()


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


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


# Single layers, each in a residual block of its own


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, dim: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def block(layer: Callable[..., nn.Module] = Mlp, **options: Any) -> nn.Module:
    return randomize(Block(layer(12, 20, **options)))


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


BIASES = [True, False, (True, False), (False, True)]
GATED_LAYERS = {
    "swiglu": SwiGLU,
    "packed": SwiGLUPacked,
    "packed_gate_last": partial(GluMlp, act_layer=nn.SiLU, gate_last=True),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["mlp", *GATED_LAYERS])
def test_biases_follow_the_layer_not_the_config(kind: str, bias: Any) -> None:
    model = block(GATED_LAYERS.get(kind, Mlp), bias=bias)
    before = model(tokens())
    inject(model, FFNConfig(mixing="moa", form="plain" if kind == "mlp" else "gated", bias=bias is False))
    has = (bias, bias) if isinstance(bias, bool) else bias
    layer = model.mlp
    assert (layer.up_proj.bias is not None, layer.down_proj.bias is not None) == has
    if layer.gate_proj is not None:
        assert (layer.gate_proj.bias is not None) == has[0]
    assert difference(model(tokens()), before) <= 1e-6


def test_fixed_uses_the_activation_of_the_config() -> None:
    model = vit()
    by_hand = copy.deepcopy(model)
    for module in by_hand.modules():
        if isinstance(module, Mlp):
            module.act = nn.Tanh()
    assert inject(model, FFNConfig(activation="tanh")).reinitialized == []
    assert difference(model(image()), by_hand(image())) <= 1e-6


def test_paper_start_keeps_projections_and_takes_any_activation() -> None:
    model = block(act_layer=nn.Mish)
    weight = model.mlp.fc1.weight.clone()
    report = inject(model, FFNConfig(mixing="moa", init="paper"))
    layer = model.mlp
    assert report.reinitialized == []
    assert torch.equal(layer.up_proj.weight, weight)
    assert torch.allclose(layer.up_mix.base, torch.full((7,), 0.5))
    assert 0.01 < float(layer.up_mix.gate_weight.detach().std()) < 0.03


def test_the_start_is_the_layers_own_activation() -> None:
    model = block(act_layer=nn.ReLU)
    inject(model, FFNConfig(mixing="la", activation="silu"))
    assert model.mlp.config.activation == "relu"
    assert model.mlp.up_mix.coefficients(tokens())[0, 0].tolist() == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("match", "hidden"),
    # plain, d = 12, h = 20: 2dh + h + d = 512 parameters, 4dh = 960 FLOPs; gated: 3dh' + 2h' + d and 6dh'
    [("width", 20), ("parameters", round((512 - 12) / 38)), ("flops", round(960 / 72))],
)
def test_another_form_is_drawn_afresh_at_the_matched_width(match: Any, hidden: int) -> None:
    model = block()
    report = inject(model, FFNConfig(form="gated", activation="silu", match=match))
    assert report.reinitialized == report.replaced == ["mlp"]
    assert model.mlp.hidden_dim == hidden
    assert model.mlp.down_proj.weight.shape == (12, hidden)
    assert "fresh" in str(report)
    assert model(tokens()).isfinite().all()


def test_the_same_form_is_drawn_afresh_only_where_the_width_changes() -> None:
    # MoA, K = 7: gates and α take 7 · 12 + 7 = 91 parameters, 25 a hidden neuron: 3.64 neurons fewer
    model = block()
    assert inject(model, FFNConfig(mixing="moa", match="parameters")).reinitialized == ["mlp"]
    assert model.mlp.hidden_dim == 16
    model = block()
    weight = model.mlp.fc1.weight
    assert inject(model, FFNConfig(mixing="la", match="flops")).reinitialized == []
    assert model.mlp.up_proj.weight is weight


def test_fresh_layers_have_the_biases_of_the_layer() -> None:
    model = block(bias=(False, True))
    inject(model, FFNConfig(form="gated", bias=False))
    assert model.mlp.up_proj.bias is None
    assert model.mlp.gate_proj.bias is None
    assert model.mlp.down_proj.bias is not None


@pytest.mark.parametrize(
    "config", [FFNConfig(form="gated"), FFNConfig(mixing="moa", init="paper"), FFNConfig(mixing="moa", form="gated")]
)
def test_random_starts_depend_on_seed_and_name_only(config: FFNConfig) -> None:
    def state(seed: int, match: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = vit()
        torch.manual_seed(seed + 10)
        before = torch.get_rng_state()
        inject(model, config, match=match, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.blocks[1].mlp.state_dict()

    first, again, other = state(0, None), state(0, r"blocks\.1\."), state(1, None)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_random_starts_differ_between_layers() -> None:
    model = vit()
    inject(model, FFNConfig(form="gated"))
    assert not torch.equal(model.blocks[0].mlp.up_proj.weight, model.blocks[1].mlp.up_proj.weight)
    assert not torch.equal(model.blocks[0].mlp.up_proj.weight, model.blocks[0].mlp.gate_proj.weight)


@pytest.mark.parametrize("form", ["plain", "gated"])
def test_dtype_and_mode_are_kept_and_coefficients_stay_in_float32(form: Any) -> None:
    model = block().to(torch.bfloat16).eval()
    inject(model, FFNConfig(mixing="moa", form=form))
    layer = model.mlp
    assert {p.weight.dtype for p in layer.projections()} == {torch.bfloat16}
    assert {m.base.dtype for m in layer.mixings().values()} == {torch.float32}
    assert not any(m.training for m in layer.modules())
    assert model(tokens(torch.bfloat16)).dtype == torch.bfloat16
    model = block().double().train()
    inject(model, FFNConfig(mixing="moa", form=form))
    assert {p.dtype for p in model.mlp.parameters()} == {torch.float64}
    assert model.mlp.training


@pytest.mark.parametrize("layer", [Mlp, SwiGLU, SwiGLUPacked])
def test_frozen_projections_stay_frozen(layer: Any) -> None:
    model = block(layer)
    model.mlp.fc2.weight.requires_grad_(False)
    (model.mlp.fc1_x if layer is SwiGLU else model.mlp.fc1).weight.requires_grad_(False)
    inject(model, FFNConfig(mixing="la", form="plain" if layer is Mlp else "gated"))
    assert not model.mlp.up_proj.weight.requires_grad
    assert not model.mlp.down_proj.weight.requires_grad
    assert model.mlp.up_proj.bias.requires_grad
    assert next(iter(model.mlp.mixings().values())).base.requires_grad


def test_a_norm_inside_the_layer_is_kept_or_resized() -> None:
    model = vit("eva02_base_patch14_224")
    norm, hidden = model.blocks[0].mlp.norm, model.blocks[0].mlp.norm.normalized_shape[0]
    inject(model, GATED_MOA)
    assert model.blocks[0].mlp.norm is norm
    model = vit("eva02_base_patch14_224")
    inject(model, FFNConfig(form="plain", match="flops"))  # 6dh = 4dh'
    resized = model.blocks[0].mlp.norm
    assert resized.normalized_shape == (3 * hidden // 2,)
    assert (type(resized), resized.eps) == (type(norm), norm.eps)
    assert resized.weight.unique().tolist() == [1]
    assert model(image(28)).isfinite().all()


def test_a_norm_that_cannot_be_resized_is_an_error() -> None:
    class Standardize(nn.Module):
        def __init__(self, width: int, device: Any, dtype: Any) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

    model = block(norm_layer=Standardize)
    with pytest.raises(UserError, match=r"'mlp' has a Standardize .* ffn\.match"):
        inject(model, FFNConfig(form="gated", match="flops"))
    assert isinstance(model.mlp, Mlp)


def test_dropout_is_carried() -> None:
    model = block(drop=0.25)
    inject(model, MOA)
    assert model.mlp.drop.p == 0.25
    assert model.mlp.training
    assert difference(model(tokens()), model(tokens())) > 0.01
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize("rates", [(0.25, 0.0), (0.0, 0.25)])
def test_each_dropout_rate_is_carried(rates: tuple[float, float]) -> None:
    model = block(drop=rates)
    inject(model, FFNConfig(activation="relu"))
    inject(model, MOA)  # and once more from our own layer
    model.mlp.down_proj.weight.data = torch.eye(12, 20)
    model.mlp.down_proj.bias.data.fill_(1.0)
    torch.manual_seed(0)
    values = model.mlp(tokens().abs().repeat(8, 8, 1))
    dropped_at_output = float((values == 0).float().mean())  # dropping the hidden vector leaves the bias, 1
    assert abs(dropped_at_output - rates[1]) < 0.05
    assert (model.mlp.hidden_drop is not None, model.mlp.drop is not None) == tuple(rate > 0 for rate in rates)


def test_a_shared_layer_is_swapped_once_and_stays_shared() -> None:
    model, x = timm_model("coat_tiny", img_size=32).double(), image(32).double()
    before = model(x)
    report = inject(model, MOA)
    assert "parallel_blocks.0.mlp2" in report.replaced
    assert not any("mlp3" in name or "mlp4" in name for name in report.replaced)
    parallel = model.parallel_blocks[0]
    assert isinstance(parallel.mlp2, FeedForward)
    assert parallel.mlp2 is parallel.mlp3 is parallel.mlp4
    assert difference(model(x), before) <= 1e-14


def test_state_dicts_round_trip(tmp_path: Any) -> None:
    def build(seed: int) -> nn.Module:
        model = vit("vit_giant_patch14_dinov2")
        inject(model, GATED_MOA)
        return randomize(model, seed)

    model, other = build(3), build(4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert difference(other(image(28)), model(image(28))) > 1e-3
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(image(28)), model(image(28)))


@pytest.mark.parametrize("config", [GATED_MOA, FFNConfig(mixing="moa", match="parameters")])
def test_meta_models_get_the_same_layers(config: FFNConfig) -> None:
    built = vit("vit_giant_patch14_dinov2", embed_dim=24)
    report = inject(built, config)
    with torch.device("meta"):
        model = vit_on_meta()
        meta_report = inject(model, config)
    assert meta_report == report
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in built.state_dict().items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()} == shapes


def vit_on_meta() -> nn.Module:
    return timm.create_model(
        "vit_giant_patch14_dinov2", img_size=28, depth=2, embed_dim=24, num_heads=3, num_classes=7
    ).eval()


def test_injection_under_a_meta_context_leaves_a_cpu_model_on_the_cpu() -> None:
    model, x = block(), tokens()
    before = model(x)
    with torch.device("meta"):
        inject(model, MOA)
    assert difference(model(x), before) <= 1e-6


# Errors: the model stays as it was


def test_nothing_to_swap_names_the_model_and_what_was_left() -> None:
    with pytest.raises(UserError, match="ResNet has no feed-forward layer"):
        inject(timm.create_model("resnet18"), MOA)
    model = vit()
    with pytest.raises(UserError, match=r"VisionTransformer .*blocks\.0\.mlp, blocks\.1\.mlp \(match does not select"):
        inject(model, MOA, match="nothing_is_called_so")
    with pytest.raises(UserError, match=r"Conv2d, not Linear"):
        inject(Block(Mlp(12, 20, use_conv=True)), MOA)
    with pytest.raises(UserError, match="the model itself"):
        inject(Mlp(12, 20), MOA)
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        inject(model, MOA, match="(")


def test_a_class_with_a_forward_pass_of_its_own_is_left_alone() -> None:
    class ScaledMlp(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class RenamedMlp(Mlp):
        pass

    model = nn.Sequential(Block(ScaledMlp(12, 20)), Block(RenamedMlp(12, 20)))
    report = inject(model, MOA)
    assert report.replaced == ["1.mlp"]
    assert "computes something else" in report.skipped["0.mlp"]


@pytest.mark.parametrize(
    ("activation", "config", "message"),
    [
        (nn.Mish, MOA, r"activation Mish of layer 'blocks\.1\.mlp'"),
        (nn.PReLU, MOA, r"activation PReLU of layer 'blocks\.1\.mlp'"),
        (
            GELUTanh,
            FFNConfig(mixing="la"),
            r"'gelu_tanh', the activation of layer 'blocks\.1\.mlp', in ffn\.dictionary",
        ),
    ],
)
def test_an_activation_that_no_mix_can_start_from_is_an_error(activation: Any, config: FFNConfig, message: str) -> None:
    model = vit()
    model.blocks[1].mlp.act = activation()
    before, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        inject(model, config)
    assert list(model.modules()) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(inject(model, FFNConfig(activation="gelu")).replaced) == 2  # a fixed activation replaces any other


def test_match_selects_by_callable_and_by_expression() -> None:
    def last(name: str, module: nn.Module) -> bool:
        return name == "blocks.1.mlp" and isinstance(module, Mlp)

    for match in (last, r"^blocks\.1\."):
        model = vit()
        report = inject(model, MOA, match=match)
        assert report.replaced == ["blocks.1.mlp"]
        assert report.skipped == {"blocks.0.mlp": "match does not select it"}
        assert isinstance(model.blocks[0].mlp, Mlp)
    model = vit("vit_base_patch16_siglip_224")
    assert inject(model, MOA, match=r"attn_pool\.mlp").replaced == ["attn_pool.mlp"]


def test_the_report_reads_well() -> None:
    report = inject(vit("vit_base_patch16_siglip_224"), FFNConfig(form="gated"))
    assert str(report).splitlines() == [
        "swapped 2 feed-forward layers: blocks.0.mlp, blocks.1.mlp",
        "drew fresh projections for 2: blocks.0.mlp, blocks.1.mlp",
        "left alone 1: attn_pool.mlp (it belongs to an attention pool)",
    ]
    assert "blocks.0.mlp, blocks.1.mlp ... blocks.7.mlp" in str(inject(vit(depth=8, embed_dim=12), MOA))


# Models that hold FeedForwards already


def gpt(config: FFNConfig) -> GPT:
    net = GPT(GPTConfig(depth=2, dim=16, num_heads=2), config, vocab_size=11, context_length=8)
    randomize(net)
    return net.eval()


ids = torch.arange(16).reshape(2, 8) % 11


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FFNConfig(), FFNConfig(mixing="la")),
        (FFNConfig(activation="relu2", bias=False), FFNConfig(mixing="moa", gate="tanh")),
        (FFNConfig(form="gated", activation="silu"), FFNConfig(form="gated", mixing="moa", branches="pairs")),
        (FFNConfig(mixing="la"), FFNConfig(mixing="moa", gate="softmax", gate_bias=True, base="held")),
        (FFNConfig(mixing="la", init="paper", activation="quick_gelu"), FFNConfig(mixing="moa")),
        (FFNConfig(mixing="la", form="gated", branches="both"), FFNConfig(mixing="moa", form="gated", branches="both")),
        (FFNConfig(mixing="moa"), FFNConfig(mixing="moa", gate_bias=True)),
    ],
)
def test_our_gpt_takes_a_larger_member_and_keeps_its_function(old: FFNConfig, new: FFNConfig) -> None:
    net = gpt(old)
    before = net(ids)
    report = inject(net, new)
    assert report.replaced == BLOCKS
    assert report.reinitialized == []
    assert net.blocks[0].mlp.config.mixing == new.mixing
    assert difference(net(ids), before) <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FFNConfig(mixing="moa"), FFNConfig(mixing="la")),
        (FFNConfig(mixing="moa"), FFNConfig(mixing="moa", gate="tanh")),
        (FFNConfig(mixing="moa", gate_bias=True), FFNConfig(mixing="moa")),
        (FFNConfig(mixing="la"), FFNConfig(mixing="la", dictionary=("identity", "gelu"))),
        (FFNConfig(activation="polynorm"), FFNConfig(mixing="la")),
    ],
)
def test_a_function_that_the_new_layer_cannot_start_from_is_an_error(old: FFNConfig, new: FFNConfig) -> None:
    net = gpt(old)
    with pytest.raises(UserError, match=r"layer 'blocks\.0\.mlp'"):
        inject(net, new)
    assert net.blocks[0].mlp.config == old


def test_a_fixed_activation_with_parameters_can_be_injected() -> None:
    net = gpt(FFNConfig())
    inject(net, FFNConfig(activation="polynorm"))
    reference = GPT(GPTConfig(depth=2, dim=16, num_heads=2), FFNConfig(activation="polynorm"), 11, 8).eval()
    missing, unexpected = reference.load_state_dict(net.state_dict())
    assert not missing
    assert not unexpected
    assert torch.equal(net(ids), reference(ids))
    weight = net.blocks[0].mlp.up_mix.activation.weight
    assert torch.allclose(weight, torch.full((3,), 1 / 3))


# Activations by their values


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (GELU(), "gelu"),
        (GELUTanh(), "gelu_tanh"),
        (QuickGELU(), "quick_gelu"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (SwishMe(), "silu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2), None),
        (nn.Tanh(), "tanh"),
        (nn.Identity(), "identity"),
        (nn.ReLU6(), None),
        (nn.Sigmoid(), None),
        (nn.RReLU(), None),
        (nn.PReLU(init=0.01), None),
        (nn.Softmax(-1), None),
        (nn.GLU(), None),
        ("silu", "silu"),
        ("xielu", None),
    ],
)
def test_activations_are_named_by_their_values(module: Any, name: str | None) -> None:
    state = torch.get_rng_state()
    assert activation_name(module) == name
    assert torch.equal(torch.get_rng_state(), state)


# transformers


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "relu2", "linear"])
def test_activations_of_transformers(kind: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    expected = {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "linear": "identity",
    }
    assert activation_name(activations.ACT2FN[kind]) == expected.get(kind, kind)
    assert activation_name(activations.ACT2FN["gelu_10"]) is None


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


def test_gpt2_of_transformers() -> None:
    model = gpt2()
    before = model(ids).logits
    with pytest.raises(UserError, match=r"'gelu_tanh', the activation of layer 'transformer\.h\.0\.mlp'"):
        inject(model, FFNConfig(mixing="moa"))
    report = inject(model, MOA)
    assert report.replaced == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert report.reinitialized == []
    assert model.transformer.h[0].mlp.up_proj.weight.shape == (128, 32)
    assert difference(model(ids).logits, before) <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_llama_of_transformers(bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=11, mlp_bias=bias)
    model = randomize(transformers.LlamaForCausalLM(config)).eval()
    before = model(ids).logits
    report = inject(model, GATED_MOA)
    assert report.replaced == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (model.model.layers[1].mlp.up_proj.bias is not None) == bias
    assert difference(model(ids).logits, before) <= 1e-6


def test_timm_models_need_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails now
    assert inject(vit(), MOA).replaced == BLOCKS
