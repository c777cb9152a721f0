"""What the tests of the nets share: the shipped feed-forward fragments, generic weights, FLOPs as torch counts them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moa_lightning import FFNConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def fragment(name: str) -> FFNConfig:
    """What configs/ffn/<name>.yaml describes, or configs/places/<name>.yaml."""
    folder = "places" if name in PLACES else "ffn"
    content = yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text())
    return FFNConfig(**content["model"]["init_args"]["ffn"])


FFNS = sorted(path.stem for path in (CONFIGS / "ffn").glob("*.yaml"))
PLACES = sorted(path.stem for path in (CONFIGS / "places").glob("*.yaml"))


@torch.no_grad()
def shake(net: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Add generic numbers to every trainable parameter, so that no test lives off a zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            size = scale * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def counted_flops(call: Callable[[], Any]) -> int:
    """Matrix-product FLOPs of a forward pass as torch's counter sees them, attention as plain matrix products; a mix is
    one operation to it and counts nothing."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def start(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def assert_same_where_shapes_agree(first: nn.Module, second: nn.Module, must_share: set[str]) -> None:
    """All common tensors of one shape are equal, and those named are among them."""
    one, two = start(first), start(second)
    shared = {name for name in one.keys() & two.keys() if one[name].shape == two[name].shape}
    assert must_share <= shared
    different = [name for name in shared if not torch.equal(one[name], two[name])]
    assert not [name for name in different if "_mix." not in name]
