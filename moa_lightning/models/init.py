"""Initial values from (seed, parameter name) alone, also where only a part of a parameter is kept.

Every parameter is drawn by a generator of its own, on the CPU. So all ranks, any world size, device and all variants of
an ablation start from the same numbers wherever names and shapes agree: swapping the activation does not reshuffle the
rest of the net.

Hence a net need not be held in full to be sharded. In `without_matrices` it is built with the weights of its linear,
convolution and embedding layers on the meta device, and everything small (norms, tokens, position tables, mixes) as
ever; `initialize` notes how the former are drawn; after sharding `materialize` draws them one by one in full and keeps
this process's part. Initialising the shards themselves would give every rank the same rows.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..experts import StackedLinear
from ..mixing import FixedActivation, MixCoefficients
from ..moe import Router
from ..random import named_seed
from ..sharded import local, sharded_as

Rule = Callable[[nn.Module, str, Tensor, torch.Generator], None]

MATRICES = (nn.Linear, nn.Conv2d, nn.Embedding, StackedLinear)  # every rule writes what these hold
NOTE = "_draws"  # attribute of a module: parameter name -> function that draws its value into a tensor


@torch.no_grad()
def initialize(net: nn.Module, seed: int, rule: Rule) -> None:
    """Write initial values into a net in place; what stands on the meta device waits for `materialize`.

    Args:
        net: any net; the coefficients of its mixes and its routers take their own start.
        rule: called as rule(module, qualified parameter name, tensor on the CPU, generator) for every other trainable
            parameter; what it leaves alone keeps the value that it was built with. Of the module it may read types and
            shapes, not values.
    """
    for name, module in net.named_modules():
        if isinstance(module, MixCoefficients | FixedActivation | Router) and _on_meta(module):
            module.to_empty(device="cpu")  # it is small
            if isinstance(module, FixedActivation):
                module.reset_parameters()
        if isinstance(module, MixCoefficients | Router):
            module.reset_parameters(_generator(seed, name))
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{leaf}" if name else leaf
            draw = partial(_draw, rule, module, full_name, seed)
            if parameter.is_meta:
                module.__dict__.setdefault(NOTE, {})[leaf] = draw
            elif parameter.requires_grad:
                draw(parameter)


def _draw(rule: Rule, module: nn.Module, name: str, seed: int, value: Tensor) -> None:
    rule(module, name, value, _generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(seed, name))


def _on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@contextmanager
def without_matrices() -> Iterator[None]:
    """Nets built in this block have the weights and biases of MATRICES on the meta device.

    Raises:
        UserWarning: weights are loaded into such a net, which would lose them.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not isinstance(module, MATRICES) or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*meta parameter in the current model, which is a no-op")
            yield
    finally:
        hook.remove()


def without_start(net: nn.Module) -> list[str]:
    """Names of parameters and buffers on the meta device that `materialize` could not draw."""
    noted = {id(module._parameters[leaf]) for module in net.modules() for leaf in module.__dict__.get(NOTE, {})}
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_meta and id(tensor) not in noted]


@torch.no_grad()
def materialize(net: nn.Module) -> None:
    """Give the noted parameters of a net their values, in place, at most one of them in full at a time.

    Of a sharded parameter (DTensor) this process keeps its part. One that stands in several places stays one, with the
    value of the last place, as `initialize` would leave it.

    Raises:
        TypeError: the rule does not write a noted parameter.
    """
    draws: dict[nn.Parameter, Callable[[Tensor], None]] = {}
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for leaf, draw in module.__dict__.pop(NOTE, {}).items():
            parameter = module._parameters[leaf]
            if parameter is not None and parameter.is_meta:
                draws[parameter] = draw
                places.setdefault(parameter, []).append((module, leaf))
    sharded = [p.numel() * p.element_size() for p in draws if isinstance(p, DTensor)]
    room = torch.empty(max(sharded, default=0), dtype=torch.uint8, device="cpu")  # one for all: new ones leave gaps
    for parameter, draw in draws.items():
        value = _part(parameter, draw, room) if isinstance(parameter, DTensor) else _whole(parameter, draw)
        filled = nn.Parameter(value, parameter.requires_grad)
        for module, leaf in places[parameter]:
            setattr(module, leaf, filled)


def _part(parameter: DTensor, draw: Callable[[Tensor], None], room: Tensor) -> DTensor:
    """This process's part of a parameter that is drawn in full in `room`, uint8 (bytes,)."""
    full = room[: parameter.numel() * parameter.element_size()].view(parameter.dtype).view(parameter.shape)
    _fill(full, draw)
    part = local(sharded_as(full, parameter))
    if part.untyped_storage().data_ptr() == room.untyped_storage().data_ptr():  # some versions of torch cut views
        part = part.clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def _whole(parameter: Tensor, draw: Callable[[Tensor], None]) -> Tensor:
    value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    _fill(value, draw)
    return value


def _fill(value: Tensor, draw: Callable[[Tensor], None]) -> None:
    value.view(-1)[:1] = torch.nan
    draw(value)
    if value.view(-1)[0].isnan():
        raise TypeError(f"{draw} leaves a parameter of shape {tuple(value.shape)} without a value")


def vision_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Normal of standard deviation 0.02 for matrices and tokens; zero biases.

    timm and DINO truncate it at ±2, a hundred standard deviations away, which changes no number. The patch
    projection is drawn like torch's convolution (uniform, bound 1/sqrt(fan-in)).
    """
    if isinstance(module, nn.Linear):
        if name.endswith("weight"):
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.zero_()
    elif isinstance(module, nn.Conv2d):
        bound = math.prod(module.weight.shape[1:]) ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif name.endswith(("_token", "pos_embed")):
        parameter.normal_(std=0.02, generator=generator)


def mae_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """MAE's own start (He et al., arXiv 2111.06377, official code): Xavier-uniform matrices, the patch projection as a
    matrix too, tokens normal with standard deviation 0.02, zero biases (there the patch projection's keeps torch's
    uniform draw)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        if name.endswith("weight"):
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
        else:
            parameter.zero_()
    elif name.endswith(("_token", "pos_embed")):
        parameter.normal_(std=0.02, generator=generator)
