"""Which parameters decay and which do not.

Weight decay belongs to matrices of the trunk. The coefficients of a mix (α, u, b) must not decay: learned activations
have been judged weak because they were. They form a group of their own, with a learning-rate factor. Norms, biases,
tokens, position tables and parameters of activations do not decay either.
"""

from typing import Any

from torch import nn

from ..mixing import MixCoefficients


def parameter_groups(
    net: nn.Module, learning_rate: float, weight_decay: float, mixing_factor: float
) -> list[dict[str, Any]]:
    """Trainable parameters as the optimiser groups "decay", "no_decay" and "mixing"; empty groups are left out.

    Args:
        learning_rate: of the trunk.
        weight_decay: of the group "decay".
        mixing_factor: multiplies the learning rate of the coefficients of mixes.
    """
    mixing = {id(p) for m in net.modules() if isinstance(m, MixCoefficients) for p in m.parameters(recurse=False)}
    names: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "mixing": []}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in mixing:
            names["mixing"].append(parameter)
        elif parameter.dim() < 2 or name.endswith(("_token", "pos_embed", "last_layer.norm")):
            names["no_decay"].append(parameter)
        else:
            names["decay"].append(parameter)
    rates = {"decay": learning_rate, "no_decay": learning_rate, "mixing": learning_rate * mixing_factor}
    return [
        {"params": params, "name": name, "lr": rates[name], "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, params in names.items()
        if params
    ]
