"""What a feed-forward layer of another library holds, and how to tell one from the other MLPs in a model.

The class of a module alone does not say that it is a feed-forward layer: timm builds relative position biases, token
mixing and attention pools from the same Mlp. So the general classes (timm's) must also stand in the place of one, a
residual block: a norm of the layer's width beside it, no attention pool, no whole blocks beside it, not token mixing.
Classes that serve nothing else (ours, GPT2MLP, LlamaMLP) need no such look. Readers are found by the qualified name
of a class, so nothing is imported for models that are not in use.

An activation is named by its values, not by its class: libraries have half a dozen classes for GELU and SiLU, and one
class (nn.GELU, nn.LeakyReLU) for several functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from .activations import activation_names, is_pointwise, pointwise
from .feedforward import FeedForward, FFNConfig

PROBE = (-16.0, 16.0, 257)  # reaches past the clips of ReLU6 and clipped GELU; has 0
AGREEMENT = 1e-9  # in float64; the GELUs differ by 5e-4, rounded constants by 1e-11


class Unreadable(Exception):
    """The module is left alone; the message says why."""


@dataclass(frozen=True)
class Projection:
    """A weight (out, in) and its bias (out,) or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class SourceLayer:
    """A feed-forward layer in one vocabulary, whatever library it came from."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: nn.Module | str
    """module, or a name of ours"""
    norm: nn.Module | None
    """between the hidden vector and the down projection"""
    dropout: tuple[float, float]
    """rates of the hidden vector and of the output"""
    baseline: FFNConfig
    """what the layer costs, for a match by parameters or FLOPs"""
    learned: FeedForward | None = None
    """the layer itself where it has learned mixes"""

    @property
    def dim(self) -> int:
        return self.up.weight.shape[1]

    @property
    def hidden_dim(self) -> int:
        return self.up.weight.shape[0]

    @property
    def form(self) -> str:
        return self.baseline.form


def _linear(module: Any) -> Projection:
    kind = type(module)
    if kind is not nn.Linear:  # a subclass is quantised, low-rank or parametrised: its weight is not all
        raise Unreadable(f"its projections are {kind.__name__}, not Linear")
    return Projection(module.weight, module.bias)


def _new(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter of its own, laid out afresh, that trains if `like` does."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)


def _transposed(module: Any) -> Projection:
    """transformers' Conv1D: a linear map that stores (in, out)."""
    if type(module).__name__ != "Conv1D":
        raise Unreadable(f"its projections are {type(module).__name__}, not Conv1D")
    return Projection(_new(module.weight.T, module.weight), module.bias)


def _halves(packed: Projection) -> tuple[Projection, Projection]:
    weights = [_new(w, packed.weight) for w in packed.weight.chunk(2)]
    if packed.bias is None:
        return Projection(weights[0], None), Projection(weights[1], None)
    biases = [_new(b, packed.bias) for b in packed.bias.chunk(2)]
    return Projection(weights[0], biases[0]), Projection(weights[1], biases[1])


def _source(
    up: Projection,
    gate: Projection | None,
    down: Projection,
    activation: nn.Module,
    norm: nn.Module | None = None,
    dropout: tuple[float, float] = (0.0, 0.0),
) -> SourceLayer:
    bias = up.bias is not None or down.bias is not None
    baseline = FFNConfig(form="gated" if gate else "plain", bias=bias)
    norm = None if isinstance(norm, nn.Identity) else norm
    return SourceLayer(up, gate, down, activation, norm, dropout, baseline)


def _read_mlp(layer: Any) -> SourceLayer:
    up, down = _linear(layer.fc1), _linear(layer.fc2)
    return _source(up, None, down, layer.act, layer.norm, (layer.drop1.p, layer.drop2.p))


def _read_glu(layer: Any) -> SourceLayer:
    first, second = _halves(_linear(layer.fc1))
    up, gate = (first, second) if layer.gate_last else (second, first)
    return _source(up, gate, _linear(layer.fc2), layer.act, layer.norm, (layer.drop1.p, layer.drop2.p))


def _read_swiglu(layer: Any) -> SourceLayer:
    up, gate, down = _linear(layer.fc1_x), _linear(layer.fc1_g), _linear(layer.fc2)
    return _source(up, gate, down, layer.act, layer.norm, (layer.drop1.p, layer.drop2.p))


def _read_gpt2(layer: Any) -> SourceLayer:
    up, down = _transposed(layer.c_fc), _transposed(layer.c_proj)
    return _source(up, None, down, layer.act, dropout=(0.0, layer.dropout.p))


def _read_llama(layer: Any) -> SourceLayer:
    return _source(_linear(layer.up_proj), _linear(layer.gate_proj), _linear(layer.down_proj), layer.act_fn)


