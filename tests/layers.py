"""What the tests of the feed-forward family share: every combination of its options, random parameters, the comparison
with the NumPy reference, and a record of what a layer stores for its backward pass.

Tolerances are norm of the difference over norm, for the output and for every gradient on its own: 1e-10 in float64,
1e-5 in float32. Parameters are random everywhere, also α, u and b, so that no test lives off a special start.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moa_lightning import FeedForward, FFNConfig
from moa_lightning.activations import activation_names
from tests.reference import Spec, feedforward

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FORMS = (("plain", "one"), ("gated", "one"), ("gated", "both"), ("gated", "pairs"))
GATES = ("sigmoid", "softmax", "tanh")


def _combinations() -> list[FFNConfig]:
    """Every member of the family that the options span."""
    configs = [
        FFNConfig(mixing="fixed", form=form, activation=activation, bias=bias)
        for form, activation, bias in itertools.product(("plain", "gated"), activation_names(), (True, False))
    ]
    for (form, branches), init, base in itertools.product(FORMS, ("identity", "paper"), ("trained", "held")):
        for bias in (True, False):
            configs.append(FFNConfig("la", form, branches=branches, init=init, base=base, bias=bias))
        for gate, gate_bias in itertools.product(GATES, (True, False)):
            configs.append(
                FFNConfig("moa", form, branches=branches, gate=gate, gate_bias=gate_bias, init=init, base=base)
            )
    return configs


def layer_name(config: FFNConfig) -> str:
    parts = [config.mixing, config.form]
    if config.mixing == "fixed":
        parts.append(config.activation)
    else:
        parts += [config.branches, config.init, config.base]
    if config.mixing == "moa":
        parts += [config.gate, "gatebias" if config.gate_bias else "nogatebias"]
    return "-".join(parts) + ("" if config.bias else "-nobias")


COMBINATIONS = _combinations()
every_combination = pytest.mark.parametrize("config", COMBINATIONS, ids=layer_name)
every_gate = pytest.mark.parametrize("gate", GATES)
every_form = pytest.mark.parametrize(("form", "branches"), FORMS)


@torch.no_grad()
def randomise(layer: nn.Module, seed: int = 0) -> None:
    """Generic values in every parameter and buffer, of the size 1/sqrt(fan in) where that has a meaning."""
    generator = torch.Generator().manual_seed(seed)
    for value in (*layer.parameters(), *layer.buffers()):
        scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.7
        value.copy_(scale * torch.randn(value.shape, generator=generator, dtype=torch.float64))


def random_input(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spec_of(config: FFNConfig) -> Spec:
    return Spec(config.mixing, config.form, config.activation, config.dictionary, config.branches, config.gate)


def reference_values(layer: FeedForward) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert tuple(ours.shape) == theirs.shape
    return float(np.linalg.norm(ours.detach().double().numpy() - theirs) / np.linalg.norm(theirs))


def assert_agrees(layer: FeedForward, dtype: torch.dtype, tokens: tuple[int, ...] = (3, 2)) -> None:
    """Output and every gradient of the layer equal the reference's."""
    x = random_input(*tokens, layer.dim, dtype=dtype).requires_grad_()
    dy = random_input(*tokens, layer.dim, seed=2, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    flat = x.detach().double().numpy().reshape(-1, layer.dim)
    expected, gradients = feedforward(
        reference_values(layer), flat, spec_of(layer.config), dy.double().numpy().reshape(-1, layer.dim)
    )
    assert y.dtype == dtype
    assert relative(y.flatten(0, -2), expected) < TOLERANCE[dtype]
    ours = {"x": x.grad.flatten(0, -2), **{name: p.grad for name, p in layer.named_parameters()}}
    held = {name for name, _ in layer.named_buffers()}
    assert set(ours) == set(gradients) - held
    for name, gradient in ours.items():
        assert relative(gradient, gradients[name]) < TOLERANCE[dtype], name


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that are put aside for the backward pass."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
