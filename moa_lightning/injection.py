"""Swap the feed-forward layers of a model for ours, in place.

Two cases. Where form (plain, gated) and hidden width stay, the projections are carried over as they are, and LA and
MoA with the identity start begin at the activation that the layer had: the model computes what it computed before.
Otherwise the projections cannot be carried over; they are drawn afresh and the report says where.

Biases, dropout and a norm inside the layer follow the layer that is replaced, not the config. Coefficients of a mix
are float32 at least, whatever the model's dtype (0.999 must not become 1 in bfloat16). Hooks on a replaced layer are
gone with it. A checkpoint written before the swap no longer fits by its names: load it first, then swap.

What the config says of the other places of a mix, attention and norms, is done to the whole net (place_injection.py).
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .feedforward import FeedForward, FFNConfig, matched_hidden_dim
from .injection_adapters import (
    SourceLayer,
    Unreadable,
    activation_name,
    is_candidate,
    needs_place,
    place_problem,
    read_layer,
)
from .mixing import FixedActivation
from .place_injection import apply, place_swaps
from .random import named_seed

Match = str | Callable[[str, nn.Module], bool]
SHOWN = 5  # names and reasons that a message spells out


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did; names are qualified and in the model's order."""

    replaced: list[str]
    """layers that are now FeedForwards"""
    reinitialized: list[str]
    """those of them whose projections were drawn afresh"""
    skipped: dict[str, str]
    """MLPs left alone, and why"""

    def __str__(self) -> str:
        lines = [f"swapped {len(self.replaced)} feed-forward layers: {_shorten(self.replaced)}"]
        if self.reinitialized:
            lines.append(f"drew fresh projections for {len(self.reinitialized)}: {_shorten(self.reinitialized)}")
        if self.skipped:
            lines.append(f"left alone {len(self.skipped)}: {_explain(self.skipped)}")
        return "\n".join(lines)


def inject(
    model: nn.Module, config: FFNConfig, match: Match | None = None, seed: int = 0, untrained: bool = False
) -> InjectionReport:
    """Replace the feed-forward layers of a model by FeedForwards, in place.

    Knows timm's Mlp, GluMlp, SwiGLU and SwiGLUPacked in residual blocks, transformers' GPT-2 and Llama, and models
    that hold a FeedForward already.

    Args:
        model: a timm, transformers or own model, on any device ("meta" included) and in any float dtype.
        config: what the layers shall compute. `match` compares with the layer that is replaced.
        match: which MLPs are feed-forward layers, in place of the rule by structure: a regular expression searched
            in the qualified name, or a callable (qualified name, module) -> bool.
        seed: of all random starts, together with the layer's name; the global random state is neither read nor moved.
        untrained: the model computes nothing yet that is worth keeping, so an activation that the config names (any but
            the default) is what the identity start begins at, instead of the layer's.

    Returns:
        The report. A module that stands in several places counts once, under its first name, and stays shared.

    Raises:
        UserError: nothing to swap; the identity start needs an activation that the dictionary lacks; attention or norms
            that other places of a mix cannot take. The model is then as it was.
    """
    candidates, skipped = _select(model, _matcher(match))
    if not candidates:
        left = f"; left alone: {_explain(skipped)}" if skipped else ""
        raise UserError(f"{type(model).__name__} has no feed-forward layer that inject can swap{left}")
    own_start = untrained and config.activation != FFNConfig().activation
    layers = [_build(each, config, seed, own_start) for each in candidates]  # all errors come before the first swap
    names = [place.name for candidate in candidates for place in candidate.places]
    others = place_swaps(model, config, names, seed)
    for candidate, layer in zip(candidates, layers, strict=True):
        for place in candidate.places:
            setattr(place.parent, place.attribute, layer)
    apply(others)
    return InjectionReport(
        replaced=[c.name for c in candidates],
        reinitialized=[c.name for c in candidates if not _carries(c.source, config)],
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Place:
    parent_name: str
    parent: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.parent_name}.{self.attribute}" if self.parent_name else self.attribute


@dataclass(frozen=True)
class _Candidate:
    module: nn.Module
    source: SourceLayer
    places: list[_Place] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.places[0].name


def _matcher(match: Match | None) -> Callable[[str, nn.Module], bool] | None:
    if not isinstance(match, str):
        return match
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise UserError(f"match '{match}' is not a regular expression: {error}") from error
    return lambda name, module: pattern.search(name) is not None


