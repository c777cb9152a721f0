"""What one run takes over from another: its mixes, by name or by their place, or all of its weights. [O]

Mixes. Nets of two domains have no names in common, but both are stacks of blocks: block i of n takes the mixes of block
round(i (m - 1) / (n - 1)) of m. α, one number an activation, fits every net with the same dictionary. A gate
vector u_k reads the FFN's input and fits nets of the same width only. Only transformers themselves take part: the
decoder of a masked autoencoder keeps its own start.

Weights. A net whose layers had a fixed activation goes on with LA or MoA from the identity start, where it computes
what it computed before; likewise LA as MoA. Parameters that the mixes add keep the start that they have.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_reading import DOMAINS, joint_refused, refuse_joint
from .checkpoints import RunCheckpointIO
from .errors import UserError
from .feedforward import FeedForward, MixedLayer
from .mixing import MixCoefficients
from .optim.average import net_weights
from .places import entries, start_of
from .run_folder import CHECKPOINTS, LAST, given_checkpoint
from .sharded import sharded_as

MIXING = "mixing.json"  # in a run's folder
TWIN = re.compile(r"^(student|teacher)\.")  # the two nets of a self-distillation start alike
PLACE = re.compile(r"^(?:(?P<stack>.+)\.)?blocks\.(?P<block>\d+)\.(?:.+\.)?(?P<mix>\w+_mix|\w+\.mix)$")
NET = "net."
MIX_PARAMETERS = ("base", "gate_weight", "gate_bias")


@dataclass(frozen=True)
class GivenMix:
    """A mix of another run."""

    base: Tensor
    """(K,) or (K, K): its α, or its mean coefficients"""
    gate_weight: Tensor | None = None
    """(K, d) or (K², d)"""
    gate_bias: Tensor | None = None
    entries: tuple[str, ...] | None = None
    """its dictionary, where it is known"""
    gate: str | None = None
    """function of its gates"""


def source_file(source: str, gates: bool) -> Path:
    """The file that ffn.start_from means: a run's folder stands for its mean coefficients, or, where gates are wanted,
    for its last checkpoint."""
    path = Path(source)
    if path.suffix == ".json" or path.suffix == ".ckpt":
        return path
    return path / CHECKPOINTS / LAST if gates else path / MIXING


def read_mixes(path: Path) -> dict[str, GivenMix]:
    """Qualified name of each mix in its net -> the mix, of a mixing.json or a checkpoint; the teacher stands for both
    nets of a self-distillation, and is named without itself.

    Raises:
        UserError: it is damaged, or has no mixes.
    """
    found = _from_means(path) if path.suffix == ".json" else _from_checkpoint(path)
    if not found:
        raise UserError(f"'{path}' holds no mixes; name a run of LA or MoA in ffn.start_from")
    return {TWIN.sub("", name): mix for name, mix in found.items()}


def _from_means(path: Path) -> dict[str, GivenMix]:
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return {
            layer["module"]: GivenMix(
                torch.tensor(layer["mean"], dtype=torch.float64), entries=_tuple(layer.get("entries"))
            )
            for layer in layers.values()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); name another run in ffn.start_from") from error


def _from_checkpoint(path: Path) -> dict[str, GivenMix]:
    content = RunCheckpointIO().load_checkpoint(path)
    ffn, state = content.get("hyper_parameters", {}).get("ffn") or {}, content.get("state_dict", {})
    bases = [name for name in state if name.startswith(NET) and name.endswith(("_mix.base", ".mix.base"))]
    names = [name.removesuffix(".base") for name in bases]
    return {
        name.removeprefix(NET): GivenMix(
            state[f"{name}.base"],
            state.get(f"{name}.gate_weight"),
            state.get(f"{name}.gate_bias"),
            _entries(name, ffn),
            ffn.get("gate"),
        )
        for name in names
    }


def _tuple(names: Any) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _entries(name: str, ffn: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The activations of the mix of that name, by the ffn options of its run."""
    names, start = _tuple(ffn.get("dictionary")), start_of(name)
    return names if names is None or start is None else entries(names, start)


