"""Controls that ask a trained mix what its gates are worth: gates put at their mean, and LA begun at such means. [O]

`token_means` averages the coefficients c(x) of each mix over tokens; `hold_mixes` puts constants in their place, after
which a MoA layer is an LA layer, with the parameters of one. What is lost by it is what the gates add to the best that
one mix for all tokens could keep of them. `start_mixes` gives an LA net the means that a finished run has written
(mixing.json): what remains between it and MoA is not a better start.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .feedforward import FeedForward
from .mixing import MixCoefficients

MIXING = "mixing.json"  # in a run's folder
TWIN = re.compile(r"^(student|teacher)\.")  # the two nets of a self-distillation start alike


@torch.no_grad()
def token_means(net: nn.Module, forward: Callable[[Any], Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean coefficients of every mix that `forward` reaches, over all tokens of the batches.

    Args:
        net: what holds the mixes; it is not changed.
        forward: called with each batch; every call of a mix counts, whatever net or view it belongs to.

    Returns:
        Qualified name in `net` -> float64 (K,) or (K, K).

    Raises:
        UserError: the net has experts, whose mixes are held as one.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str) -> Any:
        def see(module: MixCoefficients, arguments: tuple[Tensor, ...]) -> None:
            (x,) = arguments
            c = module.coefficients(x).flatten(0, x.dim() - 2).double()
            sums[name] = sums.get(name, 0) + c.sum(0)
            tokens[name] = tokens.get(name, 0) + c.shape[0]

        return see

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            if isinstance(module, MixCoefficients):
                if module.stack:
                    raise UserError(f"the gates of experts ({name}) cannot be averaged; use a net without experts")
                hooks.callback(module.register_forward_pre_hook(add(name)).remove)
        for batch in batches:
            forward(batch)
    return {name: total / tokens[name] for name, total in sums.items()}


def hold_mixes(net: nn.Module, means: Mapping[str, Tensor]) -> list[str]:
    """Put constants in the place of mixes, in place; returns the names of the mixes that are constant now.

    Args:
        means: qualified name of a mix in `net` -> (K,) or (K, K); mixes without an entry stay as they are.

    Raises:
        UserError: constants of another shape than their mix.
    """
    held = []
    for name, layer in net.named_modules():
        if not isinstance(layer, FeedForward):
            continue
        path = f"{name}." if name else ""
        given = {attribute: means[path + attribute] for attribute in layer.mixings() if path + attribute in means}
        for attribute, value in given.items():
            layer.mixings()[attribute].hold_at(value)
        if given and len(given) == len(layer.mixings()):
            layer.config = replace(layer.config, mixing="la", gates="trained")
        held += [path + attribute for attribute in given]
    return held


def start_mixes(net: nn.Module) -> list[Path]:
    """Set the start of all layers whose config has `start_from`.

    Returns:
        The files that do not exist; their layers keep the start that they have. That is no mistake where a checkpoint
        overwrites it, so the caller decides.

    Raises:
        UserError: a file is damaged, or about another net.
    """
    layers = {n: m for n, m in net.named_modules() if isinstance(m, FeedForward) and m.config.start_from}
    missing = []
    for source in dict.fromkeys(str(layer.config.start_from) for layer in layers.values()):
        path = _file(source)
        if not path.is_file():
            missing.append(path)
            continue
        known = {TWIN.sub("", name): mean for name, mean in read_means(path).items()}
        about = {name: layer for name, layer in layers.items() if layer.config.start_from == source}
        wanted = [f"{name}.{attribute}" for name, layer in about.items() for attribute in layer.mixings()]
        for name in wanted:
            if TWIN.sub("", name) not in known:
                raise UserError(f"{path} knows no mix '{name}': ffn.start_from must name a run of the same net")
        hold_mixes(net, {name: known[TWIN.sub("", name)] for name in wanted})
    return missing


def read_means(path: Path) -> dict[str, Tensor]:
    """Qualified name of each mix in its net -> mean coefficients, of a mixing.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return {layer["module"]: torch.tensor(layer["mean"], dtype=torch.float64) for layer in layers.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); name another run in ffn.start_from") from error


def _file(source: str) -> Path:
    path = Path(source)
    return path if path.suffix == ".json" else path / MIXING
