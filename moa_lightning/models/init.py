"""Initial values from (seed, parameter name) alone.

Every parameter is drawn by a generator of its own. So all ranks, any world size and all variants of an ablation start
from the same numbers wherever names and shapes agree: swapping the activation does not reshuffle the rest of the net.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..mixing import MixCoefficients
from ..random import named_seed

Rule = Callable[[nn.Module, str, Tensor, torch.Generator], None]


@torch.no_grad()
def initialize(net: nn.Module, seed: int, rule: Rule) -> None:
    """Write initial values into a net in place.

    Args:
        net: any net; the coefficients of its mixes take their own start.
        rule: called as rule(module, qualified parameter name, parameter, generator) for every other trainable
            parameter; what it leaves alone keeps the value that it was built with.
    """
    for name, module in net.named_modules():
        if isinstance(module, MixCoefficients):
            module.reset_parameters(_generator(seed, name))
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{leaf}" if name else leaf
            if parameter.requires_grad:
                rule(module, full_name, parameter, _generator(seed, full_name))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(seed, name))


def vision_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Truncated normal of standard deviation 0.02 for matrices and tokens, as timm and DINO have it; zero biases.

    The patch projection is drawn like torch's convolution (uniform, bound 1/sqrt(fan-in)).
    """
    if isinstance(module, nn.Linear):
        if name.endswith("weight"):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        else:
            parameter.zero_()
    elif isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif name.endswith(("_token", "pos_embed")):
        nn.init.trunc_normal_(parameter, std=0.02, generator=generator)


def mae_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """MAE's own start (He et al., arXiv 2111.06377, official code): Xavier-uniform matrices, the patch projection as a
    matrix too, tokens normal with standard deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        if name.endswith("weight"):
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
        else:
            parameter.zero_()
    elif name.endswith(("_token", "pos_embed")):
        parameter.normal_(std=0.02, generator=generator)