def matched(wanted: list[str], known: Mapping[str, GivenMix], path: Path) -> dict[str, GivenMix]:
    """The mix of another run for each of a net's: of the same name, or else of the same place in the transformer.

    Raises:
        UserError: neither can be told.
    """
    if all(TWIN.sub("", name) in known for name in wanted):
        return {name: known[TWIN.sub("", name)] for name in wanted}
    ours, theirs = _by_place(wanted), _by_place(list(known))
    if {name.partition(".")[0] for name in known} == set(DOMAINS):
        raise joint_refused(path)
    if len(ours) != 1 or len(theirs) != 1:
        missing = next(name for name in wanted if TWIN.sub("", name) not in known)
        raise UserError(
            f"{path} knows no mix '{missing}', and places can be compared only where either net is one transformer; "
            "name another run in ffn.start_from"
        )
    own, other = *ours.values(), *theirs.values()
    found: dict[str, GivenMix] = {}
    for (block, mix), names in own.items():
        blocks = sorted({number for number, name in other if name == mix})
        if not blocks:
            raise UserError(
                f"{path} has no {mix} in its transformer; give both runs the same ffn.form, ffn.branches "
                "and places of mixes"
            )
        last = max(number for number, _ in own)
        source = blocks[round(block * (len(blocks) - 1) / last) if last else 0]
        found |= dict.fromkeys(names, known[other[source, mix][0]])
    return found


def _by_place(names: list[str]) -> dict[str, dict[tuple[int, str], list[str]]]:
    """Transformer -> (block, mix in it) -> names; decoders are left out, twins are one."""
    stacks: dict[str, dict[tuple[int, str], list[str]]] = {}
    for name in names:
        place = PLACE.match(TWIN.sub("", name))
        stack = "" if place is None else place["stack"] or ""
        if place is not None and stack.rpartition(".")[2] != "decoder":
            stacks.setdefault(stack, {}).setdefault((int(place["block"]), place["mix"]), []).append(name)
    return stacks


def start_gated(mix: MixCoefficients, given: GivenMix, name: str, path: Path) -> str:
    """Start a MoA mix at another's α and, where they fit, its gates; returns why the gates do not, "" where they do.

    Raises:
        UserError: α does not fit, or the gates do not and are to be frozen.
    """
    check_dictionary(mix, given, path)
    reason = ""
    if given.gate_weight is None or mix.gate_weight is None:
        reason = "the other run has none"
    elif given.gate_weight.shape != mix.gate_weight.shape:
        reason = f"their widths are {given.gate_weight.shape[-1]} there and {mix.gate_weight.shape[-1]} here"
    elif given.gate != mix.gate:
        reason = f"they are {given.gate} there and {mix.gate} here"
    elif given.gate_bias is not None and mix.gate_bias is None:
        reason = "they have a bias there (ffn.gate_bias)"
    if reason and mix.kind == "frozen":
        raise UserError(f"the gates of {path} cannot be frozen in {name}: {reason}; set ffn.gates to trained")
    mix.start_at(given.base)
    if not reason and given.gate_weight is not None:
        mix.start_gates(given.gate_weight, given.gate_bias)
    return reason


def check_dictionary(mix: MixCoefficients, given: GivenMix, path: Path) -> None:
    """UserError where two mixes are not of the same activations in the same order."""
    if given.entries not in (None, mix.entries):
        there, here = ", ".join(given.entries or ()), ", ".join(mix.entries)
        raise UserError(f"the mixes of {path} are of {there}, and here of {here}: match ffn.dictionary")


