"""Two nets that are trained together, and what they may share in their feed-forward layers.

Layers are paired by their place: the i-th of one transformer with the i-th of the other. Shared are α (the base
coefficients of the mixes), the gates (u and b), or whole layers. What is shared is one tensor under two names, with the
start that it has in the first net. [O]
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from torch import nn

from ..errors import UserError
from ..experts import Experts
from ..feedforward import FeedForward
from ..mixing import MixCoefficients

Tie = Literal["alpha", "gates", "ffn"]
PARAMETERS = {"alpha": ("base",), "gates": ("gate_weight", "gate_bias")}  # of a mix
Result = TypeVar("Result")


class JointNet(nn.Module):
    """A vision net and a language net. `forward` runs what it is given: under FSDP2 every use of the parts has to lie
    inside the forward pass of what holds them, which is how shared layers know to whom they belong."""

    def __init__(self, vision: nn.Module, language: nn.Module) -> None:
        super().__init__()
        self.vision, self.language = vision, language

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def ffn_layers(net: nn.Module) -> list[tuple[str, FeedForward]]:
    """The feed-forward layers of a net in their order, with their names in it."""
    return [(name, module) for name, module in net.named_modules() if isinstance(module, FeedForward)]


def tie_layers(first: nn.Module, second: nn.Module, ties: Sequence[Tie]) -> None:
    """Have the feed-forward layers of two transformers share what `ties` names, in place.

    Raises:
        UserError: layers that cannot be paired, or have nothing of the kind to share.
    """
    ours, theirs = ffn_layers(first), ffn_layers(second)
    if len(ours) != len(theirs):
        raise UserError(
            f"model.tie pairs layers by their place, but vision has {len(ours)} feed-forward layers and language "
            f"{len(theirs)}; give both the same depth"
        )
    for (_, layer), (name, other) in zip(ours, theirs, strict=True):
        if isinstance(other, Experts):
            raise UserError("model.tie does not share experts; set model.language.moe.experts to 0")
        if "ffn" in ties:
            _check_same(layer, other)
            second.set_submodule(name, layer)
            continue
        for tie in ties:
            _share(layer, other, tie)


def _check_same(layer: FeedForward, other: FeedForward) -> None:
    """UserError unless two layers have the same parameters and compute the same."""
    mine, its = ({name: tuple(p.shape) for name, p in each.state_dict().items()} for each in (layer, other))
    if mine != its:
        name = next(name for name in mine | its if mine.get(name) != its.get(name))
        raise UserError(
            f"model.tie ffn needs layers of the same shape, but {name} is {mine.get(name, 'absent')} in vision and "
            f"{its.get(name, 'absent')} in language; give both the same width, form and ffn.bias"
        )
    if (layer.config.activation, layer.config.dictionary) != (other.config.activation, other.config.dictionary):
        raise UserError("model.tie ffn needs layers with the same activations; set model.ffn for both domains")


def _share(layer: FeedForward, other: FeedForward, tie: Tie) -> None:
    """Put the parameters of `layer`'s mixes into `other`'s."""
    mixes, others = layer.mixings(), other.mixings()
    found = False
    for attribute in mixes.keys() & others.keys():
        mix, its = mixes[attribute], others[attribute]
        if mix.entries != its.entries:
            raise UserError(f"model.tie {tie} needs the same ffn.dictionary in both domains; set model.ffn for both")
        for name in PARAMETERS[tie]:
            found |= _share_parameter(mix, its, name, tie)
    if not found or mixes.keys() != others.keys():
        what = "trained α" if tie == "alpha" else "trained gates"
        raise UserError(f"model.tie {tie} needs mixes with {what} in both domains; set model.ffn accordingly")


def _share_parameter(mix: MixCoefficients, its: MixCoefficients, name: str, tie: Tie) -> bool:
    own, other = mix._parameters.get(name), its._parameters.get(name)
    if own is None or other is None:
        return False
    if own.shape != other.shape:
        raise UserError(
            f"model.tie {tie} needs {name} of one shape, but it is {tuple(own.shape)} in vision and "
            f"{tuple(other.shape)} in language; give both the same width"
        )
    setattr(its, name, own)
    return True
