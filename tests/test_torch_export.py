"""A net with any feed-forward layer of configs/ffn exports to a program that computes the same, for any batch."""

from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim, export

from moa_lightning import FFNConfig, inject
from moa_lightning.benchmarking.layers import trained
from moa_lightning.models import GPT, GPTConfig

FFN = Path(__file__).parents[1] / "configs" / "ffn"
NAMES = sorted(path.stem for path in FFN.glob("*.yaml"))
DIM, HEADS, VOCAB, CONTEXT = 16, 2, 11, 8


def config(name: str) -> FFNConfig:
    values = yaml.safe_load((FFN / f"{name}.yaml").read_text())["model"]["init_args"]["ffn"]
    return FFNConfig(**values)


def gpt(ffn: FFNConfig) -> tuple[nn.Module, Tensor, Tensor]:
    net = GPT(GPTConfig(depth=1, dim=DIM, num_heads=HEADS), ffn, VOCAB, CONTEXT)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():  # the projections into the stream start at zero, which would hide the layer
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net, *(torch.randint(VOCAB, (batch, CONTEXT)) for batch in (3, 5))


def vit(ffn: FFNConfig) -> tuple[nn.Module, Tensor, Tensor]:
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=DIM, depth=1, num_heads=HEADS, num_classes=7
    )
    assert len(inject(net, ffn).replaced) == 1
    return net, *(torch.randn(batch, 3, 16, 16) for batch in (3, 5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [gpt, vit])
def test_an_exported_net_computes_the_same_for_any_batch(build, name: str) -> None:
    torch.manual_seed(0)
    net, example, other = build(config(name))
    net = trained(net).eval()
    program = export(net, (example,), dynamic_shapes=({0: Dim("batch", min=2)},))
    for batch in (example, other):
        torch.testing.assert_close(program.module()(batch), net(batch))
    mixes = sum(node.target is torch.ops.moa.mix.default for node in program.graph.nodes)
    assert mixes == (0 if config(name).mixing == "fixed" else 1)  # one operation a block
