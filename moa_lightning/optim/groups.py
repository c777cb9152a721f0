"""Which parameters decay and which do not.

Weight decay belongs to matrices of the trunk. The coefficients of a mix (α, u, b) must not decay: learned activations
have been judged weak because they were. They form a group of their own, with a learning-rate factor, or two: a step of
Adam moves the logit u·x of a gate up to |x|_1 times as far as it moves α, so α can bear a larger rate than the gates.
Norms, biases, tokens, position tables and parameters of activations do not decay either; the learned norms of DINO's
prototypes do, as in the official code. Of experts, which stack the parameters of several layers, each counts as what it
is in one of them.

Muon takes what the user's patterns name: matrices of the transformer's blocks. Embeddings, output matrices, routers,
and the gates and coefficients of mixes are none of them.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import UserError
from ..experts import Experts
from ..mixing import MixCoefficients
from ..moe import Router

DECAYING = ("muon", "decay")  # groups whose members take weight decay


def parameter_groups(
    net: nn.Module,
    learning_rate: float,
    weight_decay: float,
    mixing_factor: float,
    muon: Sequence[str] = (),
    gate_factor: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters as the optimiser groups "muon", "decay", "no_decay", "mixing" and "gates"; empty ones are
    left out.

    Args:
        learning_rate: of the trunk.
        weight_decay: of the group "decay".
        mixing_factor: multiplies the learning rate of the coefficients of mixes.
        muon: patterns (as of file names) for the names of the matrices in "muon".
        gate_factor: that of the gates of mixes (u, b); None: they are in the group of the coefficients.

    Raises:
        UserError: a pattern matches nothing, or what is no matrix of a block.
    """
    mixes = [module for module in net.modules() if isinstance(module, MixCoefficients)]
    mixing = {id(p) for mix in mixes for p in mix.parameters(recurse=False)}
    gates = {id(p) for mix in mixes for p in (mix.gate_weight, mix.gate_bias) if gate_factor is not None}
    stacked = {id(p) for m in net.modules() if isinstance(m, Experts) for p in m.parameters()}
    orthogonal = _matched(net, muon, mixing, stacked)
    names: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": [], "mixing": [], "gates": []}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in mixing:
            names["gates" if id(parameter) in gates else "mixing"].append(parameter)
        elif id(parameter) in orthogonal:
            names["muon"].append(parameter)
        elif _axes(parameter, stacked) < 2 or name.endswith(("_token", "pos_embed")):
            names["no_decay"].append(parameter)
        else:
            names["decay"].append(parameter)
    factors = {"mixing": mixing_factor, "gates": mixing_factor if gate_factor is None else gate_factor}
    rates = {name: learning_rate * factors.get(name, 1.0) for name in names}
    decays = {name: weight_decay if name in DECAYING else 0.0 for name in names}
    return [
        {"params": params, "name": name, "lr": rates[name], "weight_decay": decays[name]}
        for name, params in names.items()
        if params
    ]


def scale_rates(net: nn.Module, groups: list[dict[str, Any]], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The groups with the learning rate of each parameter multiplied: one group for each of them and each factor.

    Args:
        groups: as parameter_groups gives them.
        rates: factor of each parameter by its name in `net`.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    scaled: dict[tuple[str, float], dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            factor = rates[names[id(parameter)]]
            new = {**group, "params": [], "name": f"{group['name']} x {factor:.3g}", "lr": group["lr"] * factor}
            scaled.setdefault((group["name"], factor), new)["params"].append(parameter)
    return list(scaled.values())


def _axes(parameter: nn.Parameter, stacked: set[int]) -> int:
    """Axes of a parameter, of one expert's where it stacks those of several."""
    return parameter.dim() - (id(parameter) in stacked)


def _matched(net: nn.Module, patterns: Sequence[str], mixing: set[int], stacked: set[int]) -> set[int]:
    """Ids of the trainable parameters that the patterns name."""
    others = mixing | {id(p) for m in net.modules() if isinstance(m, Router | nn.Embedding) for p in m.parameters()}
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found: set[int] = set()
    for pattern in patterns:
        matched = {name: p for name, p in trained.items() if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(
                f"optimizer.muon_parameters: '{pattern}' matches no parameter of the net, which has for instance "
                f"{', '.join(list(trained)[:4])}; correct it or take it out"
            )
        for name, parameter in matched.items():
            inside = "blocks" in name.split(".") and id(parameter) not in others
            if not inside or _axes(parameter, stacked) != 2:
                raise UserError(
                    f"optimizer.muon_parameters: '{pattern}' matches {name} of shape {tuple(parameter.shape)}, which "
                    "is no matrix that a block multiplies with; give narrower patterns"
                )
        found.update(id(p) for p in matched.values())
    return found