def _read_ours(layer: FeedForward) -> SourceLayer:
    up, down = _linear(layer.up_proj), _linear(layer.down_proj)
    gate = None if layer.gate_proj is None else _linear(layer.gate_proj)
    hidden_rate, output_rate = (0.0 if drop is None else drop.p for drop in (layer.hidden_drop, layer.drop))
    learned = layer if layer.mixings() else None
    return SourceLayer(
        up, gate, down, layer.config.activation, layer.norm, (hidden_rate, output_rate), layer.config, learned
    )


_NEEDS_PLACE: dict[str, Callable[[Any], SourceLayer]] = {
    "timm.layers.mlp.Mlp": _read_mlp,
    "timm.layers.mlp.GluMlp": _read_glu,
    "timm.layers.mlp.SwiGLU": _read_swiglu,
}
_ANYWHERE: dict[str, Callable[[Any], SourceLayer]] = {
    "moa_lightning.feedforward.FeedForward": _read_ours,
    "transformers.models.gpt2.modeling_gpt2.GPT2MLP": _read_gpt2,
    "transformers.models.llama.modeling_llama.LlamaMLP": _read_llama,
}
_READERS = {**_NEEDS_PLACE, **_ANYWHERE}


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _known_class(module: nn.Module) -> type | None:
    return next((c for c in type(module).__mro__ if _qualified(c) in _READERS), None)


def is_candidate(module: nn.Module) -> bool:
    """Whether a module might be taken for a feed-forward layer by its class: known ones and all that are called so."""
    named_so = type(module).__name__.lower().endswith(("mlp", "feedforward", "swiglu", "ffn"))
    return named_so or _known_class(module) is not None


def read_layer(module: nn.Module) -> SourceLayer:
    """Take a feed-forward layer apart; Unreadable for what cannot be one of ours."""
    known = _known_class(module)
    if known is None:
        raise Unreadable(f"there is no adapter for its class {_qualified(type(module))}")
    if type(module).forward is not known.forward:  # type: ignore[attr-defined]
        raise Unreadable(f"{type(module).__name__} computes something else than its base {known.__name__}")
    source = _READERS[_qualified(known)](module)
    if source.down.weight.shape[0] != source.dim:
        raise Unreadable(f"it maps {source.dim} numbers to {source.down.weight.shape[0]}")
    return source


def needs_place(module: nn.Module) -> bool:
    """Whether the class serves other purposes too, so that the place decides."""
    known = _known_class(module)
    return known is not None and _qualified(known) in _NEEDS_PLACE


def place_problem(parent: nn.Module, attribute: str, dim: int) -> str | None:
    """Why an MLP of model width `dim` at this place is no feed-forward layer; None if it is one."""
    if isinstance(parent, AttentionPoolLatent):
        return "it belongs to an attention pool"
    if attribute == "mlp_tokens":
        return "it mixes tokens, not channels"
    if not any(_is_norm(child, dim) for child in parent.children()):
        return f"no norm of width {dim} stands beside it, so it is not in a residual block"
    return None


def _is_norm(module: nn.Module, dim: int) -> bool:
    if "norm" not in type(module).__name__.lower() and type(module).__name__ != "Affine":  # ResMLP's norm
        return False
    if getattr(module, "normalized_shape", None) == (dim,):
        return True
    return any(parameter.numel() == dim for parameter in module.parameters(recurse=False))


def activation_name(activation: nn.Module | str, prefer: tuple[str, ...] = ()) -> str | None:
    """The name of the pointwise activation with the same values; None where there is none.

    Args:
        activation: a module, or a name of ours.
        prefer: names to try first, of several with the same values.
    """
    if isinstance(activation, str):
        return activation if is_pointwise(activation) else None
    if next(activation.parameters(), None) is not None or next(activation.buffers(), None) is not None:
        return None
    probe = torch.linspace(*PROBE, dtype=torch.float64, device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a random activation must not move the global state
        try:
            values = activation.forward(probe.clone())  # not a call: no hooks; a copy: it may work in place
        except (RuntimeError, TypeError, ValueError):  # it does not take a plain vector, so it is not pointwise
            return None
        names = (*prefer, *filter(is_pointwise, activation_names()))
        return next((name for name in names if _agree(values, pointwise(name).function(probe))), None)


def first_activation(model: nn.Module) -> str | None:
    """The activation of the first feed-forward layer of a model by our name; None where there is no such."""
    for module in filter(is_candidate, model.modules()):
        try:
            return activation_name(read_layer(module).activation)
        except Unreadable:
            continue
    return None


def _agree(a: Any, b: Tensor) -> bool:
    same_kind = isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.allclose(a, b, rtol=AGREEMENT, atol=AGREEMENT)