@torch.no_grad()
def load_weights(
    net: nn.Module,
    source: str,
    left: tuple[str, ...] = (),
    check: Callable[[Mapping[str, Any], Path], None] = lambda checkpoint, path: None,
) -> Path | None:
    """Give a net, sharded or not, the weights of another run; mixes with a start of their own keep it.

    Every process reads the checkpoint.

    Args:
        source: a run's folder, or a checkpoint.
        left: how the names begin of what either side keeps to itself, such as the head of another objective.
        check: raises UserError for a checkpoint, and its path, that is refused for more than its weights.

    Returns:
        The source, where it has no checkpoint.

    Raises:
        UserError: it is damaged, of another net (also of one that ties other parameters), or of one that the net's
            mixes do not start as.
    """
    path = given_checkpoint(source)
    if path is None:
        return Path(source)
    content = RunCheckpointIO().load_checkpoint(path)
    refuse_joint(content, path)
    check(content, path)
    given = net_weights(content)  # those that the run evaluates
    own: dict[str, Tensor] = net.state_dict()
    given, own = ({n: t for n, t in side.items() if not n.startswith(left)} for side in (given, own))
    if lost := [name for name in given if name not in own]:
        raise UserError(f"the weights of '{path}' have {lost[0]}, which this net lacks; match the models")
    _check_shared(net, given, path)
    held = own_starts(net, given, content.get("hyper_parameters", {}), path)
    for name, tensor in own.items():
        if name in held:
            continue
        if name not in given or given[name].shape != tensor.shape:
            there = f"in the shape {tuple(given[name].shape)}" if name in given else "not at all"
            raise UserError(f"the weights of '{path}' have {name} {tuple(tensor.shape)} {there}; match the models")
        tensor.copy_(sharded_as(given[name].to(tensor.device), tensor))
    return None


def _check_shared(net: nn.Module, given: Mapping[str, Tensor], path: Path) -> None:
    """UserError where one parameter of a net has several names and the given weights differ between them."""
    names: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first in given and name in given and not torch.equal(given[first], given[name]):
            raise UserError(
                f"the weights of '{path}' have {first} and {name} apart, which are one here; match the models "
                "(gpt.tie_embeddings)"
            )


def own_starts(net: nn.Module, given: Mapping[str, Tensor], saved: Mapping[str, Any], path: Path) -> set[str]:
    """Names of what the mixes of a net add to the given weights, or have from ffn.start_from.

    Args:
        given: the weights under the net's names.
        saved: hyper-parameters of the task that they are of, as far as they are known.
        path: of the weights, for messages.

    Raises:
        UserError: with them a layer would not compute what it computed before.
    """
    names: set[str] = set()
    for place, layer in net.named_modules():
        if not isinstance(layer, MixedLayer):
            continue
        ffn = (saved.get("decoder_ffn") if place.startswith("decoder") else None) or saved.get("ffn") or {}
        mixes = layer.mixings()
        if isinstance(layer, FeedForward) and not mixes:
            _check_fixed(layer, ffn.get("activation"), path)
        for attribute, mix in mixes.items():
            own = {leaf: f"{place}.{attribute}.{leaf}" for leaf in MIX_PARAMETERS if getattr(mix, leaf) is not None}
            if mix.given_start is not None:
                names |= set(own.values())
                continue
            names |= {name for name in own.values() if name not in given}
            if own["base"] not in given:
                before = ffn.get("activation") if isinstance(layer, FeedForward) else layer.config.activation
                _check_identity(layer, before, path)
            else:
                check_dictionary(mix, GivenMix(given[own["base"]], entries=_entries(f"{place}.{attribute}", ffn)), path)
            if own.get("gate_weight") in given and ffn.get("gate", mix.gate) != mix.gate:
                raise UserError(f"the gates of '{path}' are {ffn.get('gate')}, and here {mix.gate}: match ffn.gate")
    return names


def _check_fixed(layer: FeedForward, before: str | None, path: Path) -> None:
    """UserError unless a layer with a fixed activation has the one that the weights were trained with."""
    if before not in (None, layer.config.activation):
        raise UserError(
            f"the layers of '{path}' compute {before}, and here {layer.config.activation}: match ffn.activation"
        )


def _check_identity(layer: MixedLayer, before: str | None, path: Path) -> None:
    """UserError unless the mixes of a layer start as the activation that it had."""
    config = layer.config
    if config.init != "identity" or config.gates == "frozen" or before not in (None, config.activation):
        raise UserError(
            f"the layers of '{path}' compute {before}, which the mixes here do not start as; set ffn.init to identity, "
            f"ffn.activation to {before} and ffn.gates to trained"
        )
