"""What cannot be swapped is an error that names it, and the model stays as it was; what the report says."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from moa_lightning import FFNConfig, UserError
from moa_lightning.injection import inject
from tests.injection.nets import MOA, Block, vit


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