def _find(model: nn.Module) -> dict[nn.Module, list[_Place]]:
    """All modules that their class makes candidates, in module order, with every place where they stand."""
    found: dict[nn.Module, list[_Place]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_candidate(module):
            parent_name, _, attribute = name.rpartition(".")
            place = _Place(parent_name, model.get_submodule(parent_name), attribute)
            found.setdefault(module, []).append(place)
    return found


def _select(
    model: nn.Module, match: Callable[[str, nn.Module], bool] | None
) -> tuple[list[_Candidate], dict[str, str]]:
    """The layers to swap, and the candidates left alone with the reason."""
    chosen: list[_Candidate] = []
    skipped: dict[str, str] = {}
    if is_candidate(model):
        skipped["the model itself"] = "a module cannot be swapped in place of itself; put it into another"
    for module, places in _find(model).items():
        try:
            candidate = _Candidate(module, read_layer(module), places)
        except Unreadable as reason:
            skipped[places[0].name] = str(reason)
            continue
        problem = _placement(candidate) if match is None else _mismatch(candidate, match)
        if problem is None:
            chosen.append(candidate)
        else:
            skipped[candidate.name] = problem
    if match is None:
        for candidate in _beside_blocks(chosen):
            chosen.remove(candidate)
            skipped[candidate.name] = "it stands beside whole blocks, as a head does"
    return chosen, skipped


def _mismatch(candidate: _Candidate, match: Callable[[str, nn.Module], bool]) -> str | None:
    selected = any(match(place.name, candidate.module) for place in candidate.places)
    return None if selected else "match does not select it"


def _placement(candidate: _Candidate) -> str | None:
    if not needs_place(candidate.module):
        return None
    problems = [place_problem(p.parent, p.attribute, candidate.source.dim) for p in candidate.places]
    return None if None in problems else problems[0]


def _beside_blocks(candidates: list[_Candidate]) -> list[_Candidate]:
    """Candidates whose parent holds other candidates deeper inside: the parent is no block then."""
    parents = {place.parent_name for c in candidates if needs_place(c.module) for place in c.places}
    outer = {a for a in parents if any(b != a and b.startswith(f"{a}." if a else "") for b in parents)}
    return [c for c in candidates if needs_place(c.module) and any(p.parent_name in outer for p in c.places)]


def _with_biases_of(source: SourceLayer, config: FFNConfig) -> FFNConfig:
    """The config with biases where the replaced layer has them."""
    return replace(config, bias=source.up.bias is not None or source.down.bias is not None)


def _hidden_dim(source: SourceLayer, config: FFNConfig) -> int:
    return matched_hidden_dim(
        source.dim, _with_biases_of(source, config), source.hidden_dim, config.match, baseline=source.baseline
    )


def _carries(source: SourceLayer, config: FFNConfig) -> bool:
    """Whether form and hidden width stay, so that the projections do."""
    return config.form == source.form and _hidden_dim(source, config) == source.hidden_dim


def _build(candidate: _Candidate, config: FFNConfig, seed: int, own_start: bool) -> FeedForward:
    """The layer that takes a candidate's place; the candidate is only read. With `own_start` it begins at the config's
    activation."""
    source, name = candidate.source, candidate.name
    carried = _carries(source, config)
    target = _with_biases_of(source, config)
    keeps_function = carried and config.mixing != "fixed" and config.init == "identity"
    if keeps_function and not own_start:
        target = _starting_where_it_was(source, target, name)
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        layer = FeedForward(source.dim, target, _hidden_dim(source, config), dropout=source.dropout)
    _place_projections(layer, source, carried)
    generator = torch.Generator(device="cpu").manual_seed(named_seed(seed, name))
    weight = source.up.weight
    if weight.device.type != "meta":
        _fill(layer, generator, fresh=not carried)
    _cast(layer, weight.device, weight.dtype, carried)
    if keeps_function and not own_start and source.learned is not None:
        _copy_mixes(source.learned, layer)
    layer.train(candidate.module.training)
    layer.norm = source.norm if layer.hidden_dim == source.hidden_dim else _resized(source.norm, layer.hidden_dim, name)
    return layer


def _starting_where_it_was(source: SourceLayer, config: FFNConfig, name: str) -> FFNConfig:
    """The config whose identity start computes what the layer computes; UserError where there is none."""
    if source.learned is not None:
        old = source.learned.config
        same_mix = (old.dictionary, old.branches) == (config.dictionary, config.branches)
        same_gate = old.mixing == "la" or (
            config.mixing == "moa" and old.gate == config.gate and old.gate_bias <= config.gate_bias
        )
        if same_mix and same_gate:
            return config
        raise UserError(
            f"the learned mix of layer '{name}' cannot be the identity start of another dictionary, branches or gate; "
            "keep those, or set ffn.init to 'paper'"
        )
    kind = source.activation if isinstance(source.activation, str) else type(source.activation).__name__
    activation = activation_name(source.activation, prefer=config.dictionary)
    if activation is None:
        raise UserError(
            f"the activation {kind} of layer '{name}' is none of the known pointwise ones, which the identity start "
            "needs; add it with register_activation and to ffn.dictionary, or set ffn.init to 'paper'"
        )
    if activation not in config.dictionary:
        raise UserError(
            f"the identity start needs '{activation}', the activation of layer '{name}', in ffn.dictionary, which has "
            f"{', '.join(config.dictionary)}; add it or set ffn.init to 'paper'"
        )
    return replace(config, activation=activation)


def _place_projections(layer: FeedForward, source: SourceLayer, carried: bool) -> None:
    """The source's own parameters where they are carried; elsewhere only its choice of biases."""
    pairs = [(layer.up_proj, source.up), (layer.down_proj, source.down)]
    if layer.gate_proj is not None:
        pairs.append((layer.gate_proj, source.gate or source.up))
    for linear, projection in pairs:
        if carried:
            linear.weight = projection.weight
        if carried or projection.bias is None:
            linear.register_parameter("bias", projection.bias)


def _fill(layer: FeedForward, generator: torch.Generator, fresh: bool) -> None:
    """Give what is still on the meta device its start, on the CPU: the same for every device of the model."""
    mixes = [m for m in (layer.up_mix, layer.gate_mix, layer.pair_mix) if m is not None]
    for part in [*mixes, *(layer.projections() if fresh else [])]:
        part.to_empty(device="cpu")
    if fresh:
        layer.reset_parameters(generator)
        return
    for mix in mixes:
        if isinstance(mix, FixedActivation):
            mix.reset_parameters()
        else:
            mix.reset_parameters(generator)


def _cast(layer: FeedForward, device: torch.device, dtype: torch.dtype, carried: bool) -> None:
    """Fresh projections in the source's dtype, everything that belongs to a mix in float32 at least."""
    projections = layer.projections()
    for module in layer.children():
        if module not in projections:
            module.to(device, torch.promote_types(dtype, torch.float32))
        elif not carried:
            module.to(device, dtype)


@torch.no_grad()
def _copy_mixes(old: FeedForward, new: FeedForward) -> None:
    """Coefficients of learned mixes into those that contain them; a gate that the old ones lack stays at its start."""
    for name, mixing in old.mixings().items():
        new.get_submodule(name).load_state_dict(mixing.state_dict(), strict=False)


def _resized(norm: Any, width: int, name: str) -> nn.Module | None:
    """A norm like the given one, at its start, for another hidden width."""
    if norm is None:
        return None
    if not hasattr(norm, "normalized_shape"):
        raise UserError(
            f"layer '{name}' has a {type(norm).__name__} before its down projection that cannot take the matched width "
            f"{width}; set ffn.match to 'width'"
        )
    norm = copy.deepcopy(norm)
    norm.normalized_shape = (width,)
    for key, old in list(norm.named_parameters(recurse=False)):
        start = torch.ones if key == "weight" else torch.zeros
        value = start(width, device=old.device, dtype=old.dtype)
        norm.register_parameter(key, nn.Parameter(value, requires_grad=old.requires_grad))
    return norm


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= SHOWN else f"{names[0]}, {names[1]} ... {names[-1]}"


def _explain(skipped: dict[str, str]) -> str:
    """The reasons, each with the names that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    shown = [f"{_shorten(group)} ({reason})" for reason, group in list(names.items())[:SHOWN]]
    more = len(names) - len(shown)
    return "; ".join(shown) + (f"; and {more} more reasons" if more else "")
