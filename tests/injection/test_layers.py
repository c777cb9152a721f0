"""What a swapped layer keeps of the one before: biases, dtype, dropout, norms, frozen weights, sharing.

Single layers, each in a residual block of its own.
"""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

from moa_lightning import FeedForward, FFNConfig, UserError
from moa_lightning.injection import inject
from tests.injection.nets import GATED_MOA, MOA, block, difference, image, randomize, timm_model, tokens, vit

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
