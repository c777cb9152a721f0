"""Controls that ask a trained mix what its gates are worth: gates put at their mean, and LA begun at such means. [O]

`token_means` averages the coefficients c(x) of each mix over tokens; `hold_mixes` puts constants in their place, after
which a MoA layer is an LA layer, with the parameters of one. What is lost by it is what the gates add to the best that
one mix for all tokens could keep of them. `start_mixes` gives an LA net the means that a finished run has written
(mixing.json): what remains between it and MoA is not a better start. It also gives a net the mixes of a run in another
domain, a MoA net with its gates (transplants.py).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import UserError
from .feedforward import MixedLayer
from .mixing import MixCoefficients
from .transplants import MIXING, TWIN, check_dictionary, matched, read_mixes, source_file, start_gated

__all__ = ["MIXING", "Starts", "hold_mixes", "read_means", "start_mixes", "token_means"]


class Starts(NamedTuple):
    """What came of `start_mixes`."""

    missing: list[Path]
    """files that do not exist; their layers keep the start that they have. That is no mistake where a checkpoint
    overwrites it, so the caller decides"""
    said: list[str]
    """what was carried over, and what not"""


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
        if not isinstance(layer, MixedLayer):
            continue
        path = f"{name}." if name else ""
        given = {attribute: means[path + attribute] for attribute in layer.mixings() if path + attribute in means}
        for attribute, value in given.items():
            layer.mixings()[attribute].hold_at(value)
        if given and len(given) == len(layer.mixings()):
            layer.config = replace(layer.config, mixing="la", gates="trained")
        held += [path + attribute for attribute in given]
    return held


def start_mixes(net: nn.Module) -> Starts:
    """Set the start of all layers whose config has `start_from`.

    Raises:
        UserError: a file is damaged, or about a net whose mixes do not fit.
    """
    mixed = {n: m for n, m in net.named_modules() if isinstance(m, MixedLayer) and m.mixings()}
    layers = {n: m for n, m in mixed.items() if m.config.start_from}
    sources = dict.fromkeys((str(m.config.start_from), m.config.mixing == "moa") for m in layers.values())
    found = Starts([], [])
    for source, gated in sources:
        path = source_file(source, gated)
        if not path.exists():
            found.missing.append(path)
            continue
        about = {n: m for n, m in layers.items() if (m.config.start_from, m.config.mixing == "moa") == (source, gated)}
        mixes = {f"{name}.{attribute}": mix for name, m in about.items() for attribute, mix in m.mixings().items()}
        known = read_mixes(path)
        given = matched(list(mixes), known, path)
        by = "name" if all(TWIN.sub("", name) in known for name in mixes) else "place"
        anew: dict[str, None] = {}  # reasons why gates start anew
        for name, other in given.items():
            if gated:
                anew[start_gated(mixes[name], other, name, path)] = None
            else:
                check_dictionary(mixes[name], other, path)
        if not gated:
            hold_mixes(net, {name: other.base for name, other in given.items()})
        found.said.append(_said(path, gated, by, (len(given), len(mixes)), [reason for reason in anew if reason]))
    return found


def _said(path: Path, gated: bool, by: str, counts: tuple[int, int], anew: list[str]) -> str:
    carried, mixes = counts
    what = "α" if not gated or anew else "α and the gates"
    rest = f", and {mixes - carried} elsewhere keep their own start" if mixes > carried else ""
    gates = f"; the gates start anew, as {'; '.join(anew)}" if anew else ""
    return f"{what} of {carried} mixes from {path}, by {by}{rest}{gates}"


def read_means(path: Path) -> dict[str, Tensor]:
    """Qualified name of each mix in its net -> mean coefficients, of a mixing.json. Errors as in `read_mixes`."""
    return {name: mix.base for name, mix in read_mixes(path).items()}
