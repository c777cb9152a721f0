"""Small models and layers with random weights everywhere, and how far two outputs lie apart.

The yardstick of the tests is the model itself before the swap, or the same model with its activation modules
exchanged by hand. Expected names are written out; tolerances are norm of the difference over norm in float32.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.activations import DICTIONARY
from moa_lightning.models import GPT, GPTConfig

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


def gpt(config: FFNConfig) -> GPT:
    net = GPT(GPTConfig(depth=2, dim=16, num_heads=2), config, vocab_size=11, context_length=8)
    randomize(net)
    return net.eval()


ids = torch.arange(16).reshape(2, 8) % 11
