"""Weights of timm's vision transformers: from a file into a net, and from ours into timm's names.

Files are read as tensors only (safetensors, or torch.load with weights_only), by timm's own filters, which know the
layouts of DINO, DINOv2, MAE, CLIP and others and resize patches and positions. A FeedForward that computes what timm's
layer computes is written back under timm's names, the inverse of what injection_adapters.py reads.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from ..activations import is_pointwise
from ..errors import UserError
from ..feedforward import FeedForward
from ..injection_adapters import activation_name

OF_A_HEAD = ("head.", "head_dist.", "fc_norm.", "attn_pool.")  # what a net that gives all its tokens may lack
PATCHES = "patch_embed.proj.weight"
SHOWN = 3  # names that a message spells out


def load_timm_weights(net: nn.Module, name: str, file: str) -> None:
    """Read the weights of a timm net, made for other sizes, channels or classes perhaps, into one without a classifier.

    Args:
        net: a timm vision transformer, its layers not yet swapped.
        name: of the model, for messages.
        file: .safetensors, or a .pth or .pt that holds tensors only.

    Raises:
        UserError: no such file, code in it, or weights of another model.
    """
    what = f"backbone_weights '{file}'"
    if not Path(file).is_file():
        raise UserError(f"{what} does not exist; give a file of weights")
    try:
        state: dict[str, Tensor] = load_state_dict(file, weights_only=True)
        filter_fn = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        state = dict(state if filter_fn is None else filter_fn(state, net))
        wanted = net.state_dict()
        if PATCHES in state and PATCHES in wanted:
            channels = wanted[PATCHES].shape[1]
            state[PATCHES] = adapt_input_conv(channels, state[PATCHES], state[PATCHES].shape[1])
    except Exception as error:  # whatever timm, torch or safetensors trip over, the file is the reason
        raise UserError(f"{what} cannot be read as weights of {name}: {error}") from error
    for part in ("weight", "bias"):  # a net that pools has its last norm behind the pool
        if f"norm.{part}" in wanted and f"norm.{part}" not in state and f"fc_norm.{part}" in state:
            state[f"norm.{part}"] = state.pop(f"fc_norm.{part}")
    _check(state, wanted, f"{what} does not fit {name}")
    net.load_state_dict({key: value for key, value in state.items() if key in wanted})


def _check(state: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{what}: it lacks {len(missing)} tensors, {', '.join(missing[:SHOWN])} among them")
    unknown = [key for key in state if key not in wanted and not key.startswith(OF_A_HEAD)]
    if unknown:
        raise UserError(f"{what}: it has {len(unknown)} tensors more, {', '.join(unknown[:SHOWN])} among them")
    other = [key for key, value in wanted.items() if state[key].shape != value.shape]
    if other:
        shapes = " and ".join(str(tuple(each[other[0]].shape)) for each in (state, wanted))
        raise UserError(f"{what}: {len(other)} tensors have other shapes, {other[0]} for instance {shapes}")


def timm_state(ours: nn.Module, theirs: nn.Module) -> dict[str, Tensor] | None:
    """The state of a net with FeedForwards under the names of timm's own net; None where that computes something else.

    Args:
        ours: a timm net whose feed-forward layers were swapped.
        theirs: the same net as timm makes it.
    """
    state = {key: value.detach() for key, value in ours.state_dict().items()}
    for name, layer in ours.named_modules():
        if not isinstance(layer, FeedForward):
            continue
        renamed = _renamed(layer, theirs.get_submodule(name))
        if renamed is None:
            return None
        kept = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state = {**kept, **{f"{name}.{key}": value for key, value in renamed.items()}}
    return {key: value.contiguous().clone() for key, value in state.items()}


def _renamed(layer: FeedForward, theirs: Any) -> dict[str, Tensor] | None:
    """The tensors of one layer under timm's names, if timm's layer computes the same."""
    config = layer.config
    if config.mixing != "fixed" or not is_pointwise(config.activation):
        return None
    if activation_name(theirs.act, (config.activation,)) != config.activation:
        return None
    up, gate, down = layer.up_proj, layer.gate_proj, layer.down_proj
    if isinstance(theirs, SwiGLU) and gate is not None:
        parts: dict[str, Any] = {"fc1_x": _tensors(up), "fc1_g": _tensors(gate)}
    elif isinstance(theirs, GluMlp) and gate is not None:
        first, second = (_tensors(part) for part in ((up, gate) if theirs.gate_last else (gate, up)))
        parts = {"fc1": {key: torch.cat([first[key], second[key]]) for key in first}}
    elif isinstance(theirs, Mlp) and gate is None:
        parts = {"fc1": _tensors(up)}
    else:
        return None
    parts |= {"fc2": _tensors(down), "norm": {} if layer.norm is None else _tensors(layer.norm)}
    state = {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
    expected = theirs.state_dict()
    same = state.keys() == expected.keys() and all(state[key].shape == expected[key].shape for key in state)
    return state if same else None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}
