"""Nets that are built without their matrices get the values of those that are built whole, bit by bit."""

import pytest
import torch
from torch import nn

import tasks
from moa_lightning import FFNConfig
from moa_lightning.models import GPTConfig
from moa_lightning.models.init import initialize, materialize, vision_rule, without_matrices, without_start

FFNS = {
    "la": FFNConfig("la"),
    "paper": FFNConfig("moa", init="paper", gate_bias=True),
    "held": FFNConfig("moa", init="paper", base="held"),
    "both": FFNConfig("moa", form="gated", branches="both", match="parameters"),
    "polynorm": FFNConfig(activation="polynorm"),
    "places": FFNConfig(init="paper", attention_gate="moa", pointwise_norm="moa"),
}
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}),
    "rotary": ("eva02_tiny_patch14_224", {"depth": 1, "patch_size": 4}),
    "scaled": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "patch_size": 4, "embed_dim": 48, "num_heads": 2}),
}


def gpt(ffn: FFNConfig, tied: bool = False) -> tasks.Task:
    config = GPTConfig(depth=2, dim=32, num_heads=2, tie_embeddings=tied)
    return tasks.LanguageModeling(config, ffn, vocab_size=11, context_length=16)


def mae(ffn: FFNConfig, backbone: str = "vit") -> tasks.Task:
    name, options = BACKBONES[backbone]
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "image_size": 28, "channels": 1}
    return tasks.MAE(name, options, ffn, **sizes)


def dino(ffn: FFNConfig, backbone: str = "vit") -> tasks.Task:
    name, options = BACKBONES[backbone]
    sizes = {"out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "image_size": 28, "channels": 1}
    return tasks.DINO(name, options, ffn, **sizes, norm_last_layer=False)


TASKS = {
    **{f"{make.__name__} {name}": (make, ffn) for make in (gpt, mae, dino) for name, ffn in FFNS.items()},
    **{f"{make.__name__} on {name}": (make, FFNS["paper"], name) for make in (mae, dino) for name in BACKBONES},
    "tied": (gpt, FFNS["la"], True),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_values_are_those_of_a_net_built_whole(name: str) -> None:
    make, *arguments = TASKS[name]
    whole = make(*arguments).build(seed=3)
    torch.manual_seed(99)
    with without_matrices():
        net = make(*arguments).build(seed=3)
    assert all(module.weight.is_meta for module in net.modules() if isinstance(module, nn.Linear | nn.Embedding))
    assert without_start(net) == []
    materialize(net)
    for found, expected in ((net.state_dict(), whole.state_dict()), (dict(net.named_buffers()), whole.named_buffers())):
        expected = dict(expected)
        assert list(found) == list(expected)
        assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]
    trained = [key for key, parameter in whole.named_parameters() if parameter.requires_grad]
    assert [key for key, parameter in net.named_parameters() if parameter.requires_grad] == trained  # tied stay tied


class Pretrained(tasks.LanguageModeling):
    """Loads weights while it is built."""

    def build(self, seed: int) -> nn.Module:
        net = super().build(seed)
        net.load_state_dict(
            {name: torch.full_like(value, 0.5, device="cpu") for name, value in net.state_dict().items()}
        )
        return net


class Frozen(tasks.LanguageModeling):
    """Has a layer that nobody initialises by name."""

    def build(self, seed: int) -> nn.Module:
        net = super().build(seed)
        net.extra = nn.Linear(2, 2)
        return net


@pytest.mark.parametrize(("kind", "said"), [(Pretrained, "loaded weights"), (Frozen, "extra.weight")])
def test_what_does_not_follow_from_names_is_built_whole_and_the_log_says_so(
    kind: type[tasks.LanguageModeling], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = kind(GPTConfig(depth=1, dim=32, num_heads=2), vocab_size=11, context_length=16)
    with caplog.at_level("INFO"):
        task.configure_model()
    assert [r.message for r in caplog.records if "built whole" in r.message and said in r.message]
    assert not any(parameter.is_meta for parameter in task.net.parameters())
    if kind is Pretrained:
        assert all((parameter == 0.5).all() for parameter in task.net.parameters())


def test_a_rule_that_leaves_a_matrix_out_is_named() -> None:
    with without_matrices():
        net = nn.Sequential(nn.Embedding(3, 2))
    initialize(net, 0, vision_rule)
    with pytest.raises(TypeError, match=r"leaves a parameter of shape \(3, 2\) without a value"):
        materialize(net)
